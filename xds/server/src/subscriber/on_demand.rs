// SPDX-License-Identifier: Apache-2.0
//! What a client is told that does not want everything: what is meant by the names it has asked for, kept up to date.
//!
//! A name means the resources that it finds and, where that is a service, those behind it. Each resource is told with all of
//! the client's names that mean it now, so that a client knows of one that none means any more: it may forget it, and is
//! told no more of it. What a name means is not remembered here, only whether it means anything: a stream costs as much as
//! was asked for on it, however many endpoints a service has.

use super::draft::Draft;
use crate::published::{Entry, Set, Source};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// What a client that comes again says of a name that meant nothing.
const NOBODY: &str = "-";

#[derive(Debug, Default)]
pub(super) struct OnDemand {
    names: BTreeMap<String, Found>,
}

/// Did the name mean anything when the client was last told?
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Found {
    Nobody,
    Somebody,
}

impl Found {
    fn of(found: bool) -> Self {
        if found { Self::Somebody } else { Self::Nobody }
    }
}

impl OnDemand {
    pub(super) fn names(&self) -> usize {
        self.names.len()
    }

    pub(super) fn forget(&mut self, name: &str) {
        self.names.remove(name);
    }

    /// What a client said it held and had asked for before it came here is what it wants now: resources' names with the
    /// versions it has of them, other names with any version. An empty version: it waits for an answer.
    pub(super) fn begin(
        &mut self,
        initial: BTreeMap<String, String>,
        now: &Set,
        draft: &mut Draft,
    ) {
        for (name, version) in &initial {
            let found = Found::of(version != NOBODY);
            self.names.insert(name.clone(), found);
        }
        for (name, version) in &initial {
            if version.is_empty() {
                self.answer(name.clone(), now, draft);
                continue;
            }
            let whole = now.find_whole(name);
            self.told(name, !whole.is_empty(), draft);
            for entry in whole.into_values() {
                if initial.get(&*entry.name) != Some(&entry.version) {
                    self.tell(&entry, now, draft);
                }
            }
        }
    }

    /// Wants a name from now on, and is told what it means.
    pub(super) fn answer(&mut self, name: String, now: &Set, draft: &mut Draft) {
        let whole = now.find_whole(&name);
        self.names
            .insert(name.clone(), Found::of(!whole.is_empty()));
        if whole.is_empty() {
            draft.remove(name);
        }
        for entry in whole.into_values() {
            self.tell(&entry, now, draft);
        }
    }

    /// Is told what has changed of what it wants.
    pub(super) fn follow(
        &mut self,
        changed: BTreeMap<&Arc<str>, Vec<&Source>>,
        now: &Set,
        draft: &mut Draft,
    ) {
        for (name, before) in changed {
            let entry = now.get(name);
            let sources = before.into_iter().chain(entry.map(|entry| &entry.source));
            let mut names = BTreeSet::new();
            for source in sources {
                names.extend(now.names_of(name, source));
            }
            names.retain(|name| self.names.contains_key(name));
            if names.is_empty() {
                continue;
            }
            match entry {
                Some(entry) if matches!(entry.source, Source::Service(_)) => {
                    self.tell(entry, now, draft);
                    for name in &names {
                        for behind in now.find_whole(name).values() {
                            self.tell(behind, now, draft);
                        }
                    }
                }
                Some(entry) => {
                    self.tell(entry, now, draft);
                    for owner in now.owners(entry) {
                        self.tell(owner, now, draft);
                    }
                }
                None => draft.remove(name.to_string()),
            }
            for name in names {
                let found = !now.find(&name).is_empty();
                self.told(&name, found, draft);
            }
        }
    }

    /// A resource, with the names that mean it.
    fn tell(&self, entry: &Arc<Entry>, now: &Set, draft: &mut Draft) {
        let names = now.names_of(&entry.name, &entry.source).into_iter();
        draft.tell(
            entry.clone(),
            names.filter(|name| self.names.contains_key(name)),
        );
    }

    /// The negative answer, where a name means nobody any more.
    fn told(&mut self, name: &str, found: bool, draft: &mut Draft) {
        if let Some(before) = self.names.get_mut(name)
            && std::mem::replace(before, Found::of(found)) == Found::Somebody
            && !found
        {
            draft.remove(name.to_owned());
        }
    }
}
