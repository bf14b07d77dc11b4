// SPDX-License-Identifier: Apache-2.0
//! What of the cluster a node holds that does not hold everything, and for how long.

use podveil_model::Lookup;
use std::collections::{HashMap, HashSet};
use std::time::Duration;
use tokio::time::Instant;

/// What is looked at once stays for as long as that may take.
const ONCE: Duration = Duration::from_secs(10);
/// An address of nobody's: whoever scans addresses fills the table with these.
const NOBODY: Duration = Duration::from_secs(60);
/// What is not answered by then is asked for anew when it is needed next.
const UNANSWERED: Duration = Duration::from_secs(60);
/// Of what is held, the part that makes room at once when too much is.
const ROOM: usize = 16;

/// Each lookup with the moment up to which it is held without being used: no I/O, no clock.
#[derive(Debug)]
pub(crate) struct Interest {
    held: HashMap<Lookup, Held>,
    /// Whatever happens.
    always: Lookup,
    keep: Duration,
    limit: usize,
}

#[derive(Debug)]
struct Held {
    until: Instant,
    /// How long after a use.
    keep: Duration,
    answer: Answer,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Answer {
    Open,
    Nobody,
    Somebody,
}

impl Held {
    fn used(&mut self, now: Instant) {
        let keep = match self.answer {
            // Not by being used: it may have been lost.
            Answer::Open => return,
            Answer::Nobody => self.keep.min(NOBODY),
            Answer::Somebody => self.keep,
        };
        self.until = self.until.max(now + keep);
    }
}

impl Interest {
    /// `keep`: how long something is held after it was used last.
    pub fn new(always: Lookup, keep: Duration, limit: usize) -> Self {
        Self {
            held: HashMap::new(),
            always,
            keep,
            limit,
        }
    }

    pub fn is_full(&self) -> bool {
        self.held.len() >= self.limit
    }

    pub fn holds(&self, lookup: &Lookup) -> bool {
        *lookup == self.always || self.held.contains_key(lookup)
    }

    /// It is needed now.
    pub fn used(&mut self, now: Instant, lookup: &Lookup) {
        self.hold(now, lookup, self.keep);
    }

    /// It is needed for one look at it.
    pub fn looked_at(&mut self, now: Instant, lookup: &Lookup) {
        self.hold(now, lookup, ONCE);
    }

    fn hold(&mut self, now: Instant, lookup: &Lookup, keep: Duration) {
        if *lookup == self.always {
            return;
        }
        match self.held.get_mut(lookup) {
            Some(held) => {
                held.keep = held.keep.max(keep);
                held.used(now);
            }
            None => {
                let held = Held {
                    until: now + UNANSWERED,
                    keep,
                    answer: Answer::Open,
                };
                self.held.insert(lookup.clone(), held);
            }
        }
    }

    /// A connection that lives needs it; what is not held is not begun to be.
    pub fn still_used(&mut self, now: Instant, lookup: &Lookup) {
        if let Some(held) = self.held.get_mut(lookup) {
            held.used(now);
        }
    }

    /// Whoever is known by it has been told.
    pub fn is_somebody(&mut self, now: Instant, lookup: &Lookup) {
        if let Some(held) = self.held.get_mut(lookup) {
            held.answer = Answer::Somebody;
            held.until = now + held.keep;
        }
    }

    /// Nobody is known by it.
    pub fn is_nobody(&mut self, now: Instant, lookup: &Lookup) {
        if let Some(held) = self.held.get_mut(lookup) {
            held.answer = Answer::Nobody;
            held.until = now + held.keep.min(NOBODY);
        }
    }

    /// The answer is not believed any more: another one is to come.
    pub fn is_open(&mut self, now: Instant, lookup: &Lookup) {
        if let Some(held) = self.held.get_mut(lookup) {
            held.answer = Answer::Open;
            held.until = now + UNANSWERED;
        }
    }

