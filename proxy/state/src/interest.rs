// SPDX-License-Identifier: Apache-2.0
//! What of the cluster a node holds that does not hold everything, and for how long.

use podveil_model::Lookup;
use std::collections::HashMap;
use std::time::Duration;
use tokio::time::Instant;

/// What is looked at once stays for as long as that may take.
const ONCE: Duration = Duration::from_secs(10);
/// An address of nobody's: whoever scans addresses fills the table with these.
const NOBODY: Duration = Duration::from_secs(60);
/// Of what is held, the part that makes room at once when too much is.
const ROOM: usize = 16;

/// Each lookup with the moment up to which it is held without being used: no I/O, no clock.
#[derive(Debug)]
pub(crate) struct Interest {
    until: HashMap<Lookup, Instant>,
    /// Whatever happens.
    always: Lookup,
    keep: Duration,
    limit: usize,
}

impl Interest {
    /// `keep`: how long something is held after it was used last.
    pub fn new(always: Lookup, keep: Duration, limit: usize) -> Self {
        Self {
            until: HashMap::new(),
            always,
            keep,
            limit,
        }
    }

    /// It was needed now. True if it was not held, and must be asked for.
    pub fn used(&mut self, now: Instant, lookup: &Lookup) -> bool {
        self.hold(lookup, now + self.keep)
    }

    /// It is needed for one look at it. True as above.
    pub fn looked_at(&mut self, now: Instant, lookup: &Lookup) -> bool {
        self.hold(lookup, now + ONCE)
    }

    fn hold(&mut self, lookup: &Lookup, until: Instant) -> bool {
        if *lookup == self.always {
            return false;
        }
        match self.until.get_mut(lookup) {
            Some(held) => {
                *held = until.max(*held);
                false
            }
            None => {
                self.until.insert(lookup.clone(), until);
                true
            }
        }
    }

    /// The same for what is held; anything else is not begun to be.
    pub fn still_used(&mut self, now: Instant, lookup: &Lookup) {
        if let Some(held) = self.until.get_mut(lookup) {
            *held = (now + self.keep).max(*held);
        }
    }

    /// Nobody is known by it.
    pub fn is_nobody(&mut self, now: Instant, lookup: &Lookup) {
        if let Some(held) = self.until.get_mut(lookup) {
            *held = (now + NOBODY).min(*held);
        }
    }

    /// It must be asked for anew when it is needed next.
    pub fn forget(&mut self, lookups: &[Lookup]) {
        for lookup in lookups {
            self.until.remove(lookup);
        }
    }

    /// What has not been used for long is held no more.
    pub fn take_idle(&mut self, now: Instant) -> Vec<Lookup> {
        let idle = self.until.extract_if(|_, until| *until <= now);
        idle.map(|(lookup, _)| lookup).collect()
    }

    /// Those that would go first, where more is held than may be.
    pub fn take_surplus(&mut self) -> Vec<Lookup> {
        if self.until.len() <= self.limit {
            return Vec::new();
        }
        let mut all: Vec<(Instant, Lookup)> = (self.until.iter())
            .map(|(lookup, until)| (*until, lookup.clone()))
            .collect();
        let surplus = all.len() - self.limit + self.limit / ROOM;
        let place = surplus.min(all.len()) - 1;
        all.select_nth_unstable(place);
        let surplus: Vec<Lookup> = all
            .into_iter()
            .take(place + 1)
            .map(|(_, one)| one)
            .collect();
        self.forget(&surplus);
        surplus
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(number: u32) -> Lookup {
        Lookup::Address(std::net::IpAddr::from(number.to_be_bytes()))
    }

    fn interest(limit: usize) -> (Interest, Instant) {
        let node = Lookup::Node("n1".parse().unwrap());
        let keep = Duration::from_secs(3600);
        (Interest::new(node, keep, limit), Instant::now())
    }

    #[test]
    fn what_is_used_is_asked_for_once_and_held_until_it_has_not_been_for_long() {
        let (mut interest, began) = interest(10);
        let at = |seconds| began + Duration::from_secs(seconds);
        assert!(interest.used(at(0), &address(1)));
        assert!(interest.used(at(0), &address(2)));
        assert!(!interest.used(at(1800), &address(1)));
        assert!(
            !interest.looked_at(at(1800), &address(1)),
            "no shorter for that"
        );
        assert_eq!(interest.take_idle(at(3599)), []);
        assert_eq!(interest.take_idle(at(3600)), [address(2)]);
        assert_eq!(interest.take_idle(at(5400)), [address(1)]);
        assert!(interest.used(at(5400), &address(1)), "it is asked for anew");
    }

    #[test]
    fn what_is_looked_at_once_and_what_is_nobodys_goes_soon() {
        let (mut interest, began) = interest(10);
        let at = |seconds| began + Duration::from_secs(seconds);
        assert!(interest.looked_at(at(0), &address(1)));
        assert!(interest.used(at(0), &address(2)));
        interest.is_nobody(at(0), &address(2));
        interest.still_used(at(0), &address(3));
        assert_eq!(interest.take_idle(at(10)), [address(1)]);
        assert_eq!(interest.take_idle(at(60)), [address(2)]);
        assert!(interest.until.is_empty());
    }

    #[test]
    fn the_table_is_bounded_and_what_was_used_longest_ago_goes_first() {
        let (mut interest, began) = interest(32);
        for number in 0..32 {
            interest.used(began + Duration::from_secs(number.into()), &address(number));
        }
        // Nobody's go before them, whenever they were asked for.
        let late = began + Duration::from_secs(100);
        interest.used(late, &address(99));
        interest.is_nobody(late, &address(99));
        let mut surplus = interest.take_surplus();
        surplus.sort();
        assert_eq!(surplus, [address(0), address(1), address(99)]);
        assert_eq!(interest.take_surplus(), []);
    }

    #[test]
    fn the_nodes_own_is_held_whatever_happens() {
        let (mut interest, began) = interest(1);
        let own = Lookup::Node("n1".parse().unwrap());
        assert!(!interest.used(began, &own), "it is asked for at the start");
        let years = began + Duration::from_secs(1 << 30);
        assert_eq!(interest.take_idle(years), []);
    }
}
