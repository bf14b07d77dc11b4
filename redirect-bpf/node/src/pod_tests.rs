// SPDX-License-Identifier: Apache-2.0
use super::*;

const BOUND: Duration = Duration::from_secs(600);

fn capture() -> Capture {
    Capture {
        phase: Phase::Capturing,
        refuses_plain: true,
        ..Capture::release()
    }
}

struct World {
    pod: Pod,
    now: Instant,
    fence: u64,
}

impl World {
    fn new() -> Self {
        let now = Instant::now();
        Self {
            pod: Pod::new(now),
            now,
            fence: 1,
        }
    }

    fn next(&mut self) -> Next {
        self.pod.next(self.now, self.fence, BOUND)
    }

    fn does(&mut self, action: Action, event: Event) {
        assert_eq!(self.next(), Next::Do(action));
        assert_eq!(self.next(), Next::Idle, "one piece of work at a time");
        self.pod.on(self.now, event);
    }

    fn condition(&self) -> PodCondition {
        self.pod.condition().0
    }

    fn checked(captured: usize) -> Event {
        Event::Checked {
            observed: Observed {
                captured,
                ..Observed::default()
            },
            verified: true,
        }
    }

    fn captured() -> Self {
        let mut world = Self::new();
        world.pod.set_goal(Some(capture()), true);
        world.does(Action::Find, Event::Found { stands: false });
        world.does(Action::Listen, Event::Listening);
        assert!(world.pod.is_offered());
        world.pod.set_acceptance(Acceptance::Taken);
        world.does(
            Action::Apply(capture()),
            Event::Applied {
                capture: capture(),
                fence: 1,
            },
        );
        let verify = Some(capture());
        world.does(Action::Check { verify }, Self::checked(0));
        world
    }
}

#[test]
fn a_pod_is_captured_only_after_the_proxy_has_it() {
    let mut world = World::new();
    world.pod.set_goal(Some(capture()), true);
    assert!(world.pod.is_undecided());
    world.does(Action::Find, Event::Found { stands: false });
    world.does(Action::Listen, Event::Listening);
    assert_eq!(world.next(), Next::Idle);
    world
        .pod
        .set_acceptance(Acceptance::Refused("no certificate".into()));
    assert_eq!(world.next(), Next::Idle);
    assert_eq!(
        &*world.pod.condition().1,
        "the proxy refused it: no certificate"
    );
    world.pod.set_acceptance(Acceptance::Taken);
    assert_eq!(world.next(), Next::Do(Action::Apply(capture())));
    assert_eq!(world.condition(), PodCondition::Pending);
}

#[test]
fn the_fence_of_a_capture_under_way_counts_as_one_in_use() {
    let mut world = World::new();
    world.pod.set_goal(Some(capture()), true);
    world.does(Action::Find, Event::Found { stands: false });
    world.does(Action::Listen, Event::Listening);
    world.pod.set_acceptance(Acceptance::Taken);
    assert_eq!(world.pod.fence(), None);
    assert_eq!(world.next(), Next::Do(Action::Apply(capture())));
    world.fence = 2;
    assert_eq!(world.pod.fence(), Some(1));
    let applied = Event::Applied {
        capture: capture(),
        fence: 1,
    };
    world.pod.on(world.now, applied);
    assert_eq!(world.pod.fence(), Some(1));
    world.does(Action::ChangeFence, Event::FenceChanged { fence: 2 });
    assert_eq!(world.pod.fence(), Some(2));
    // What stands does until the next does.
    world.fence = 3;
    let accepts = Capture {
        refuses_plain: false,
        ..capture()
    };
    world.pod.set_goal(Some(accepts.clone()), true);
    assert_eq!(world.next(), Next::Do(Action::Apply(accepts)));
    assert_eq!(world.pod.fence(), Some(2));
}

#[test]
fn a_captured_pod_is_ready_and_follows_the_fence() {
    let mut world = World::captured();
    assert_eq!(world.condition(), PodCondition::Ready);
    assert_eq!(world.next(), Next::At(world.now + CHECK));
    world.fence = 2;
    assert_eq!(world.pod.fence(), Some(1));
    world.does(Action::ChangeFence, Event::FenceChanged { fence: 2 });
    assert_eq!(world.pod.fence(), Some(2));
    // The proxy goes: capture stays, the pod is not ready.
    world.pod.set_acceptance(Acceptance::None);
    assert_eq!(world.next(), Next::At(world.now + CHECK));
    assert_eq!(world.condition(), PodCondition::Pending);
}

