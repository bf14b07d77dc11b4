// SPDX-License-Identifier: Apache-2.0
//! What of a state that is held on demand is in use.

use crate::Need;
use podveil_model::{Lookup, Uid};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Said by connections, read by the one who decides what may be forgotten.
#[derive(Debug, Default)]
pub(crate) struct Uses {
    /// Those that the writer has been told of lately, so that not each connection tells it.
    noted: Mutex<HashMap<Lookup, Need>>,
    pins: Mutex<HashMap<Uid, usize>>,
}

/// As long as it lives, one workload is held although nobody asks for it.
#[derive(Debug)]
pub struct Pin {
    uses: Arc<Uses>,
    uid: Uid,
}

impl Uses {
    /// True if it is news.
    pub fn note(&self, lookup: &Lookup, need: Need) -> bool {
        let mut noted = lock(&self.noted);
        if noted.get(lookup).is_some_and(|told| *told >= need) {
            return false;
        }
        noted.insert(lookup.clone(), need);
        true
    }

    /// The next connection that needs one of these says so.
    pub fn forget<'a>(&self, lookups: impl IntoIterator<Item = &'a Lookup>) {
        let mut noted = lock(&self.noted);
        for lookup in lookups {
            noted.remove(lookup);
        }
    }

    /// The next connection says what it needs, whatever that is.
    pub fn forget_all(&self) {
        lock(&self.noted).clear();
    }

    pub fn pin(uses: &Arc<Self>, uid: &Uid) -> Pin {
        *lock(&uses.pins).entry(uid.clone()).or_default() += 1;
        Pin {
            uses: uses.clone(),
            uid: uid.clone(),
        }
    }

    pub fn is_pinned(&self, uid: &Uid) -> bool {
        lock(&self.pins).contains_key(uid)
    }

    pub fn pinned(&self) -> Vec<Uid> {
        lock(&self.pins).keys().cloned().collect()
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut pins = lock(&self.uses.pins);
        if let Some(count) = pins.get_mut(&self.uid) {
            *count -= 1;
            if *count == 0 {
                pins.remove(&self.uid);
            }
        }
    }
}

/// Each table is whole between any two statements.
fn lock<T>(table: &Mutex<T>) -> MutexGuard<'_, T> {
    table.lock().unwrap_or_else(PoisonError::into_inner)
}
