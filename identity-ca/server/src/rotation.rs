// SPDX-License-Identifier: Apache-2.0
//! The rotation drill as a state machine, without I/O and without a clock.
//!
//! ```text
//!            root                                leaf
//!   Begun ──────────► RootAdded             Begun
//!     add root, every program                 │
//!     has both in use │                       │
//!                     ▼                       ▼
//!               IssuerSwitched ◄──────────────┘
//!                 new intermediate, generation + 1,
//!                 every program has replaced all its certificates
//!                     │ root                  │ leaf
//!                     ▼                       ▼
//!               RootWithdrawn               done
//!                 only the new root is left, every program has it in use
//!                     ▼
//!                    done
//! ```
//!
//! Each phase is written down before anything waits in it, so a rotation goes on after a restart of the CA. No phase is
//! ever left on a guess: a connected program that does not acknowledge stops the rotation ([`Step::TimedOut`]), and it
//! is taken up again where it stood.

use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// What is replaced.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The issuing authority and every leaf.
    Leaf,
    /// The root too.
    Root,
}

/// How far it has come; in the order of the diagram.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    Begun,
    RootAdded,
    IssuerSwitched,
    RootWithdrawn,
}

/// A rotation as the journal keeps it.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Rotation {
    pub kind: Kind,
    pub phase: Phase,
}

/// What the shell is to do durably, then tell the machine by [`Machine::on_performed`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Action {
    /// Make a new root and add it to the bundle.
    AddRoot,
    /// Make a new issuing authority under the newest root; generation + 1.
    SwitchIssuer,
    /// Leave only the newest root in the bundle.
    WithdrawRoots,
}

/// Whether a program is there.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Presence {
    Connected,
    Gone { since: Instant },
}

/// One consumer of the trust bundle, as it acknowledged last.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Acknowledged {
    pub name: String,
    pub sequence: u64,
    pub generation: u64,
    pub presence: Presence,
}

/// What every consumer is to have in use.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Target {
    pub sequence: u64,
    pub generation: u64,
}

/// How far the present phase has come.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Progress {
    pub acknowledged: usize,
    pub expected: usize,
    pub waiting_for: Vec<String>,
    /// Away for too long to be waited for.
    pub skipped: Vec<String>,
}

/// What comes next.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Step {
    Perform(Action),
    /// Ask again when a consumer changes, at the latest at `until`.
    Wait {
        progress: Progress,
        until: Instant,
    },
    TimedOut(Progress),
    Done(Progress),
}

/// Times of one run.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    pub timeout: Duration,
    pub absent_after: Duration,
    /// Before this moment no phase is left: after its own start the CA does not know yet who is there.
    pub settled: Instant,
}

#[derive(Debug)]
pub struct Machine {
    rotation: Rotation,
    timing: Timing,
    /// When the present phase began to wait.
    entered: Instant,
}

impl Machine {
    /// A new rotation, or one found in the journal.
    pub fn new(rotation: Rotation, timing: Timing, now: Instant) -> Self {
        Self {
            rotation,
            timing,
            entered: now.max(timing.settled),
        }
    }

    pub fn rotation(&self) -> Rotation {
        self.rotation
    }

    /// The shell has done what [`Step::Perform`] asked for, and written `rotation` down.
    pub fn on_performed(&mut self, rotation: Rotation, now: Instant) {
        self.rotation = rotation;
        self.entered = now.max(self.timing.settled);
    }

    pub fn poll(&self, target: Target, consumers: &[Acknowledged], now: Instant) -> Step {
        if self.rotation.phase == Phase::Begun {
            return Step::Perform(match self.rotation.kind {
                Kind::Leaf => Action::SwitchIssuer,
                Kind::Root => Action::AddRoot,
            });
        }
        let (progress, next_absent) = self.progress(target, consumers, now);
        let deadline = self.entered + self.timing.timeout;
        if now < self.timing.settled {
            return Step::Wait {
                progress,
                until: self.timing.settled,
            };
        }
        if progress.waiting_for.is_empty() {
            return match (self.rotation.phase, self.rotation.kind) {
                (Phase::Begun | Phase::RootAdded, _) => Step::Perform(Action::SwitchIssuer),
                (Phase::IssuerSwitched, Kind::Root) => Step::Perform(Action::WithdrawRoots),
                (Phase::IssuerSwitched, Kind::Leaf) | (Phase::RootWithdrawn, _) => {
                    Step::Done(progress)
                }
            };
        }
        if now >= deadline {
            return Step::TimedOut(progress);
        }
        Step::Wait {
            progress,
            until: next_absent.map_or(deadline, |at| at.min(deadline)),
        }
    }

    /// Also when the next consumer that is away stops being waited for.
    fn progress(
        &self,
        target: Target,
        consumers: &[Acknowledged],
        now: Instant,
    ) -> (Progress, Option<Instant>) {
        let mut progress = Progress::default();
        let mut next_absent = None;
        for consumer in consumers {
            let has = consumer.sequence >= target.sequence
                && (self.rotation.phase != Phase::IssuerSwitched
                    || consumer.generation >= target.generation);
            if has {
                progress.expected += 1;
                progress.acknowledged += 1;
                continue;
            }
            if let Presence::Gone { since } = consumer.presence {
                let absent = since + self.timing.absent_after;
                if now >= absent {
                    progress.skipped.push(consumer.name.clone());
                    continue;
                }
                next_absent = Some(next_absent.map_or(absent, |at: Instant| at.min(absent)));
            }
            progress.expected += 1;
            progress.waiting_for.push(consumer.name.clone());
        }
        (progress, next_absent)
    }
}

impl Rotation {
    pub fn begin(kind: Kind) -> Self {
        Self {
            kind,
            phase: Phase::Begun,
        }
    }

    /// As it stands once `action` is done.
    pub fn after(self, action: Action) -> Self {
        Self {
            phase: match action {
                Action::AddRoot => Phase::RootAdded,
                Action::SwitchIssuer => Phase::IssuerSwitched,
                Action::WithdrawRoots => Phase::RootWithdrawn,
            },
            ..self
        }
    }
}

#[cfg(test)]
#[path = "rotation_tests.rs"]
mod tests;
