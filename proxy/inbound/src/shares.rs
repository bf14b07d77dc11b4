// SPDX-License-Identifier: Apache-2.0
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Of the places, the part that addresses of no known workload have together: they can become a tunnel only if their
/// workload is told in time.
const STRANGERS: usize = 4;

/// Shares places among peer addresses, which have proved nothing yet.
///
/// An address takes another place only while more are free than it has. So any number of greedy addresses, `n` of them,
/// leave one part of `n + 1` to the others: one alone may have half of the places, and there is no number of them that
/// fills all while others have none.
///
/// Bounded by the places: an address stays in the table only while it has one.
#[derive(Debug)]
pub(crate) struct Shares {
    places: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    by_address: HashMap<IpAddr, usize>,
    all: usize,
    by_strangers: usize,
}

/// One place; dropping it gives it back.
#[derive(Debug)]
pub(crate) struct Share {
    shares: Arc<Shares>,
    ip: IpAddr,
    stranger: bool,
}

impl Shares {
    pub fn of(places: usize) -> Arc<Self> {
        Arc::new(Self {
            places,
            taken: Mutex::default(),
        })
    }

    /// `known`: a workload has this address. `None`: the address has its share already, or nothing is free.
    pub fn take(self: &Arc<Self>, ip: IpAddr, known: bool) -> Option<Share> {
        let mut taken = self.lock();
        let mut free = self.places - taken.all;
        if !known {
            let for_strangers = self.places.div_ceil(STRANGERS);
            free = free.min(for_strangers.saturating_sub(taken.by_strangers));
        }
        let own = taken.by_address.get(&ip).copied().unwrap_or_default();
        if own >= free {
            return None;
        }
        taken.by_address.insert(ip, own + 1);
        taken.all += 1;
        taken.by_strangers += usize::from(!known);
        Some(Share {
            shares: self.clone(),
            ip,
            stranger: !known,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        // Nothing between the statements that change the table can panic, so it is whole.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut taken = self.shares.lock();
        taken.all -= 1;
        taken.by_strangers -= usize::from(self.stranger);
        if let Some(own) = taken.by_address.get_mut(&self.ip) {
            *own -= 1;
            if *own == 0 {
                taken.by_address.remove(&self.ip);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(number: u32) -> IpAddr {
        std::net::Ipv4Addr::from(0x0a00_0000 + number).into()
    }

    /// What each of so many greedy addresses gets, asking in turn until nobody gets any more.
    fn greedy(shares: &Arc<Shares>, addresses: u32, known: bool) -> Vec<Share> {
        let mut held = Vec::new();
        loop {
            let round = (1..=addresses).filter_map(|number| shares.take(ip(number), known));
            let before = held.len();
            held.extend(round);
            if held.len() == before {
                return held;
            }
        }
    }

    #[test]
    fn greedy_addresses_leave_their_fair_part_to_others() {
        for addresses in [1, 8, 64, 500] {
            let shares = Shares::of(1024);
            let held = greedy(&shares, addresses, true);
            let left = 1024 - held.len();
            let fair = 1024 / (addresses as usize + 1);
            assert!(left + 1 >= fair, "{addresses} addresses left {left}");
            assert!(shares.take(ip(9999), true).is_some());
            drop(held);
            assert_eq!(shares.lock().all, 0);
            assert!(shares.lock().by_address.is_empty());
        }
    }

    #[test]
    fn addresses_of_no_known_workload_leave_most_to_those_of_one() {
        let shares = Shares::of(1024);
        let held = greedy(&shares, 5000, false);
        assert_eq!(held.len(), 256);
        assert!(shares.take(ip(9999), false).is_none());
        let known = greedy(&shares, 1, true);
        assert!(known.len() >= 300, "{}", known.len());
        drop((held, known));
        assert_eq!(shares.lock().by_strangers, 0);
    }

    #[test]
    fn one_place_is_enough_for_one() {
        let shares = Shares::of(1);
        let place = shares.take(ip(1), false).unwrap();
        assert!(shares.take(ip(2), true).is_none());
        drop(place);
        assert!(shares.take(ip(2), true).is_some());
    }
}
