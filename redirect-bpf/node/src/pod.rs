// SPDX-License-Identifier: Apache-2.0
use crate::{Obstacle, PodCondition};
use podveil_apply::Observed;
use podveil_plan::{Capture, Phase};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Between two looks at what a captured pod has open.
const CHECK: Duration = Duration::from_secs(3);
/// The same while the last connection of a released pod is waited for.
const CHECK_RELEASING: Duration = Duration::from_millis(250);
/// Between two comparisons of a pod's rules with what was written.
const VERIFY: Duration = Duration::from_secs(9);
/// A released pod goes on taking tunnels for so long at least: peers hear of its release at different moments, and one
/// that has not yet must not find a closed port.
const RELEASE_GRACE: Duration = Duration::from_secs(3);
/// A pod is bound to its node well before it has a sandbox.
const FIRST_RETRY: Duration = Duration::from_millis(10);
const LAST_RETRY: Duration = Duration::from_secs(5);
/// For a pod whose namespace is not there yet. Capture takes less than the kubelet takes from a sandbox to the word of its
/// address, if it begins at once.
const LAST_FIND: Duration = Duration::from_millis(50);
/// The same for one that has been waited for in vain: a volume that is slow to come, or something is wrong.
const LAST_LATE_FIND: Duration = Duration::from_secs(1);
/// A sandbox is made well within this. A pod whose namespace has not been found by then is looked for less often, and a
/// person is told what may be wrong with it.
const FIND_PATIENCE: Duration = Duration::from_secs(20);

/// One pod on its way under capture and out again.
///
/// ```text
///          find           listen              the proxy acknowledges          apply, verify
///   Lost ────────> Found ────────> Listening ───────────────────────> Accepted ────────────> Captured ─┐ fence, check
///    ^               │               offered                                                │  ^  └─────┘
///    │ wanted        │ neither wanted nor anything of ours              not wanted: release │  │ wanted
///    │               v                                                                      v  │
///    └────────── Forgotten <──── remove ──── nothing captured, or bound passed ──────── Releasing ─┐ check
///                                                                                           └──────┘
/// ```
///
/// The boxes are not stored: the machine compares what should be with what is known to be, and names the one next piece
/// of work, so that a restart, a proxy that went away or rules that somebody flushed are no cases of their own. A piece
/// that fails is tried again with a growing pause.
#[derive(Debug)]
pub struct Pod {
    goal: Option<Capture>,
    exists: bool,
    place: Place,
    listening: Listening,
    acceptance: Acceptance,
    standing: Standing,
    verified: bool,
    /// Generation of the fence that stands.
    fence: u64,
    observed: Observed,
    /// Since when its new connections are captured, as far as this process has seen; and when that was verified last.
    captured_since: Option<Instant>,
    verified_last: Option<Instant>,
    /// How often what had stood was found changed, and was written again.
    repairs: u64,
    releasing_since: Option<Instant>,
    busy: bool,
    /// Generation of the fence that it is being captured with: it stands a moment later, whatever has changed meanwhile.
    applying: Option<u64>,
    failure: Option<(Obstacle, Arc<str>)>,
    missing_since: Option<Instant>,
    retry_at: Option<Instant>,
    pause: Duration,
    check_at: Instant,
    verify_at: Instant,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Place {
    Lost,
    Known,
    Forgotten,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Listening {
    No,
    Yes,
    /// Not to be had, and not needed to let the pod go.
    GivenUp,
}

/// What the connected proxy said to the offer.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Acceptance {
    None,
    Refused(Arc<str>),
    Taken,
}

#[derive(Clone, Debug, Eq, PartialEq)]
enum Standing {
    Nothing,
    /// Something of ours that is to be written again.
    Something,
    Exactly(Capture),
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Action {
    Find,
    Listen,
    Apply(Capture),
    ChangeFence,
    Check {
        verify: Option<Capture>,
    },
    Remove,
    /// Take the offer back, close the listeners, let go of the namespace.
    Forget,
}

/// How a piece of work ended.
#[derive(Debug)]
pub enum Event {
    Found {
        stands: bool,
    },
    Missing {
        reason: String,
        obstacle: Obstacle,
    },
    Listening,
    Applied {
        capture: Capture,
        fence: u64,
    },
    FenceChanged {
        fence: u64,
    },
    Checked {
        observed: Observed,
        verified: bool,
    },
    /// What had been written does not stand as it was.
    Drifted {
        reason: String,
    },
    /// Another namespace has taken the place of the one held.
    Replaced,
    Removed,
    Forgotten,
    Failed {
        reason: String,
    },
    /// Another process has a port that the listeners need.
    Taken {
        reason: String,
    },
}

#[derive(Debug, Eq, PartialEq)]
pub enum Next {
    Do(Action),
    At(Instant),
    Idle,
}

impl Pod {
    pub fn new(now: Instant) -> Self {
        Self {
            goal: None,
            exists: true,
            place: Place::Lost,
            listening: Listening::No,
            acceptance: Acceptance::None,
            standing: Standing::Nothing,
            verified: false,
            fence: 0,
            observed: Observed::default(),
            captured_since: None,
            verified_last: None,
            repairs: 0,
            releasing_since: None,
            busy: false,
            applying: None,
            failure: None,
            missing_since: None,
            retry_at: None,
            pause: FIRST_RETRY,
            check_at: now,
            verify_at: now,
        }
    }

