// SPDX-License-Identifier: Apache-2.0
use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn consumer(name: &str, sequence: u64, generation: u64) -> Acknowledged {
    Acknowledged {
        name: name.into(),
        sequence,
        generation,
        presence: Presence::Connected,
    }
}

fn timing(now: Instant) -> Timing {
    Timing {
        timeout: 60 * SECOND,
        absent_after: 30 * SECOND,
        settled: now,
    }
}

fn names(step: &Step) -> Vec<&str> {
    match step {
        Step::Wait { progress, .. } | Step::TimedOut(progress) | Step::Done(progress) => {
            progress.waiting_for.iter().map(String::as_str).collect()
        }
        Step::Perform(_) => Vec::new(),
    }
}

fn target(sequence: u64, generation: u64) -> Target {
    Target {
        sequence,
        generation,
    }
}

#[test]
fn a_root_rotation_goes_through_every_phase_in_order() {
    let now = Instant::now();
    let mut machine = Machine::new(Rotation::begin(Kind::Root), timing(now), now);
    let mut all = vec![consumer("a", 1, 1), consumer("b", 1, 1)];
    assert_eq!(
        machine.poll(target(1, 1), &all, now),
        Step::Perform(Action::AddRoot)
    );

    machine.on_performed(machine.rotation().after(Action::AddRoot), now);
    assert_eq!(names(&machine.poll(target(2, 1), &all, now)), ["a", "b"]);
    all[0].sequence = 2;
    assert_eq!(names(&machine.poll(target(2, 1), &all, now)), ["b"]);
    all[1].sequence = 2;
    assert_eq!(
        machine.poll(target(2, 1), &all, now),
        Step::Perform(Action::SwitchIssuer)
    );

    machine.on_performed(machine.rotation().after(Action::SwitchIssuer), now);
    all.iter_mut().for_each(|one| one.sequence = 3);
    assert_eq!(
        names(&machine.poll(target(3, 2), &all, now)),
        ["a", "b"],
        "the bundle alone is not enough: the certificates must be new"
    );
    all.iter_mut().for_each(|one| one.generation = 2);
    assert_eq!(
        machine.poll(target(3, 2), &all, now),
        Step::Perform(Action::WithdrawRoots)
    );

    machine.on_performed(machine.rotation().after(Action::WithdrawRoots), now);
    assert_eq!(names(&machine.poll(target(4, 2), &all, now)), ["a", "b"]);
    all.iter_mut().for_each(|one| one.sequence = 4);
    assert!(matches!(
        machine.poll(target(4, 2), &all, now),
        Step::Done(Progress {
            acknowledged: 2,
            expected: 2,
            ..
        })
    ));
}

#[test]
fn a_leaf_rotation_touches_no_root() {
    let now = Instant::now();
    let mut machine = Machine::new(Rotation::begin(Kind::Leaf), timing(now), now);
    assert_eq!(
        machine.poll(target(1, 1), &[], now),
        Step::Perform(Action::SwitchIssuer)
    );
    machine.on_performed(machine.rotation().after(Action::SwitchIssuer), now);
    assert_eq!(
        names(&machine.poll(target(2, 2), &[consumer("a", 2, 1)], now)),
        ["a"]
    );
    assert!(matches!(
        machine.poll(target(2, 2), &[consumer("a", 2, 2)], now),
        Step::Done(_)
    ));
}

#[test]
fn a_connected_program_that_stays_silent_stops_the_rotation() {
    let now = Instant::now();
    let rotation = Rotation::begin(Kind::Root).after(Action::AddRoot);
    let machine = Machine::new(rotation, timing(now), now);
    let all = [consumer("a", 2, 1), consumer("b", 1, 1)];
    assert!(matches!(
        machine.poll(target(2, 1), &all, now + 59 * SECOND),
        Step::Wait { until, .. } if until == now + 60 * SECOND
    ));
    let step = machine.poll(target(2, 1), &all, now + 60 * SECOND);
    assert!(matches!(step, Step::TimedOut(_)));
    assert_eq!(names(&step), ["b"]);
}

#[test]
fn a_program_that_left_is_waited_for_a_while_then_named() {
    let now = Instant::now();
    let rotation = Rotation::begin(Kind::Leaf).after(Action::SwitchIssuer);
    let machine = Machine::new(rotation, timing(now), now);
    let gone = [Acknowledged {
        presence: Presence::Gone { since: now },
        ..consumer("a", 1, 1)
    }];
    assert!(matches!(
        machine.poll(target(2, 2), &gone, now + 29 * SECOND),
        Step::Wait { until, .. } if until == now + 30 * SECOND
    ));
    match machine.poll(target(2, 2), &gone, now + 30 * SECOND) {
        Step::Done(progress) => {
            assert_eq!(progress.skipped, ["a"]);
            assert_eq!(progress.expected, 0);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn after_a_restart_no_phase_is_left_before_programs_could_come_back() {
    let now = Instant::now();
    let settled = now + 10 * SECOND;
    let rotation = Rotation::begin(Kind::Root).after(Action::SwitchIssuer);
    let machine = Machine::new(
        rotation,
        Timing {
            settled,
            ..timing(now)
        },
        now,
    );
    assert!(matches!(
        machine.poll(target(3, 2), &[], now),
        Step::Wait { until, .. } if until == settled
    ));
    assert_eq!(
        names(&machine.poll(target(3, 2), &[consumer("a", 3, 1)], settled)),
        ["a"]
    );
    assert_eq!(
        machine.poll(target(3, 2), &[], settled),
        Step::Perform(Action::WithdrawRoots)
    );
}
