// SPDX-License-Identifier: Apache-2.0
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// What the CA waits for before it is ready, for `/healthz/ready`. Every clone speaks of one thing.
#[derive(Clone, Debug)]
pub struct Waiting {
    list: List,
    what: &'static str,
}

/// All that is waited for.
#[derive(Clone, Debug, Default)]
pub struct List(Arc<Mutex<BTreeMap<&'static str, String>>>);

impl List {
    /// `what` names the thing in here only.
    pub fn add(&self, what: &'static str, text: impl Into<String>) -> Waiting {
        let waiting = Waiting {
            list: self.clone(),
            what,
        };
        waiting.set(text);
        waiting
    }

    /// One line for each thing; empty when the CA is ready.
    pub fn lines(&self) -> Vec<String> {
        let list = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        list.values().cloned().collect()
    }
}

impl Waiting {
    pub fn set(&self, text: impl Into<String>) {
        let mut list = self.list.0.lock().unwrap_or_else(PoisonError::into_inner);
        list.insert(self.what, text.into());
    }

    pub fn done(&self) {
        let mut list = self.list.0.lock().unwrap_or_else(PoisonError::into_inner);
        list.remove(self.what);
    }
}