    /// Is it to be captured?
    pub fn is_wanted(&self) -> bool {
        self.goal.is_some()
    }

    /// Something of ours stands in the namespace, as far as is known.
    pub fn stands(&self) -> bool {
        self.standing != Standing::Nothing
    }

    /// `None`: let it go. `exists`: false for a pod that is no more, whose connections need not be waited for.
    pub fn set_goal(&mut self, goal: Option<Capture>, exists: bool) {
        if self.goal == goal && self.exists == exists {
            return;
        }
        if goal.is_some() && self.place == Place::Forgotten {
            self.place = Place::Lost;
        }
        if goal.is_some() && self.listening == Listening::GivenUp {
            self.listening = Listening::No;
        }
        self.goal = goal;
        self.exists = exists;
        self.verified = false;
        self.try_now();
    }

    pub fn set_acceptance(&mut self, acceptance: Acceptance) {
        self.acceptance = acceptance;
    }

    /// Another proxy is there, which may have the listeners that could not be had.
    pub fn proxy_came(&mut self) {
        if self.listening != Listening::Yes && self.place == Place::Known {
            self.listening = Listening::No;
            self.failure = None;
        }
        self.try_now();
    }

    /// Something has happened to its namespace, or to what was waited for.
    pub fn look_now(&mut self, now: Instant) {
        self.check_at = now;
        // Another address, and capture is another one.
        self.verify_at = now;
        self.try_now();
    }

    fn try_now(&mut self) {
        self.retry_at = None;
        self.pause = FIRST_RETRY;
    }

    /// Should the proxy have it?
    pub fn is_offered(&self) -> bool {
        self.listening == Listening::Yes
            && self.place == Place::Known
            && (self.goal.is_some() || self.stands())
    }

    /// Should a proxy that has it from before go on serving it, although it cannot be offered now?
    pub fn is_kept(&self) -> bool {
        let lost = self.place == Place::Lost;
        !self.is_offered()
            && self.place != Place::Forgotten
            && (self.goal.is_some() || self.stands() || lost)
    }

    /// Is it still open whether it will be offered? `false` as well when that has failed for now.
    pub fn is_undecided(&self) -> bool {
        let needed = self.goal.is_some() || self.stands();
        self.failure.is_none()
            && (self.place == Place::Lost || (needed && self.listening == Listening::No))
    }

    /// May its fence still be that of the process before this one? `false` as well when the work on it has failed for now.
    pub fn is_unsettled(&self) -> bool {
        self.failure.is_none()
            && (self.place == Place::Lost || self.standing == Standing::Something)
    }

    pub fn is_forgotten(&self) -> bool {
        self.place == Place::Forgotten
    }

    /// The generation of the oldest fence that is in use or will be in a moment; `None` where none is needed or none can be had.
    pub fn fence(&self) -> Option<u64> {
        let stands = matches!(&self.standing, Standing::Exactly(capture) if capture.phase == Phase::Capturing);
        let held = (stands && self.failure.is_none()).then_some(self.fence);
        held.into_iter().chain(self.applying).min()
    }

    pub fn observed(&self) -> Observed {
        self.observed
    }

    pub fn captured_since(&self) -> Option<Instant> {
        self.captured_since
    }

