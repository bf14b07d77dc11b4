// SPDX-License-Identifier: Apache-2.0
use crate::published::Published;
use crate::{Snapshot, Version};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::watch;

/// Holds the newest snapshot and wakes subscribers when it changes. Clones share it.
///
/// Before the first [`publish`](Self::publish) streams are held open without an answer: an empty answer would tell a
/// reconnecting node to forget everything it knows.
#[derive(Clone, Debug)]
pub struct Publisher {
    instance: u64,
    /// `None` before the first.
    current: watch::Sender<Option<Arc<Published>>>,
    /// Held while a snapshot is made, so that two are not made from one.
    publishing: Arc<Mutex<()>>,
}

impl Publisher {
    /// `instance`: when this server started, milliseconds since 1970.
    pub fn new(instance: u64) -> Self {
        Self {
            instance,
            current: watch::Sender::new(None),
            publishing: Arc::default(),
        }
    }

    /// Makes this the state that every subscriber gets to. Returns the number of the snapshot that holds it: a new one
    /// if anything differs, else the one in place, and then nobody is woken. Works as long as it takes to compare
    /// everything and to encode what changed.
    pub fn publish(&self, snapshot: Snapshot) -> u64 {
        let _publishing = (self.publishing.lock()).unwrap_or_else(PoisonError::into_inner);
        let before = self.current.borrow().clone().unwrap_or_default();
        match before.next(snapshot) {
            Some(next) => {
                let number = next.number;
                self.current.send_replace(Some(Arc::new(next)));
                number
            }
            None => before.number,
        }
    }

    /// The version in place now; its number is 0 before the first snapshot.
    pub fn version(&self) -> Version {
        Version {
            instance: self.instance,
            number: self.current.borrow().as_ref().map_or(0, |one| one.number),
        }
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Option<Arc<Published>>> {
        self.current.subscribe()
    }

    pub(crate) fn instance(&self) -> u64 {
        self.instance
    }
}
