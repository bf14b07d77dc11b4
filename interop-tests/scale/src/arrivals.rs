// SPDX-License-Identifier: Apache-2.0
use podveil_model::{Health, Uid, Workload};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

/// What all subscribers together have been told: who has everything, and who has the one change that is looked for.
#[derive(Debug, Default)]
pub(crate) struct Arrivals {
    full: Mutex<Vec<(Instant, usize)>>,
    updates: AtomicU64,
    /// Something is looked for; so that all else costs nothing.
    looking: AtomicBool,
    wanted: Mutex<Option<Wanted>>,
    changed: Notify,
}

#[derive(Debug)]
struct Wanted {
    uid: Uid,
    health: Health,
    seen: Vec<Instant>,
}

impl Arrivals {
    /// A subscriber has the first answer on its stream, of so many workloads and services.
    pub(crate) fn full(&self, resources: usize) {
        lock(&self.full).push((Instant::now(), resources));
        self.changed.notify_waiters();
    }

    /// A subscriber was sent so many resources or removals.
    pub(crate) fn count(&self, updates: usize) {
        self.updates.fetch_add(updates as u64, Ordering::Relaxed);
    }

    /// How many all were sent so far.
    pub(crate) fn updates(&self) -> u64 {
        self.updates.load(Ordering::Relaxed)
    }

    /// Streams begin anew.
    pub(crate) fn forget(&self) {
        lock(&self.full).clear();
    }

    pub(crate) fn workload(&self, workload: &Workload) {
        if !self.looking.load(Ordering::Relaxed) {
            return;
        }
        if let Some(wanted) = lock(&self.wanted).as_mut()
            && wanted.uid == workload.uid
            && wanted.health == workload.health
        {
            wanted.seen.push(Instant::now());
            self.changed.notify_waiters();
        }
    }

    /// Looks for this state of a workload from now on.
    pub(crate) fn look_for(&self, uid: Uid, health: Health) {
        *lock(&self.wanted) = Some(Wanted {
            uid,
            health,
            seen: Vec::new(),
        });
        self.looking.store(true, Ordering::Relaxed);
    }

    /// When each of so many subscribers had it, in order.
    pub(crate) async fn seen_by(
        &self,
        subscribers: usize,
        patience: Duration,
    ) -> anyhow::Result<Vec<Instant>> {
        let all = self
            .wait(patience, || {
                let wanted = lock(&self.wanted);
                let seen = wanted.as_ref().map_or(&[][..], |wanted| &wanted.seen);
                (seen.len() >= subscribers).then(|| seen.to_vec())
            })
            .await;
        self.looking.store(false, Ordering::Relaxed);
        all.ok_or_else(|| {
            let seen = lock(&self.wanted)
                .as_ref()
                .map_or(0, |wanted| wanted.seen.len());
            anyhow::anyhow!("{seen} of {subscribers} subscribers had a change within {patience:?}")
        })
    }

    /// When each of so many subscribers had the first answer on its stream, and of how many resources, in order.
    pub(crate) async fn full_at(
        &self,
        subscribers: usize,
        patience: Duration,
    ) -> anyhow::Result<Vec<(Instant, usize)>> {
        let all = self
            .wait(patience, || {
                let full = lock(&self.full);
                (full.len() >= subscribers).then(|| full.clone())
            })
            .await;
        all.ok_or_else(|| {
            let full = lock(&self.full).len();
            anyhow::anyhow!("{full} of {subscribers} subscribers had an answer within {patience:?}")
        })
    }

    async fn wait<T>(&self, patience: Duration, look: impl Fn() -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + patience;
        loop {
            // Before looking, or a change in between would be missed.
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if let Some(found) = look() {
                return Some(found);
            }
            if timeout_at(deadline, changed).await.is_err() {
                return look();
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