#[test]
fn flushed_rules_are_written_again() {
    let mut world = World::captured();
    world.now += VERIFY;
    let verify = Some(capture());
    world.does(
        Action::Check { verify },
        Event::Drifted {
            reason: "capture_out is not as written".into(),
        },
    );
    assert_eq!(world.pod.repairs(), 1);
    assert_eq!(world.next(), Next::At(world.now + FIRST_RETRY));
    world.now += FIRST_RETRY;
    assert_eq!(world.next(), Next::Do(Action::Apply(capture())));
}

#[test]
fn the_last_rule_goes_with_the_last_connection() {
    let mut world = World::captured();
    world.pod.set_goal(None, true);
    let release = Capture::release();
    world.does(
        Action::Apply(release.clone()),
        Event::Applied {
            capture: release.clone(),
            fence: 1,
        },
    );
    assert_eq!(world.condition(), PodCondition::Releasing);
    let verify = Some(release);
    world.now += RELEASE_GRACE;
    for captured in [2, 1, 0] {
        world.does(
            Action::Check {
                verify: verify.clone(),
            },
            World::checked(captured),
        );
        if captured > 0 {
            assert_eq!(world.next(), Next::At(world.now + CHECK_RELEASING));
            assert!(world.pod.is_offered());
            world.now += CHECK_RELEASING;
        }
    }
    world.does(Action::Remove, Event::Removed);
    assert_eq!(world.condition(), PodCondition::Released);
    world.does(Action::Forget, Event::Forgotten);
    assert_eq!(world.next(), Next::Idle);
    assert!(!world.pod.is_offered());
    // Wanted again: from the start.
    world.pod.set_goal(Some(capture()), true);
    assert_eq!(world.next(), Next::Do(Action::Find));
}

#[test]
fn a_released_pod_is_reached_by_peers_that_do_not_know_yet() {
    let mut world = World::captured();
    world.pod.set_goal(None, true);
    let release = Capture::release();
    world.does(
        Action::Apply(release.clone()),
        Event::Applied {
            capture: release.clone(),
            fence: 1,
        },
    );
    let verify = Some(release);
    world.does(Action::Check { verify }, World::checked(0));
    assert_eq!(world.next(), Next::At(world.now + CHECK_RELEASING));
    assert!(world.pod.is_offered());
    world.now += RELEASE_GRACE;
    assert_eq!(world.next(), Next::Do(Action::Remove));
}

#[test]
fn a_release_that_stands_is_not_ready_for_who_wants_it_again() {
    let mut world = World::captured();
    world.pod.set_goal(None, true);
    let release = Capture::release();
    world.does(
        Action::Apply(release.clone()),
        Event::Applied {
            capture: release.clone(),
            fence: 1,
        },
    );
    // The label comes back while the release is being looked at.
    let verify = Some(release);
    assert_eq!(world.next(), Next::Do(Action::Check { verify }));
    world.pod.set_goal(Some(capture()), true);
    world.pod.on(world.now, World::checked(0));
    assert_eq!(world.condition(), PodCondition::Pending);
    world.does(
        Action::Apply(capture()),
        Event::Applied {
            capture: capture(),
            fence: 1,
        },
    );
    assert_eq!(world.condition(), PodCondition::Pending);
    let verify = Some(capture());
    world.does(Action::Check { verify }, World::checked(0));
    assert_eq!(world.condition(), PodCondition::Ready);
}

#[test]
fn a_connection_that_does_not_end_is_waited_for_within_the_bound() {
    let mut world = World::captured();
    world.pod.set_goal(None, true);
    let release = Capture::release();
    world.does(
        Action::Apply(release.clone()),
        Event::Applied {
            capture: release.clone(),
            fence: 1,
        },
    );
    let verify = Some(release);
    world.does(Action::Check { verify }, World::checked(1));
    world.now += BOUND;
    assert_eq!(world.next(), Next::Do(Action::Remove));
}

#[test]
fn a_pod_that_is_gone_is_removed_at_once() {
    let mut world = World::captured();
    world.pod.set_goal(None, false);
    world.does(Action::Remove, Event::Removed);
    world.does(Action::Forget, Event::Forgotten);
    assert!(world.pod.is_forgotten());
}

