// SPDX-License-Identifier: Apache-2.0
use crate::entitlement::Entitlements;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;

/// A node may know of a pod a moment before the CA does.
pub const AHEAD: Duration = Duration::from_secs(3);
/// Questions that wait for that at once; above it they are answered at once.
const MAX_WAITING: usize = 1024;

/// The CA's newest reading of the cluster, for questions that may be a moment ahead of it.
#[derive(Clone, Debug)]
pub struct Reading {
    entitlements: watch::Receiver<Option<Arc<Entitlements>>>,
    waiting: Arc<Semaphore>,
}

/// Why there is no yes.
#[derive(Debug, Eq, PartialEq)]
pub enum No<E> {
    Because(E),
    /// The cluster has not been read yet.
    NotReady,
}

impl Reading {
    pub fn new(entitlements: watch::Receiver<Option<Arc<Entitlements>>>) -> Self {
        Self {
            entitlements,
            waiting: Arc::new(Semaphore::new(MAX_WAITING)),
        }
    }

    /// Asks again with each new reading, for at most [`AHEAD`], while the answer is a no that time may change (`passing`).
    ///
    /// # Errors
    /// The last no; [`No::NotReady`] at once where there is no reading.
    pub async fn when<E>(
        &self,
        check: impl Fn(&Entitlements) -> Result<(), E>,
        passing: impl Fn(&E) -> bool,
    ) -> Result<(), No<E>> {
        let deadline = Instant::now() + AHEAD;
        let mut entitlements = self.entitlements.clone();
        let mut slot = None;
        loop {
            let no = match &*entitlements.borrow_and_update() {
                None => return Err(No::NotReady),
                Some(read) => match check(read) {
                    Ok(()) => return Ok(()),
                    Err(no) => no,
                },
            };
            if !passing(&no) {
                return Err(No::Because(no));
            }
            if slot.is_none() {
                match self.waiting.try_acquire() {
                    Ok(taken) => slot = Some(taken),
                    Err(_) => return Err(No::Because(no)),
                }
            }
            match tokio::time::timeout_at(deadline, entitlements.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => return Err(No::Because(no)),
            }
        }
    }

    /// Names of the CA's own pods.
    pub fn replicas(&self) -> Vec<Arc<str>> {
        let entitlements = self.entitlements.borrow();
        entitlements
            .iter()
            .flat_map(|read| read.replicas().iter().cloned())
            .collect()
    }
}
