// SPDX-License-Identifier: Apache-2.0
use std::collections::HashMap;
use std::hash::Hash;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Counts what each owner has open, and holds each to a bound.
///
/// As large as the number of places taken.
#[derive(Debug)]
pub struct Places<K> {
    limit: usize,
    open: Arc<Mutex<HashMap<K, usize>>>,
}

/// One place; given back when dropped.
#[derive(Debug)]
pub struct Place<K: Eq + Hash> {
    places: Places<K>,
    owner: K,
}

/// [`Places`] of addresses. An IPv6 source is its /64.
#[derive(Clone, Debug)]
pub struct Sources(Places<IpAddr>);

impl Sources {
    pub fn new(limit: usize) -> Self {
        Self(Places::new(limit))
    }

    /// `None` where this source has all that one may have.
    pub fn place(&self, address: IpAddr) -> Option<Place<IpAddr>> {
        self.0.place(source(address))
    }
}

impl<K: Eq + Hash> Places<K> {
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            open: Arc::default(),
        }
    }

    fn open(&self) -> MutexGuard<'_, HashMap<K, usize>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Clone + Eq + Hash> Places<K> {
    /// `None` where this owner has all that one may have.
    pub fn place(&self, owner: K) -> Option<Place<K>> {
        let mut open = self.open();
        let taken = open.get(&owner).copied().unwrap_or_default();
        if taken >= self.limit {
            return None;
        }
        open.insert(owner.clone(), taken + 1);
        drop(open);
        Some(Place {
            places: self.clone(),
            owner,
        })
    }
}

impl<K> Clone for Places<K> {
    fn clone(&self) -> Self {
        Self {
            limit: self.limit,
            open: self.open.clone(),
        }
    }
}

impl<K: Eq + Hash> Drop for Place<K> {
    fn drop(&mut self) {
        let mut open = self.places.open();
        if let Some(taken) = open.get_mut(&self.owner) {
            *taken -= 1;
            if *taken == 0 {
                open.remove(&self.owner);
            }
        }
    }
}

fn source(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => {
            let network = v6.to_bits() & !u128::from(u64::MAX);
            Ipv6Addr::from_bits(network).into()
        }
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_source_takes_no_more_than_its_bound_and_nothing_from_others() {
        let sources = Sources::new(2);
        let place = |address: &str| sources.place(address.parse().unwrap());
        let first = place("10.0.0.1").unwrap();
        let _second = place("::ffff:10.0.0.1").unwrap();
        assert!(place("10.0.0.1").is_none());
        let _other = place("10.0.0.2").unwrap();
        let _v6 = [place("fd00::1").unwrap(), place("fd00::2").unwrap()];
        assert!(place("fd00::3").is_none());
        drop(first);
        let _again = place("10.0.0.1").unwrap();
        drop((_again, _second, _other, _v6));
        assert!(sources.0.open().is_empty());
    }
}
