// SPDX-License-Identifier: Apache-2.0
use super::*;
use std::time::UNIX_EPOCH;

const DAY: Duration = Duration::from_secs(86_400);

fn at(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_000_000 + seconds)
}

fn day_from(start: SystemTime, generation: u64) -> Validity {
    Validity {
        not_before: start,
        not_after: start + DAY,
        generation,
    }
}

fn machine() -> Renewals<&'static str> {
    Renewals::new(RenewalLimits::default())
}

/// A machine that holds `generation` for `key`, issued at `at(0)`.
fn holding(key: &'static str, generation: u64) -> Renewals<&'static str> {
    let mut machine = machine();
    machine.want(key, at(0));
    let attempt = machine.poll(at(0)).unwrap();
    assert!(machine.on_issued(&attempt, day_from(at(0), generation), at(0), 0.5));
    machine
}

#[test]
fn the_first_need_is_asked_for_at_once_and_only_once() {
    let mut machine = machine();
    machine.want("a", at(0));
    machine.want("a", at(0));
    assert_eq!(machine.poll(at(0)).unwrap().key, "a");
    assert_eq!(machine.poll(at(0)), None);
    assert_eq!(machine.next_wakeup(), None);
}

#[test]
fn renewal_is_drawn_once_between_35_and_45_percent() {
    for (draw, percent) in [(0.0, 35), (0.5, 40), (1.0, 45)] {
        let mut machine = machine();
        machine.want("a", at(0));
        let attempt = machine.poll(at(0)).unwrap();
        assert!(machine.on_issued(&attempt, day_from(at(0), 0), at(0), draw));
        let due = machine.due(&"a").unwrap();
        let expected = at(864 * percent);
        let error = due
            .duration_since(expected)
            .unwrap_or_else(|earlier| earlier.duration());
        assert!(error < Duration::from_millis(1), "{due:?}");
        for minute in 0..60 {
            assert_eq!(machine.poll(at(minute * 60)), None);
            assert_eq!(machine.due(&"a"), Some(due), "drawn again");
        }
        assert_eq!(machine.next_wakeup(), Some(due));
        assert!(machine.poll(due).is_some());
    }
}

#[test]
fn a_short_or_old_certificate_is_no_busy_loop() {
    let mut machine = machine();
    machine.want("a", at(0));
    let attempt = machine.poll(at(0)).unwrap();
    let nearly_over = Validity {
        not_before: at(0) - DAY,
        not_after: at(5),
        generation: 0,
    };
    assert!(machine.on_issued(&attempt, nearly_over, at(0), 0.0));
    assert_eq!(machine.poll(at(0)), None);
    assert_eq!(machine.due(&"a"), Some(at(1)));
}

#[test]
fn backoff_is_per_key_doubles_and_is_bounded() {
    let mut machine = machine();
    machine.want("a", at(0));
    let mut now = at(0);
    let mut waits = Vec::new();
    for _ in 0..10 {
        let attempt = machine.poll(now).unwrap();
        machine.on_failed(&attempt, now, 1.0);
        let due = machine.due(&"a").unwrap();
        waits.push(due.duration_since(now).unwrap().as_millis());
        now = due;
    }
    assert_eq!(
        waits,
        [
            200, 400, 800, 1600, 3200, 6400, 12_800, 25_600, 30_000, 30_000
        ]
    );
    machine.want("b", at(0));
    assert_eq!(
        machine.poll(at(1)).unwrap().key,
        "b",
        "the failures of one key delay no other"
    );
}

#[test]
fn a_new_need_ends_the_backoff() {
    let mut machine = machine();
    machine.want("a", at(0));
    let attempt = machine.poll(at(0)).unwrap();
    machine.on_failed(&attempt, at(0), 1.0);
    assert_eq!(machine.poll(at(0)), None);
    machine.want("a", at(0));
    assert_eq!(machine.poll(at(0)).unwrap().failures, 1);
}

#[test]
fn success_ends_the_backoff() {
    let mut machine = machine();
    machine.want("a", at(0));
    let attempt = machine.poll(at(0)).unwrap();
    machine.on_failed(&attempt, at(0), 1.0);
    let attempt = machine.poll(at(1)).unwrap();
    assert!(machine.on_issued(&attempt, day_from(at(1), 0), at(1), 0.0));
    let due = machine.due(&"a").unwrap();
    assert_eq!(machine.poll(due).unwrap().failures, 0);
}

#[test]
fn a_clock_set_back_delays_a_retry_by_no_more_than_the_longest_backoff() {
    let mut machine = machine();
    machine.want("a", at(100_000));
    let attempt = machine.poll(at(100_000)).unwrap();
    machine.on_failed(&attempt, at(100_000), 1.0);
    assert!(machine.poll(at(0)).is_some());
}

#[test]
fn who_has_no_certificate_comes_first_then_who_expires_first() {
    let mut machine = machine();
    for (key, life) in [("late", 2), ("soon", 1)] {
        machine.want(key, at(0));
        let attempt = machine.poll(at(0)).unwrap();
        let certificate = Validity {
            not_after: at(0) + DAY * life,
            ..day_from(at(0), 0)
        };
        assert!(machine.on_issued(&attempt, certificate, at(0), 0.0));
    }
    let later = at(0) + DAY * 9 / 10;
    machine.want("new", later);
    let order: Vec<_> = std::iter::from_fn(|| machine.poll(later))
        .map(|attempt| attempt.key)
        .collect();
    assert_eq!(order, ["new", "soon", "late"]);
}

#[test]
fn no_more_than_the_limit_is_asked_for_at_once() {
    let mut machine = Renewals::new(RenewalLimits {
        at_once: 2,
        ..RenewalLimits::default()
    });
    for key in ["a", "b", "c"] {
        machine.want(key, at(0));
    }
    let first = machine.poll(at(0)).unwrap();
    let _second = machine.poll(at(0)).unwrap();
    assert_eq!(machine.poll(at(0)), None);
    assert_eq!(machine.next_wakeup(), None, "only an answer makes room");
    machine.on_failed(&first, at(0), 0.0);
    assert!(machine.poll(at(0)).is_some());
}

#[test]
fn a_required_generation_forces_a_new_certificate_within_the_spread() {
    let mut machine = holding("a", 1);
    machine.require_generation(1, at(10), || 0.5);
    assert_eq!(machine.poll(at(11)), None, "it is of this generation");
    machine.require_generation(2, at(10), || 0.5);
    assert_eq!(machine.lowest_generation(), Some(1));
    assert_eq!(machine.poll(at(10)), None);
    let attempt = machine.poll(at(11)).unwrap();
    assert!(machine.on_issued(&attempt, day_from(at(11), 2), at(11), 0.5));
    assert_eq!(machine.lowest_generation(), Some(2));
    assert_eq!(machine.poll(at(20)), None);
}

#[test]
fn a_certificate_of_the_old_generation_is_used_and_asked_for_again() {
    let mut machine = machine();
    machine.want("a", at(0));
    let attempt = machine.poll(at(0)).unwrap();
    machine.require_generation(2, at(0), || 0.0);
    assert!(machine.on_issued(&attempt, day_from(at(0), 1), at(0), 0.0));
    assert_eq!(machine.lowest_generation(), Some(1));
    assert_eq!(machine.poll(at(0)), None, "no busy loop");
    assert!(machine.poll(at(1)).is_some());
}

#[test]
fn an_expired_certificate_is_reported_once_and_no_longer_counted() {
    let mut machine = holding("a", 1);
    assert_eq!(machine.expire(at(10)), Vec::<&str>::new());
    assert_eq!(machine.expire(at(0) + DAY), ["a"]);
    assert_eq!(machine.expire(at(0) + DAY), Vec::<&str>::new());
    assert_eq!(machine.lowest_generation(), None);
}

#[test]
fn expiry_wakes_while_the_ca_does_not_answer() {
    let mut machine = holding("a", 1);
    let due = machine.due(&"a").unwrap();
    let _attempt = machine.poll(due).unwrap();
    assert_eq!(machine.next_wakeup(), Some(at(0) + DAY));
}

#[test]
fn what_was_forgotten_is_dropped_even_if_it_is_wanted_again() {
    let mut machine = machine();
    machine.want("a", at(0));
    let old = machine.poll(at(0)).unwrap();
    machine.forget(&"a");
    machine.want("a", at(0));
    let new = machine.poll(at(0)).unwrap();
    assert!(!machine.on_issued(&old, day_from(at(0), 0), at(0), 0.0));
    assert!(machine.on_issued(&new, day_from(at(0), 0), at(0), 0.0));
    machine.forget(&"a");
    assert_eq!(machine.next_wakeup(), None);
    assert_eq!(machine.asking, 0);
}

#[test]
fn a_certificate_from_a_clock_that_ran_ahead_is_replaced_at_once() {
    let mut machine = machine();
    machine.want("a", at(86_400));
    let attempt = machine.poll(at(86_400)).unwrap();
    assert!(machine.on_issued(&attempt, day_from(at(86_400), 1), at(86_400), 0.5));
    // The clock is set right: a day back.
    let attempt = machine.poll(at(10)).unwrap();
    // The CA is away: asked again after the backoff, not in a loop.
    machine.on_failed(&attempt, at(10), 0.5);
    assert_eq!(machine.poll(at(10)), None);
    let attempt = machine.poll(at(11)).unwrap();
    assert!(machine.on_issued(&attempt, day_from(at(11), 1), at(11), 0.5));
    assert_eq!(machine.poll(at(12)), None);
}