    pub fn verified_last(&self) -> Option<Instant> {
        self.verified_last
    }

    pub fn repairs(&self) -> u64 {
        self.repairs
    }

    /// The one piece of work to do now, if there is one. It is under way until its [`Event`] has come.
    pub fn next(&mut self, now: Instant, fence: u64, release_bound: Duration) -> Next {
        if self.busy {
            return Next::Idle;
        }
        if let Some(at) = self.retry_at.filter(|at| *at > now) {
            return Next::At(at);
        }
        match self.action(now, fence, release_bound) {
            Some(action) => {
                self.busy = true;
                let captures =
                    matches!(&action, Action::Apply(capture) if capture.phase == Phase::Capturing);
                self.applying = captures.then_some(fence);
                Next::Do(action)
            }
            None if self.stands() => Next::At(self.check_at),
            None => Next::Idle,
        }
    }

    fn action(&self, now: Instant, fence: u64, release_bound: Duration) -> Option<Action> {
        match self.place {
            Place::Forgotten => return None,
            Place::Lost => return Some(Action::Find),
            Place::Known => {}
        }
        let due = now >= self.check_at;
        let Some(goal) = &self.goal else {
            return match &self.standing {
                Standing::Nothing => Some(Action::Forget),
                _ if !self.exists => Some(Action::Remove),
                // The proxy must keep the pod as long as it carries a connection of it.
                _ if self.listening == Listening::No => Some(Action::Listen),
                Standing::Exactly(capture) if capture.phase == Phase::Releasing => {
                    let since = self.releasing_since.unwrap_or(now);
                    let elapsed = now.saturating_duration_since(since);
                    let last = self.verified && self.observed.captured == 0;
                    if elapsed >= release_bound || (last && elapsed >= RELEASE_GRACE) {
                        Some(Action::Remove)
                    } else {
                        due.then(|| Action::Check {
                            verify: Some(capture.clone()),
                        })
                    }
                }
                _ => Some(Action::Apply(Capture::release())),
            };
        };
        if self.listening != Listening::Yes {
            return Some(Action::Listen);
        }
        match &self.standing {
            Standing::Exactly(capture) if capture == goal => {
                if self.fence != fence {
                    return Some(Action::ChangeFence);
                }
                due.then(|| Action::Check {
                    verify: (!self.verified || now >= self.verify_at).then(|| goal.clone()),
                })
            }
            Standing::Something => Some(Action::Apply(goal.clone())),
            Standing::Exactly(capture) if capture.phase == Phase::Capturing => {
                Some(Action::Apply(goal.clone()))
            }
            // From now on new connections go to the proxy, so it must have said that it takes them.
            Standing::Exactly(_) | Standing::Nothing => {
                (self.acceptance == Acceptance::Taken).then(|| Action::Apply(goal.clone()))
            }
        }
    }

    pub fn on(&mut self, now: Instant, event: Event) {
        self.busy = false;
        self.applying = None;
        match event {
            Event::Failed { reason } => {
                self.give_up_listening();
                return self.fail(now, Obstacle::Work, &reason, LAST_RETRY);
            }
            Event::Taken { reason } => {
                self.give_up_listening();
                return self.fail(now, Obstacle::PortTaken, &reason, LAST_RETRY);
            }
            Event::Missing { .. } if self.goal.is_none() => self.forget(),
            Event::Missing { reason, obstacle } => {
                let since = *self.missing_since.get_or_insert(now);
                let passes =
                    obstacle.may_pass() && now.saturating_duration_since(since) < FIND_PATIENCE;
                return match passes {
                    true => self.fail(now, Obstacle::Work, &reason, LAST_FIND),
                    false if obstacle.may_pass() => {
                        self.fail(now, obstacle, &reason, LAST_LATE_FIND)
                    }
                    false => self.fail(now, obstacle, &reason, LAST_RETRY),
                };
            }
            Event::Found { stands } => {
                self.place = Place::Known;
                self.missing_since = None;
                self.standing = if stands {
                    Standing::Something
                } else {
                    Standing::Nothing
                };
            }
            Event::Listening => self.listening = Listening::Yes,
            Event::Applied { capture, fence } => {
                self.captured_since = match capture.phase {
                    Phase::Capturing => self.captured_since.or(Some(now)),
                    Phase::Releasing => None,
                };
                self.releasing_since = match capture.phase {
                    Phase::Capturing => None,
                    // Written again, it does not begin again.
                    Phase::Releasing => self.releasing_since.or(Some(now)),
                };
                self.standing = Standing::Exactly(capture);
                self.fence = fence;
                self.verified = false;
                self.check_at = now;
            }
            Event::FenceChanged { fence } => self.fence = fence,
            Event::Checked { observed, verified } => {
                self.observed = observed;
                let releasing = self.releasing_since.is_some();
                self.check_at = now + if releasing { CHECK_RELEASING } else { CHECK };
                if verified {
                    self.verified = true;
                    self.verified_last = Some(now);
                    self.verify_at = now + VERIFY;
                }
            }
            Event::Drifted { reason } => {
                self.repairs += u64::from(self.verified);
                return self.fail(now, Obstacle::Work, &reason, LAST_RETRY);
            }
            Event::Replaced => self.forget_netns(),
            Event::Removed => {
                self.standing = Standing::Nothing;
                self.releasing_since = None;
                self.verified = false;
                self.verified_last = None;
                self.captured_since = None;
                self.observed = Observed::default();
            }
            Event::Forgotten => self.forget(),
        }
        self.failure = None;
        self.try_now();
    }

