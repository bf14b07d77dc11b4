// SPDX-License-Identifier: Apache-2.0
use crate::pod::Pod;
use std::time::{Duration, Instant};

/// A pod that needs longer is in trouble that nobody else is to wait for.
const BOUND: Duration = Duration::from_secs(10);

/// The time after a start in which pods' fences may still be those of the process before this one.
///
/// What the control plane tells is not in use before they have been written anew: it would have peers send what these
/// fences refuse.
///
/// ```text
/// Awaited ── the first answer ──> Until ── every pod is settled, or the bound has passed ──> Over
/// ```
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Settling {
    /// No pod is known yet.
    #[default]
    Awaited,
    Until(Instant),
    Over,
}

impl Settling {
    pub fn answered(&mut self, now: Instant) {
        if *self == Self::Awaited {
            *self = Self::Until(now + BOUND);
        }
    }

    /// Is it known which pods there are?
    pub fn has_begun(self) -> bool {
        self != Self::Awaited
    }

    /// Looks at all pods; `Some` until when it is not over yet.
    pub fn look<'a>(
        &mut self,
        now: Instant,
        mut pods: impl Iterator<Item = &'a Pod>,
    ) -> Option<Instant> {
        let Self::Until(bound) = *self else {
            return None;
        };
        if now < bound && pods.any(Pod::is_unsettled) {
            return Some(bound);
        }
        *self = Self::Over;
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Obstacle;
    use crate::pod::Event;

    #[test]
    fn what_is_told_is_in_use_only_when_every_fence_of_the_last_run_has_been_written_anew() {
        let now = Instant::now();
        let mut settling = Settling::default();
        assert_eq!(settling.look(now, [].iter()), None);
        assert!(!settling.has_begun());
        settling.answered(now);
        settling.answered(now + BOUND);
        let bound = Some(now + BOUND);
        let mut pods = [Pod::new(now), Pod::new(now)];
        assert_eq!(settling.look(now, pods.iter()), bound);
        pods[0].on(now, Event::Found { stands: false });
        let missing = Event::Missing {
            reason: "later".into(),
            obstacle: Obstacle::NotFound,
        };
        pods[1].set_goal(Some(podveil_plan::Capture::release()), true);
        pods[1].on(now, missing);
        let mut over = settling;
        assert_eq!(over.look(now, pods.iter()), None);
        assert_eq!(over, Settling::Over);
        // It was there all the same, and has something of ours.
        pods[1].on(now, Event::Found { stands: true });
        assert_eq!(settling.look(now, pods.iter()), bound);
        assert_eq!(over.look(now, pods.iter()), None, "it does not begin again");
        let mut bounded = settling;
        assert_eq!(bounded.look(now + BOUND, pods.iter()), None);
        let applied = Event::Applied {
            capture: podveil_plan::Capture::release(),
            fence: 1,
        };
        pods[1].on(now, applied);
        assert_eq!(settling.look(now, pods.iter()), None);
    }
}
