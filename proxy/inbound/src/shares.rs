// SPDX-License-Identifier: Apache-2.0
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// So many addresses at their bound leave nothing for the others.
const SHARES: usize = 8;

/// How much each peer address has of a bound that all of them share, so that one that proves nothing cannot take it all.
///
/// Bounded by that other bound: an address stays in the table only while it has something.
#[derive(Debug)]
pub(crate) struct Shares {
    each: usize,
    taken: Mutex<HashMap<IpAddr, usize>>,
}

/// One part; dropping it gives it back.
#[derive(Debug)]
pub(crate) struct Share {
    shares: Arc<Shares>,
    ip: IpAddr,
}

impl Shares {
    pub fn of(bound: usize) -> Arc<Self> {
        Arc::new(Self {
            each: bound.div_ceil(SHARES).max(1),
            taken: Mutex::default(),
        })
    }

    /// `None`: this address has its share already.
    pub fn take(self: &Arc<Self>, ip: IpAddr) -> Option<Share> {
        let mut taken = self.lock();
        let count = taken.entry(ip).or_default();
        if *count >= self.each {
            return None;
        }
        *count += 1;
        Some(Share {
            shares: self.clone(),
            ip,
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        // The table is whole between any two statements, so a panic elsewhere cannot have broken it.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut taken = self.shares.lock();
        if let Some(count) = taken.get_mut(&self.ip) {
            *count -= 1;
            if *count == 0 {
                taken.remove(&self.ip);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_takes_its_share_and_no_more() {
        let shares = Shares::of(16);
        let [one, two] = ["10.0.0.1", "10.0.0.2"].map(|ip| ip.parse().unwrap());
        let held = [shares.take(one).unwrap(), shares.take(one).unwrap()];
        assert!(shares.take(one).is_none());
        assert!(shares.take(two).is_some());
        drop(held);
        assert!(shares.lock().is_empty());
        assert!(shares.take(one).is_some());
    }
}
