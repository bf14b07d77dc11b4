// SPDX-License-Identifier: Apache-2.0
use std::collections::{BTreeMap, HashMap};

/// A map that forgets its oldest entry when it is full.
#[derive(Clone, Debug)]
pub(crate) struct Bounded<K, V> {
    /// Each with its place in the order.
    entries: HashMap<K, (u64, V)>,
    order: BTreeMap<u64, K>,
    next: u64,
}

impl<K, V> Default for Bounded<K, V> {
    fn default() -> Self {
        Self {
            entries: HashMap::new(),
            order: BTreeMap::new(),
            next: 0,
        }
    }
}

/// Each kind of entry has its own bound.
pub(crate) trait Bound {
    const CAPACITY: usize;
}

impl<K: Clone + Eq + std::hash::Hash, V: Bound> Bounded<K, V> {
    pub fn get(&self, key: &K) -> Option<&V> {
        self.entries.get(key).map(|(_, value)| value)
    }

    /// One that is there keeps its place.
    pub fn insert(&mut self, key: K, value: V) {
        if let Some((_, held)) = self.entries.get_mut(&key) {
            *held = value;
            return;
        }
        self.entries.insert(key.clone(), (self.next, value));
        self.order.insert(self.next, key);
        self.next += 1;
        if self.order.len() > V::CAPACITY
            && let Some((_, oldest)) = self.order.pop_first()
        {
            self.entries.remove(&oldest);
        }
    }

    pub fn remove(&mut self, key: &K) {
        if let Some((place, _)) = self.entries.remove(key) {
            self.order.remove(&place);
        }
    }
}