    /// Does exactly what is wanted stand, seen since it was written? What stands may also be a release on its way.
    fn is_as_wanted(&self) -> bool {
        let stands = matches!(&self.standing, Standing::Exactly(capture) if Some(capture) == self.goal.as_ref());
        stands && self.verified
    }

    fn forget(&mut self) {
        self.forget_netns();
        self.place = Place::Forgotten;
    }

    fn forget_netns(&mut self) {
        self.place = Place::Lost;
        self.missing_since = None;
        self.listening = Listening::No;
        self.acceptance = Acceptance::None;
        self.standing = Standing::Nothing;
        self.verified = false;
        self.verified_last = None;
        self.captured_since = None;
        self.releasing_since = None;
        self.observed = Observed::default();
    }

    /// A pod that is let go does not need them.
    fn give_up_listening(&mut self) {
        if self.goal.is_none() && self.listening == Listening::No && self.stands() {
            self.listening = Listening::GivenUp;
        }
    }

    fn fail(&mut self, now: Instant, obstacle: Obstacle, reason: &str, last: Duration) {
        // A change of the fence that failed half-way, or rules that do not match: write everything again.
        if self.stands() {
            self.standing = Standing::Something;
            self.verified = false;
        }
        let reason = match obstacle.cure() {
            Some(cure) => format!("{reason}: {cure}"),
            None => reason.to_owned(),
        };
        self.failure = Some((obstacle, reason.into()));
        self.retry_at = Some(now + self.pause.min(last));
        self.pause = (self.pause * 2).min(last);
    }

    /// What keeps it from being captured; `None` while nothing does, or it is not wanted.
    pub fn obstacle(&self) -> Option<Obstacle> {
        let (obstacle, _) = self.failure.as_ref()?;
        self.goal.is_some().then_some(*obstacle)
    }

    /// What the controller is told, and why it is not better.
    pub fn condition(&self) -> (PodCondition, Arc<str>) {
        let failure = self.failure.as_ref().map(|(_, reason)| reason.clone());
        if self.goal.is_none() {
            return match self.stands() {
                true => (PodCondition::Releasing, failure.unwrap_or_default()),
                false => (PodCondition::Released, "".into()),
            };
        }
        let reason: Arc<str> = match (&failure, &self.acceptance) {
            (Some(reason), _) => reason.clone(),
            (None, _) if self.place != Place::Known => {
                "its network namespace is being looked for".into()
            }
            (None, _) if self.listening != Listening::Yes => "its listeners are being made".into(),
            (None, Acceptance::None) => "the proxy has not taken it yet".into(),
            (None, Acceptance::Refused(reason)) => format!("the proxy refused it: {reason}").into(),
            (None, Acceptance::Taken) if !self.is_as_wanted() => {
                "its capture is being written".into()
            }
            (None, Acceptance::Taken) => return (PodCondition::Ready, "".into()),
        };
        (PodCondition::Pending, reason)
    }
}

#[cfg(test)]
#[path = "pod_tests.rs"]
mod tests;
