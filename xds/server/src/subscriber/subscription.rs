// SPDX-License-Identifier: Apache-2.0
use super::draft::Draft;
use super::on_demand::{OnDemand, wanted_at_first};
use crate::published::{Entry, Set};
use crate::response::Named;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// One type on one stream.
#[derive(Debug)]
pub(super) struct Subscription {
    wildcard: bool,
    /// Of everything, only workloads, and of their changes only those that concern whoever captures them.
    captured_only: bool,
    /// What the client said it held when the stream began; empty once the first response is made.
    initial: BTreeMap<String, String>,
    /// What a client has been sent. `None` before the first response.
    sent: Option<Sent>,
    /// What a client wants that does not want everything.
    on_demand: OnDemand,
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
    pub(super) fn new(
        wildcard: bool,
        captured_only: bool,
        initial: BTreeMap<String, String>,
    ) -> Self {
        Self {
            wildcard,
            captured_only,
            initial,
            sent: None,
            on_demand: OnDemand::default(),
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
            } else {
                self.asked.remove(name);
                self.initial.remove(name);
                self.on_demand.forget(name);
            }
        }
    }

    /// Names that cost memory as long as the stream lives.
    pub(super) fn names(&self) -> usize {
        let initial = match self.wildcard {
            true => 0,
            false => wanted_at_first(&self.initial),
        };
        self.on_demand.names() + self.asked.len() + initial
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
            match self.sent {
                _ if self.wildcard => self.differences(now, &mut draft)?,
                None => {
                    let initial = std::mem::take(&mut self.initial);
                    self.on_demand.begin(&initial, now, &mut draft);
                }
                Some(sent) => {
                    let changed = now.changed_since(sent.sequence).ok_or(TooFarBehind)?;
                    self.on_demand.follow(&changed, now, &mut draft);
                }
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
            if self.wildcard {
                draft.answer(&name, now.find(&name));
            } else {
                self.on_demand.answer(&name, now, &mut draft);
            }
        }
        if draft.is_empty() && !first && !answers {
            return Ok(None);
        }
        if may_push {
            self.awaiting = Some(nonce.to_owned());
        }
        let (resources, removed) = draft.finish();
        Ok(Some(Push {
            number: said,
            resources,
            removed,
        }))
    }

    /// Wildcard: from what was sent, or what the client began with, to now.
    fn differences(&mut self, now: &Arc<Set>, draft: &mut Draft) -> Result<(), TooFarBehind> {
        let Some(sent) = self.sent else {
            let initial = std::mem::take(&mut self.initial);
            let wanted = |entry: &&Arc<Entry>| !self.captured_only || entry.source.is_workload();
            for entry in now.iter().filter(wanted) {
                if initial.get(&*entry.name) != Some(&entry.version) {
                    draft.push(entry);
                }
            }
            let gone = initial.into_keys().filter(|name| now.get(name).is_none());
            gone.for_each(|name| draft.remove(name));
            return Ok(());
        };
        let changed = now.changed_since(sent.sequence).ok_or(TooFarBehind)?;
        for (name, change) in changed {
            if self.captured_only && !change.captured {
                continue;
            }
            match now.get(name) {
                Some(entry) => draft.push(entry),
                None => draft.remove(name.to_string()),
            }
        }
        Ok(())
    }
}