#[test]
fn capture_of_a_process_before_us_is_taken_over() {
    let mut world = World::new();
    world.pod.set_goal(Some(capture()), true);
    world.does(Action::Find, Event::Found { stands: true });
    world.does(
        Action::Listen,
        Event::Failed {
            reason: "the proxy has not connected".into(),
        },
    );
    assert!(!world.pod.is_undecided());
    assert!(world.pod.is_kept(), "its connections go on");
    world.pod.proxy_came();
    assert!(world.pod.is_undecided());
    world.does(Action::Listen, Event::Listening);
    // Without waiting for the proxy: it has the pod since long.
    assert_eq!(world.next(), Next::Do(Action::Apply(capture())));
}

#[test]
fn leftovers_of_a_pod_that_nobody_wants_are_released() {
    let mut world = World::new();
    world.does(Action::Find, Event::Found { stands: true });
    world.does(Action::Listen, Event::Listening);
    assert!(
        world.pod.is_offered(),
        "the proxy may carry its connections"
    );
    assert_eq!(world.next(), Next::Do(Action::Apply(Capture::release())));
}

#[test]
fn a_clean_pod_that_nobody_wants_is_left_alone() {
    let mut world = World::new();
    world.does(Action::Find, Event::Found { stands: false });
    assert!(!world.pod.is_kept());
    world.does(Action::Forget, Event::Forgotten);
    assert_eq!(world.next(), Next::Idle);
    assert_eq!(world.condition(), PodCondition::Released);
}

#[test]
fn failures_are_tried_again_with_growing_pauses() {
    let reason = || "there is no network namespace".to_owned();
    let failed: fn(String) -> Event = |reason| Event::Failed { reason };
    let missing: fn(String) -> Event = |reason| Event::Missing {
        reason,
        obstacle: Obstacle::NotFound,
    };
    let cases = [
        (failed, [40, 80, 160, 320, 640], [2560, 5000, 5000]),
        // A sandbox is waited for.
        (missing, [40, 50, 50, 50, 50], [50, 50, 50]),
    ];
    for (event, middle, last) in cases {
        let mut world = World::new();
        world.pod.set_goal(Some(capture()), true);
        let mut pauses = Vec::new();
        for _ in 0..11 {
            world.does(Action::Find, event(reason()));
            let Next::At(at) = world.next() else {
                panic!("no pause");
            };
            pauses.push((at - world.now).as_millis());
            world.now = at;
        }
        assert_eq!(pauses[..2], [10, 20]);
        assert_eq!(pauses[2..7], middle);
        assert_eq!(pauses[8..], last);
        assert_eq!(*world.pod.condition().1, *reason());
    }
}

#[test]
fn what_keeps_a_pod_from_capture_is_named_with_its_cure_once_it_is_no_moments_matter() {
    let mut world = World::new();
    world.pod.set_goal(Some(capture()), true);
    let missing = || Event::Missing {
        reason: "nobody is there".to_owned(),
        obstacle: Obstacle::NotFound,
    };
    world.does(Action::Find, missing());
    assert_eq!(world.pod.obstacle(), Some(Obstacle::Work));
    assert_eq!(&*world.pod.condition().1, "nobody is there");
    world.now += FIND_PATIENCE;
    world.does(Action::Find, missing());
    assert_eq!(world.pod.obstacle(), Some(Obstacle::NotFound));
    let (condition, reason) = world.pod.condition();
    assert_eq!(condition, PodCondition::Pending);
    assert!(
        reason.starts_with("nobody is there: ") && reason.contains("runtime class"),
        "{reason}"
    );
    // Another mesh in the pod will not go away by itself.
    world.now += LAST_RETRY;
    world.does(Action::Find, Event::Found { stands: false });
    assert_eq!(world.pod.obstacle(), None);
    let reason = "port 15006 is taken".to_owned();
    world.does(Action::Listen, Event::Taken { reason });
    assert_eq!(world.pod.obstacle(), Some(Obstacle::PortTaken));
    assert!(world.pod.condition().1.contains("out of the other mesh"));
    // Nobody wants it any more: nothing is wrong with it.
    world.pod.set_goal(None, true);
    assert_eq!(world.pod.obstacle(), None);
}
