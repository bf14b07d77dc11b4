// SPDX-License-Identifier: Apache-2.0
use podveil_model::{Epoch, Mode, Stage, Uid};
use std::collections::BTreeMap;

/// The way of one workload into the mesh and out of it.
///
/// ```text
///        wanted          ready             published            applied by all
///   None ─────▶ Wanted ──────▶ Capturable ─────────▶ Announced ──────────────▶ Mandatory
///     ▲           │                │                  │     ▲                      │
///     ├───────────┴────────────────┘                  ▼     │ wanted again         │
///     └──────────────────────────────────────────── Draining ◀──────────────────────┘
///        no longer wanted                          applied by all: None
/// ```
///
/// Each stage waits until it has been published, so that an answer to it is not an answer to the stage before. That a
/// node stops being ready changes nothing: only the label takes a workload out.
///
/// The epoch's first part changes with the decision (label, mode, ports), the second follows from the stage alone. So
/// a replica that lags is known by it, and one that knows less than the workload's own node learns from it
/// ([`Enrolment::adopt`]).
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Enrolment {
    stage: Stage,
    epoch: Epoch,
    /// The snapshot that first held this stage; `None`: not published yet.
    since: Option<u64>,
}

/// Where a workload stands in what its own node has in use.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Held {
    pub stage: Stage,
    pub epoch: Epoch,
}

/// What decides the next step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Facts {
    /// By its labels it should be enrolled.
    pub wanted: bool,
    /// Both modules of its node hold it ready, having seen that it is wanted.
    pub ready: bool,
    /// Every node that can be heard has the snapshot of this stage in use.
    pub applied: bool,
}

impl Enrolment {
    pub(crate) fn new(resource_version: u64) -> Self {
        Self::restored(Stage::None, resource_version)
    }

    pub(crate) fn restored(stage: Stage, resource_version: u64) -> Self {
        Self {
            stage,
            epoch: Epoch {
                resource_version,
                stage: ordinal(stage),
            },
            since: None,
        }
    }

    pub(crate) fn stage(&self) -> Stage {
        self.stage
    }

    pub(crate) fn epoch(&self) -> Epoch {
        self.epoch
    }

    pub(crate) fn since(&self) -> Option<u64> {
        self.since
    }

    /// Waits for something other than a change of the cluster?
    pub(crate) fn is_moving(&self) -> bool {
        !matches!(self.stage, Stage::None | Stage::Mandatory)
    }

    /// Waits until every node has its stage in use?
    pub(crate) fn awaits_all(&self) -> bool {
        self.stage.waits_for_nodes()
    }

    /// The deciding object has changed.
    pub(crate) fn decided(&mut self, version: u64) {
        self.epoch.resource_version = version.max(self.epoch.resource_version + 1);
    }

    /// Takes over where the workload's node knows more, from another replica or from before a restart. `known` is how new
    /// the objects are that `wanted` was decided by: what was decided by newer ones waits until they are here. `fresh`:
    /// this replica has published nothing yet, and its own stage says nothing.
    pub(crate) fn adopt(&mut self, held: Held, wanted: bool, known: u64, fresh: bool) -> bool {
        let before = (self.stage, self.epoch);
        if held.epoch.resource_version > known || !(fresh || held.epoch > self.epoch) {
            return false;
        }
        let same_way = held.stage.wants_capture() == self.stage.wants_capture();
        let further = ordinal(held.stage) > ordinal(self.stage);
        if further || !same_way || (fresh && !wanted) {
            self.stage = held.stage;
        }
        let newest = if fresh && before.0 == Stage::None {
            // Nothing was saved: the other replicas' count is gone on with, so that theirs and ours can be compared.
            held.epoch.resource_version
        } else {
            self.epoch.resource_version.max(held.epoch.resource_version)
        };
        self.epoch = Epoch {
            resource_version: newest,
            stage: ordinal(self.stage),
        };
        if self.stage.wants_capture() != wanted {
            // Decided again, by what is known here.
            self.decided(known);
        }
        let changed = (self.stage, self.epoch) != before;
        if changed {
            self.since = None;
        }
        changed
    }

