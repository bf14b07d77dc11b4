// SPDX-License-Identifier: Apache-2.0
use crate::published::{Entry, Set};
use crate::response::Named;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// One type on one stream.
#[derive(Debug)]
pub(super) struct Subscription {
    wildcard: bool,
    /// What the client said it held when the stream began; empty once the first response is made.
    initial: BTreeMap<String, String>,
    /// What a client has been sent. `None` before the first response.
    sent: Option<Sent>,
    /// On demand: what each name meant when it was last answered.
    names: BTreeMap<String, Vec<Arc<Entry>>>,
    /// Names to be answered whether anything changed or not.
    asked: BTreeSet<String>,
    /// Nonce of the push that has not been answered.
    awaiting: Option<String>,
}

/// Up to where a client has been sent everything: it costs nothing to remember, whatever it holds.
#[derive(Clone, Copy, Debug)]
struct Sent {
    /// Of the set.
    sequence: u64,
    /// Of the snapshot.
    number: u64,
}

/// More has changed since than is remembered. A new stream begins with what the client says it holds.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("too far behind; come again")]
pub(crate) struct TooFarBehind;

pub(super) struct Push {
    pub(super) number: u64,
    pub(super) resources: Vec<Named>,
    pub(super) removed: Vec<String>,
}

impl Subscription {
    pub(super) fn new(wildcard: bool, initial: BTreeMap<String, String>) -> Self {
        Self {
            wildcard,
            initial,
            sent: None,
            names: BTreeMap::new(),
            asked: BTreeSet::new(),
            awaiting: None,
        }
    }

    pub(super) fn answered(&mut self, nonce: &str) {
        if self.awaiting.as_deref() == Some(nonce) {
            self.awaiting = None;
        }
    }

    pub(super) fn subscribe(&mut self, names: Vec<String>) {
        for name in names {
            if name == "*" {
                if !self.wildcard {
                    self.wildcard = true;
                    // Of what it did not ask for it has seen nothing.
                    self.sent = None;
                }
            } else {
                self.asked.insert(name);
            }
        }
    }

    pub(super) fn unsubscribe(&mut self, names: &[String]) {
        for name in names {
            if name == "*" {
                self.wildcard = false;
                // What a client held on demand before it came here is what it wants now.
                if self.sent.is_none() {
                    self.asked
                        .extend(std::mem::take(&mut self.initial).into_keys());
                }
            } else {
                self.asked.remove(name);
                self.names.remove(name);
            }
        }
    }

    /// Names that cost memory as long as the stream lives.
    pub(super) fn names(&self) -> usize {
        let initial = if self.wildcard { 0 } else { self.initial.len() };
        self.names.len() + self.asked.len() + initial
    }

    pub(super) fn may_send(&self, now: &Arc<Set>) -> bool {
        let changed = (self.sent).is_none_or(|sent| sent.sequence != now.sequence());
        !self.asked.is_empty() || (changed && self.awaiting.is_none())
    }

    /// Has a first response been made, and is nothing on the way?
    pub(super) fn is_settled(&self) -> bool {
        self.sent.is_some() && self.awaiting.is_none()
    }

    /// # Errors
    /// [`TooFarBehind`]: the stream must end.
    pub(super) fn poll(
        &mut self,
        now: &Arc<Set>,
        number: u64,
        nonce: &str,
    ) -> Result<Option<Push>, TooFarBehind> {
        if !self.may_send(now) {
            return Ok(None);
        }
        let first = self.sent.is_none();
        let may_push = self.awaiting.is_none();
        let mut draft = Draft::default();
        let mut said = number;
        if may_push {
            if self.wildcard {
                self.differences(now, &mut draft)?;
            } else {
                self.begin_on_demand(now);
                self.changed_names(now, &mut draft);
            }
            self.sent = Some(Sent {
                sequence: now.sequence(),
                number,
            });
        } else if self.wildcard
            && let Some(sent) = &self.sent
        {
            // An answer between two pushes must not claim the newer snapshot: who puts it into use has not seen the
            // rest of it.
            said = sent.number;
        }
        let answers = !self.asked.is_empty();
        for name in std::mem::take(&mut self.asked) {
            let meant = now.find(&name);
            draft.answer(&name, &meant);
            if !self.wildcard {
                self.names.insert(name, meant);
            }
        }
        if draft.is_empty() && !first && !answers {
            return Ok(None);
        }
        if may_push {
            self.awaiting = Some(nonce.to_owned());
        }
        Ok(Some(draft.finish(said)))
    }

