// SPDX-License-Identifier: Apache-2.0
use crate::nfnetlink;
use podveil_netns::NetNs;
use podveil_plan::Capture;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// More than any node has pods; those of namespaces that have vanished go with the rest.
const MOST: usize = 4096;

/// What each namespace's rules were known to be, and the generation that the kernel counted then.
///
/// Every transaction makes a new one. While the kernel's number is the one of ours, nobody has written anything, and what
/// `nft` would list needs no reading.
#[derive(Clone, Debug, Default)]
pub struct Generations(Arc<Mutex<HashMap<u64, Known>>>);

#[derive(Clone, Debug, Eq, PartialEq)]
struct Known {
    capture: Capture,
    generation: u32,
}

/// A moment in a namespace.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    cookie: u64,
    generation: u32,
}

impl Generations {
    /// `None` where the kernel does not tell: then everything is read.
    pub fn now(&self, netns: &NetNs) -> Option<Moment> {
        Some(Moment {
            cookie: netns.cookie().ok()?,
            generation: nfnetlink::generation(netns).ok()?,
        })
    }

    /// The rules were `capture` at this moment.
    pub fn know(&self, at: Option<Moment>, capture: &Capture) {
        let Some(Moment { cookie, generation }) = at else {
            return;
        };
        let mut known = self.known();
        if known.len() >= MOST {
            known.clear();
        }
        let capture = capture.clone();
        known.insert(
            cookie,
            Known {
                capture,
                generation,
            },
        );
    }

    /// One transaction of ours has gone through since `before`, that did not touch the rules.
    pub fn follow(&self, before: Option<Moment>, netns: &NetNs) {
        if let Some(now) = self.after(before, 1, netns)
            && let Some(before) = before
            && let Some(known) = self.known().get_mut(&now.cookie)
            && known.generation == before.generation
        {
            known.generation = now.generation;
        }
    }

    /// Now, if there were exactly so many transactions since.
    pub fn after(
        &self,
        before: Option<Moment>,
        transactions: u32,
        netns: &NetNs,
    ) -> Option<Moment> {
        let (before, now) = (before?, self.now(netns)?);
        (now.generation == before.generation.wrapping_add(transactions)).then_some(now)
    }

    /// Are the rules at this moment known to be `capture`?
    pub fn are(&self, at: Option<Moment>, capture: &Capture) -> bool {
        at.is_some_and(|at| {
            (self.known().get(&at.cookie))
                .is_some_and(|known| known.generation == at.generation && known.capture == *capture)
        })
    }

    fn known(&self) -> MutexGuard<'_, HashMap<u64, Known>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
