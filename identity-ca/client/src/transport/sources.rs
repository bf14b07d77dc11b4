// SPDX-License-Identifier: Apache-2.0
use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Counts what each source has open, and holds each to a bound. An IPv6 source is its /64.
///
/// As large as the number of places taken.
#[derive(Clone, Debug)]
pub struct Sources {
    limit: usize,
    open: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

/// One place; given back when dropped.
#[derive(Debug)]
pub struct Place {
    sources: Sources,
    source: IpAddr,
}

impl Sources {
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            open: Arc::default(),
        }
    }

    /// `None` where this source has all that one may have.
    pub fn place(&self, address: IpAddr) -> Option<Place> {
        let source = source(address);
        let mut open = self.open();
        let taken = open.entry(source).or_default();
        if *taken >= self.limit {
            return None;
        }
        *taken += 1;
        drop(open);
        Some(Place {
            sources: self.clone(),
            source,
        })
    }

    fn open(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.sources.open();
        if let Some(taken) = open.get_mut(&self.source) {
            *taken -= 1;
            if *taken == 0 {
                open.remove(&self.source);
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
        assert!(sources.open().is_empty());
    }
}
