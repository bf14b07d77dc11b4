// SPDX-License-Identifier: Apache-2.0
//! What a client is told that does not want everything: what is meant by the names it has asked for, kept up to date.
//!
//! A name means the resources that it finds and, where that is a service, those behind it. Our own clients number their
//! [`Question`]s; peers ask by the plain name. Each resource is told with all of the client's names that mean it now, so that a
//! client knows of one that none means any more: it may forget it, and is told no more of it. Where what is found by a name
//! moves (a service's address, an endpoint that borrows a pod's), it is *answered anew*: in one response it is removed and told
//! again with everything that it means.
//!
//! What a name means is not remembered here, only whether it means anything: a stream costs as much as was asked for on it,
//! however many endpoints a service has.

use super::draft::Draft;
use crate::published::{Changed, Entry, Set, Source};
use podveil_model::{Question, digest};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// What a client that comes again says of a name that meant nobody. It says `+` and the [`digest`] in hexadecimal of one that
/// did, and nothing of one that it waits for an answer to.
const NOBODY: &str = "-";

#[derive(Debug, Default)]
pub(super) struct OnDemand {
    /// By what they are about.
    asked: BTreeMap<String, Asked>,
}

#[derive(Debug, Default)]
struct Asked {
    /// As the client has it: more than one while it forgets and asks again.
    names: BTreeSet<String>,
    /// It meant somebody when the client was last told.
    found: bool,
}

/// What a name is about.
fn about(name: &str) -> &str {
    Question::parse(name).map_or(name, |question| question.about)
}

/// Names that a client wants which begins with these: its questions; where it has none it is a peer, and wants all.
fn wanted(initial: &BTreeMap<String, String>) -> impl Iterator<Item = (&String, &String)> {
    let is_question = |name: &str| Question::parse(name).is_some();
    let has_questions = initial.keys().any(|name| is_question(name));
    (initial.iter()).filter(move |(name, _)| !has_questions || is_question(name))
}

/// How many these are.
pub(super) fn wanted_at_first(initial: &BTreeMap<String, String>) -> usize {
    wanted(initial).count()
}

impl OnDemand {
    pub(super) fn names(&self) -> usize {
        self.asked.len()
    }

    pub(super) fn forget(&mut self, name: &str) {
        if let Some(asked) = self.asked.get_mut(about(name)) {
            asked.names.remove(name);
            if asked.names.is_empty() {
                self.asked.remove(about(name));
            }
        }
    }

    /// Goes on from what a client held and had asked for before it came here: the resources' names with the versions it has of
    /// them, and its questions with what it knows of the answers.
    pub(super) fn begin(
        &mut self,
        initial: &BTreeMap<String, String>,
        now: &Set,
        draft: &mut Draft,
    ) {
        for (name, version) in wanted(initial) {
            let asked = self.want(name);
            asked.found = version != NOBODY;
        }
        for (name, version) in wanted(initial) {
            let whole = now.find_whole(about(name));
            let known = match version.strip_prefix('+') {
                Some(known) => {
                    known == format!("{:016x}", digest(whole.keys().map(|name| &**name)))
                }
                // Of a peer's, the version of the one that has this name.
                None => !version.is_empty() && version != NOBODY,
            };
            if !known && (version != NOBODY || !whole.is_empty()) {
                self.answer_anew(about(name), now, draft);
                continue;
            }
            self.told(about(name), !whole.is_empty(), draft);
            for entry in whole.into_values() {
                if initial.get(&*entry.name) != Some(&entry.version) {
                    self.tell(&entry, now, draft);
                }
            }
        }
        let gone = initial
            .keys()
            .filter(|name| Question::parse(name).is_none() && now.find(name).is_empty());
        gone.for_each(|name| draft.remove(name.clone()));
    }

    /// Wants a name from now on, and is told what it means.
    pub(super) fn answer(&mut self, name: &str, now: &Set, draft: &mut Draft) {
        let whole = now.find_whole(about(name));
        self.want(name).found = !whole.is_empty();
        if whole.is_empty() {
            draft.remove(name.to_owned());
        }
        for entry in whole.values() {
            self.tell(entry, now, draft);
        }
    }

    /// Is told what has changed of what it wants.
    pub(super) fn follow(
        &mut self,
        changed: &BTreeMap<&Arc<str>, Changed<'_>>,
        now: &Set,
        draft: &mut Draft,
    ) {
        let (mut touched, mut anew) = (BTreeMap::new(), BTreeSet::new());
        for (name, change) in changed {
            let entry = now.get(name);
            let sources = (change.before.iter().copied()).chain(entry.map(|entry| &entry.source));
            let mut names = BTreeSet::new();
            for source in sources.clone() {
                names.extend(now.names_then_and_now(name, source, changed));
            }
            names.retain(|name| self.asked.contains_key(name));
            if names.is_empty() {
                continue;
            }
            // All that others are found through.
            if change.moved && sources.clone().any(Source::leads_to_others) {
                anew.extend(names.iter().cloned());
            }
            let mut found = BTreeSet::new();
            match entry {
                Some(entry) => {
                    found = now.names_of(name, &entry.source);
                    self.tell_by(entry, &found, draft);
                }
                None => draft.remove(name.to_string()),
            }
            for name in names {
                let is_found = found.contains(&name);
                *touched.entry(name).or_default() |= is_found;
            }
        }
        for (name, is_found) in touched {
            if anew.contains(&name) {
                self.answer_anew(&name, now, draft);
            } else {
                let found = is_found || !now.find(&name).is_empty();
                self.told(&name, found, draft);
            }
        }
    }

    fn want(&mut self, name: &str) -> &mut Asked {
        let asked = self.asked.entry(about(name).to_owned()).or_default();
        asked.names.insert(name.to_owned());
        asked
    }

    /// Removed, and told again with everything.
    fn answer_anew(&mut self, about: &str, now: &Set, draft: &mut Draft) {
        let whole = now.find_whole(about);
        if let Some(asked) = self.asked.get_mut(about) {
            asked.found = !whole.is_empty();
            asked
                .names
                .iter()
                .for_each(|name| draft.remove(name.clone()));
        }
        for entry in whole.values() {
            self.tell(entry, now, draft);
        }
    }

    /// A resource, with the names that mean it.
    fn tell(&self, entry: &Arc<Entry>, now: &Set, draft: &mut Draft) {
        let names = now.names_of(&entry.name, &entry.source);
        self.tell_by(entry, &names, draft);
    }

    fn tell_by(&self, entry: &Arc<Entry>, names: &BTreeSet<String>, draft: &mut Draft) {
        let asked = names.iter().filter_map(|name| self.asked.get(name));
        draft.tell(entry.clone(), asked.flat_map(|asked| &asked.names).cloned());
    }

    /// The negative answer, where a name means nobody any more.
    fn told(&mut self, about: &str, found: bool, draft: &mut Draft) {
        if let Some(asked) = self.asked.get_mut(about)
            && std::mem::replace(&mut asked.found, found)
            && !found
        {
            asked
                .names
                .iter()
                .for_each(|name| draft.remove(name.clone()));
        }
    }
}