    pub(crate) fn published(&mut self, number: u64) {
        self.since.get_or_insert(number);
    }

    /// Takes one step if there is one to take.
    pub(crate) fn step(&mut self, facts: Facts) -> bool {
        let next = match (self.stage, facts.wanted) {
            (Stage::None, true) => Stage::Wanted,
            (Stage::Wanted, true) if facts.ready => Stage::Capturable,
            (Stage::Capturable, true) if self.since.is_some() => Stage::Announced,
            (Stage::Announced, true) if facts.applied => Stage::Mandatory,
            // Nobody tunnels to it yet.
            (Stage::Wanted | Stage::Capturable, false) => Stage::None,
            (Stage::Announced | Stage::Mandatory, false) => Stage::Draining,
            // Everybody still tunnels to it.
            (Stage::Draining, true) => Stage::Announced,
            (Stage::Draining, false) if facts.applied => Stage::None,
            _ => return false,
        };
        self.stage = next;
        self.epoch.stage = ordinal(next);
        self.since = None;
        true
    }
}

/// How many steps the stage is from the decision that leads to it.
fn ordinal(stage: Stage) -> u32 {
    match stage {
        Stage::Wanted | Stage::Draining => 1,
        Stage::Capturable | Stage::None => 2,
        Stage::Announced => 3,
        Stage::Mandatory => 4,
    }
}

/// What must outlive a restart of the controller: without it, workloads would be walked in again from the start, and a
/// label taken off meanwhile would not be drained.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Saved {
    /// No epoch so far is newer.
    pub version: u64,
    /// All that are not [`Stage::None`].
    pub workloads: BTreeMap<Uid, SavedWorkload>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct SavedWorkload {
    pub stage: Stage,
    pub mode: Mode,
    /// [`Epoch::resource_version`]; the rest of the epoch follows from the stage.
    pub resource_version: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_stage_leads_where_the_diagram_says() {
        use Stage::{Announced, Capturable, Draining, Mandatory, None, Wanted};
        // Stage; wanted, ready, applied; the next one.
        let (yes, no) = (true, false);
        for (from, wanted, ready, applied, to) in [
            (None, no, yes, yes, None),
            (None, yes, no, no, Wanted),
            (Wanted, yes, no, yes, Wanted),
            (Wanted, yes, yes, no, Capturable),
            (Wanted, no, yes, yes, None),
            (Capturable, yes, no, no, Announced),
            (Capturable, no, yes, yes, None),
            (Announced, yes, yes, no, Announced),
            (Announced, yes, no, yes, Mandatory),
            (Announced, no, no, no, Draining),
            (Mandatory, yes, no, no, Mandatory),
            (Mandatory, no, yes, yes, Draining),
            (Draining, no, yes, no, Draining),
            (Draining, no, no, yes, None),
            (Draining, yes, no, no, Announced),
        ] {
            let mut enrolment = Enrolment::restored(from, 7);
            enrolment.published(1);
            let facts = Facts {
                wanted,
                ready,
                applied,
            };
            assert_eq!(enrolment.step(facts), from != to, "{from} {facts:?}");
            assert_eq!(enrolment.stage(), to, "{from} {facts:?}");
            assert_eq!(enrolment.since().is_none(), from != to);
        }
    }

    #[test]
    fn epochs_only_grow() {
        let mut enrolment = Enrolment::new(7);
        let mut last = enrolment.epoch();
        for wanted in [true, false, true] {
            // Even when the version did not grow.
            enrolment.decided(7);
            for _ in 0..6 {
                let facts = Facts {
                    wanted,
                    ready: true,
                    applied: true,
                };
                if enrolment.step(facts) {
                    assert!(
                        enrolment.epoch() > last,
                        "{} after {last}",
                        enrolment.epoch()
                    );
                    last = enrolment.epoch();
                    enrolment.published(1);
                }
            }
        }
    }
}