    /// What has not been used for long is held no more.
    pub fn take_idle(&mut self, now: Instant) -> Vec<Lookup> {
        let idle = self.held.extract_if(|_, held| held.until <= now);
        idle.map(|(lookup, _)| lookup).collect()
    }

    /// Those that would go first, where more is held than may be; never one that living connections need.
    pub fn take_surplus(&mut self, needed: &HashSet<Lookup>) -> Vec<Lookup> {
        let mut rest: Vec<(Instant, &Lookup)> = (self.held.iter())
            .filter(|(lookup, _)| !needed.contains(lookup))
            .map(|(lookup, held)| (held.until, lookup))
            .collect();
        let surplus = (self.held.len() + self.limit / ROOM).saturating_sub(self.limit);
        let surplus = surplus.min(rest.len());
        if surplus == 0 {
            return Vec::new();
        }
        rest.select_nth_unstable(surplus - 1);
        let surplus: Vec<Lookup> = rest[..surplus]
            .iter()
            .map(|(_, one)| (*one).clone())
            .collect();
        for lookup in &surplus {
            self.held.remove(lookup);
        }
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
    fn what_is_used_is_held_until_it_has_not_been_for_long() {
        let (mut interest, began) = interest(10);
        let at = |seconds| began + Duration::from_secs(seconds);
        for number in [1, 2] {
            interest.used(at(0), &address(number));
            interest.is_somebody(at(0), &address(number));
        }
        interest.used(at(1800), &address(1));
        interest.looked_at(at(1800), &address(1));
        assert_eq!(interest.take_idle(at(3599)), []);
        assert_eq!(interest.take_idle(at(3600)), [address(2)]);
        assert_eq!(interest.take_idle(at(5399)), [], "no shorter for a look");
        assert_eq!(interest.take_idle(at(5400)), [address(1)]);
        assert!(!interest.holds(&address(1)));
    }

    #[test]
    fn what_is_looked_at_once_is_nobodys_or_is_not_answered_goes_soon() {
        let (mut interest, began) = interest(10);
        let at = |seconds| began + Duration::from_secs(seconds);
        interest.looked_at(at(0), &address(1));
        interest.is_somebody(at(0), &address(1));
        interest.used(at(0), &address(2));
        interest.is_nobody(at(0), &address(2));
        interest.used(at(5), &address(3));
        interest.used(at(50), &address(2));
        // However often it is needed: nobody may be about to answer.
        interest.used(at(60), &address(3));
        interest.still_used(at(0), &address(4));
        assert_eq!(interest.take_idle(at(10)), [address(1)]);
        assert_eq!(interest.take_idle(at(65)), [address(3)]);
        assert_eq!(interest.take_idle(at(110)), [address(2)]);
        assert!(interest.held.is_empty());
    }

    #[test]
    fn the_table_is_bounded_and_what_was_used_longest_ago_goes_first() {
        let (mut interest, began) = interest(32);
        for number in 0..32 {
            let at = began + Duration::from_secs(number.into());
            interest.used(at, &address(number));
            interest.is_somebody(at, &address(number));
        }
        assert!(interest.is_full());
        // What is not answered goes before them, whenever it was asked for; what is needed stays.
        interest.used(began + Duration::from_secs(100), &address(99));
        let needed = HashSet::from([address(0)]);
        let mut surplus = interest.take_surplus(&needed);
        surplus.sort();
        assert_eq!(surplus, [address(1), address(2), address(99)]);
        let all = (0..99).map(address).collect();
        interest.used(began, &address(50));
        interest.used(began, &address(51));
        interest.used(began, &address(52));
        assert_eq!(interest.take_surplus(&all), []);
    }

    #[test]
    fn the_nodes_own_is_held_whatever_happens() {
        let (mut interest, began) = interest(1);
        let own = Lookup::Node("n1".parse().unwrap());
        assert!(interest.holds(&own), "it is asked for at the start");
        interest.used(began, &own);
        let years = began + Duration::from_secs(1 << 30);
        assert_eq!(interest.take_idle(years), []);
    }
}