    /// Wildcard: from what was sent, or what the client began with, to now.
    fn differences(&mut self, now: &Arc<Set>, draft: &mut Draft) -> Result<(), TooFarBehind> {
        let Some(sent) = self.sent else {
            let initial = std::mem::take(&mut self.initial);
            for entry in now.iter() {
                if initial.get(&*entry.name) != Some(&entry.version) {
                    draft.push(entry);
                }
            }
            let gone = initial.into_keys().filter(|name| now.get(name).is_none());
            draft.removed.extend(gone);
            return Ok(());
        };
        for name in now.changed_since(sent.sequence).ok_or(TooFarBehind)? {
            match now.get(name) {
                Some(entry) => draft.push(entry),
                None => {
                    draft.removed.insert(name.to_string());
                }
            }
        }
        Ok(())
    }

    /// What a client held on demand before it came here is what it wants now; what differs is to be answered.
    fn begin_on_demand(&mut self, now: &Arc<Set>) {
        for (name, version) in std::mem::take(&mut self.initial) {
            let meant = now.find(&name);
            if matches!(&meant[..], [one] if one.version == version) {
                self.names.insert(name, meant);
            } else {
                self.asked.insert(name);
            }
        }
    }

    /// On demand: the names that mean something else than when they were last answered.
    fn changed_names(&mut self, now: &Arc<Set>, draft: &mut Draft) {
        for (name, meant) in &mut self.names {
            let means = now.find(name);
            let same = means.len() == meant.len()
                && means
                    .iter()
                    .zip(meant.iter())
                    .all(|(a, b)| Arc::ptr_eq(a, b));
            if same {
                continue;
            }
            let gone = meant.iter().filter(|old| now.get(&old.name).is_none());
            draft.removed.extend(gone.map(|old| old.name.to_string()));
            draft.answer(name, &means);
            *meant = means;
        }
    }
}

/// A response being put together: each resource once, with every name it was asked by.
#[derive(Default)]
struct Draft {
    /// Those that changed, each once.
    pushed: Vec<Arc<Entry>>,
    /// Those that were asked for, whether they changed or not.
    answered: BTreeMap<Arc<str>, (Arc<Entry>, BTreeSet<String>)>,
    removed: BTreeSet<String>,
}

impl Draft {
    fn push(&mut self, entry: &Arc<Entry>) {
        self.pushed.push(entry.clone());
    }

    /// The negative answer is the key itself among the removed.
    fn answer(&mut self, key: &str, means: &[Arc<Entry>]) {
        if means.is_empty() {
            self.removed.insert(key.to_owned());
        }
        for entry in means {
            let (_, aliases) = (self.answered.entry(entry.name.clone()))
                .or_insert_with(|| (entry.clone(), BTreeSet::new()));
            aliases.extend((*key != *entry.name).then(|| key.to_owned()));
        }
    }

    fn is_empty(&self) -> bool {
        self.pushed.is_empty() && self.answered.is_empty() && self.removed.is_empty()
    }

    fn finish(mut self, number: u64) -> Push {
        let named = |(entry, aliases): (Arc<Entry>, BTreeSet<String>)| Named {
            entry,
            aliases: aliases.into_iter().collect(),
        };
        // Pushed and asked for are of the same snapshot.
        let pushed = self.pushed.into_iter().map(|entry| {
            let answered = self.answered.remove(&entry.name);
            named(answered.unwrap_or_else(|| (entry, BTreeSet::new())))
        });
        let mut resources: Vec<Named> = pushed.collect();
        resources.extend(self.answered.into_values().map(named));
        Push {
            number,
            resources,
            removed: self.removed.into_iter().collect(),
        }
    }
}
