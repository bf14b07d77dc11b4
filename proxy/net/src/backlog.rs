// SPDX-License-Identifier: Apache-2.0
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::watch;

/// What all pods of a node may hold together, in bytes: half of the container's limit in our chart.
const BUDGET: usize = 512 * 1024 * 1024;

/// What a stream may hold without being counted: the last of the windows, so that a stream is never reset for what the
/// peer was invited to send at the tightest time. Counting in steps also keeps a reader that is fast off the counters.
const STEP: usize = 16 * 1024;

/// Windows of a stream, from much room to little. 1 MiB carries 8 Gbit/s over 1 ms of round trip.
const WINDOWS: [u32; 4] = [1024 * 1024, 256 * 1024, 64 * 1024, STEP as u32];

/// What a node holds of bytes that came through tunnels for applications that do not read them.
#[derive(Debug)]
pub struct Budget {
    bytes: usize,
    held: AtomicUsize,
}

/// One pod's part of the [`Budget`].
///
/// The more a pod holds of what is free, the smaller its streams' windows become, those of streams under way too. When
/// it holds as much as is free, a stream that gets more than [`STEP`] ahead of its reader is reset. So one pod alone
/// holds at most half of the budget, and each further one at most half of what the others left.
#[derive(Debug)]
pub struct Backlog {
    budget: Arc<Budget>,
    held: AtomicUsize,
    window: watch::Sender<u32>,
}

/// What one stream holds: read from the tunnel, not yet written onward. Dropping it gives everything back.
#[derive(Debug)]
pub struct Unread {
    backlog: Arc<Backlog>,
    bytes: usize,
    /// Of `bytes`, what the backlog knows: whole steps.
    counted: usize,
}

/// The pod holds as much as is free.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq, thiserror::Error)]
#[error("the pod's applications leave more unread than this node keeps for it")]
pub struct BacklogFull;

impl Default for Budget {
    fn default() -> Self {
        Self::of(BUDGET)
    }
}

impl Budget {
    pub fn of(bytes: usize) -> Self {
        Self {
            bytes,
            held: AtomicUsize::new(0),
        }
    }

    /// In bytes, by all pods, in whole steps of 16 KiB for each stream.
    pub fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }
}

impl Default for Backlog {
    fn default() -> Self {
        Self::of(Arc::default())
    }
}

impl Backlog {
    pub fn of(budget: Arc<Budget>) -> Self {
        Self {
            budget,
            held: AtomicUsize::new(0),
            window: watch::Sender::new(WINDOWS[0]),
        }
    }

    /// What each stream of this pod may have ahead of its reader, in bytes. Changes.
    pub fn window(&self) -> watch::Receiver<u32> {
        self.window.subscribe()
    }

    /// The largest window that there ever is.
    pub const fn largest_window() -> u32 {
        WINDOWS[0]
    }

    fn take(&self, bytes: usize) -> Result<(), BacklogFull> {
        self.budget.held.fetch_add(bytes, Ordering::Relaxed);
        self.held.fetch_add(bytes, Ordering::Relaxed);
        self.fit();
        let (own, free) = self.room();
        if own > free { Err(BacklogFull) } else { Ok(()) }
    }

    fn give_back(&self, bytes: usize) {
        self.held.fetch_sub(bytes, Ordering::Relaxed);
        self.budget.held.fetch_sub(bytes, Ordering::Relaxed);
        self.fit();
    }

    /// What this pod holds, and what nobody does.
    fn room(&self) -> (usize, usize) {
        let free = self.budget.bytes.saturating_sub(self.budget.held());
        (self.held.load(Ordering::Relaxed), free)
    }

    /// Sets the window that suits what is held. It grows again only when half as much is held as when it shrank: each
    /// change is a frame on every tunnel.
    fn fit(&self) {
        let fitting = |now: u32| {
            let (own, free) = self.room();
            window(own, free).min(now.max(window(own.saturating_mul(2), free)))
        };
        let now = *self.window.borrow();
        if fitting(now) != now {
            self.window.send_if_modified(|now| {
                let before = std::mem::replace(now, fitting(*now));
                before != *now
            });
        }
    }
}

fn window(own: usize, free: usize) -> u32 {
    let of_free = |parts: usize| own.saturating_mul(parts) <= free;
    match () {
        () if of_free(8) => WINDOWS[0],
        () if of_free(4) => WINDOWS[1],
        () if of_free(2) => WINDOWS[2],
        () => WINDOWS[3],
    }
}

impl Unread {
    pub fn new(backlog: Arc<Backlog>) -> Self {
        Self {
            backlog,
            bytes: 0,
            counted: 0,
        }
    }

    /// So many bytes came.
    ///
    /// # Errors
    /// [`BacklogFull`]: the stream is to be reset.
    pub fn came(&mut self, bytes: usize) -> Result<(), BacklogFull> {
        self.bytes += bytes;
        let due = self.steps();
        let more = due - self.counted;
        self.counted = due;
        if more > 0 {
            return self.backlog.take(more);
        }
        Ok(())
    }

    /// So many bytes went onward.
    pub fn went(&mut self, bytes: usize) {
        self.bytes = self.bytes.saturating_sub(bytes);
        let due = self.steps();
        if due < self.counted {
            self.backlog.give_back(self.counted - due);
            self.counted = due;
        }
    }

    fn steps(&self) -> usize {
        self.bytes / STEP * STEP
    }
}

impl Drop for Unread {
    fn drop(&mut self) {
        if self.counted > 0 {
            self.backlog.give_back(self.counted);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1024 * 1024;

    fn stalled(backlog: &Arc<Backlog>, bytes: usize) -> Result<Unread, BacklogFull> {
        let mut unread = Unread::new(backlog.clone());
        unread.came(bytes).map(|()| unread)
    }

    /// Streams that fill their windows and are never read, until one is refused.
    fn greedy(backlog: &Arc<Backlog>) -> Vec<Unread> {
        let mut window = backlog.window();
        let mut held = Vec::new();
        loop {
            let size = *window.borrow_and_update() as usize;
            match stalled(backlog, size) {
                Ok(unread) => held.push(unread),
                Err(BacklogFull) => return held,
            }
        }
    }

    #[test]
    fn a_greedy_pod_leaves_half_of_what_it_found() {
        for pods in 1..=4 {
            let budget = Arc::new(Budget::of(64 * MIB));
            let greedy: Vec<_> = (0..pods)
                .map(|_| {
                    let backlog = Arc::new(Backlog::of(budget.clone()));
                    (greedy(&backlog), backlog)
                })
                .collect();
            let free = 64 * MIB - budget.held();
            assert!(free >= (64 * MIB) >> pods, "{pods}: {free}");
            let other = Arc::new(Backlog::of(budget.clone()));
            assert!(stalled(&other, STEP).is_ok(), "{pods}");
            drop(greedy);
            assert_eq!(budget.held(), 0);
        }
    }

    #[test]
    fn windows_shrink_as_the_backlog_grows_and_grow_back_later() {
        let backlog = Arc::new(Backlog::of(Arc::new(Budget::of(64 * MIB))));
        let window = backlog.window();
        let mut seen = vec![*window.borrow()];
        let mut held = Vec::new();
        while let Ok(unread) = stalled(&backlog, STEP) {
            held.push(unread);
            if *window.borrow() != *seen.last().unwrap() {
                seen.push(*window.borrow());
            }
        }
        assert_eq!(seen, WINDOWS);
        let smallest_from = 64 * MIB / 3;
        while backlog.held.load(Ordering::Relaxed) > smallest_from {
            assert_eq!(*window.borrow(), WINDOWS[3]);
            held.pop();
        }
        // The same place on the way back: not yet.
        assert_eq!(*window.borrow(), WINDOWS[3]);
        held.clear();
        assert_eq!(*window.borrow(), WINDOWS[0]);
    }

    #[test]
    fn a_reader_that_keeps_up_is_not_counted() {
        let backlog = Arc::new(Backlog::default());
        let mut unread = Unread::new(backlog.clone());
        for _ in 0..1000 {
            unread.came(STEP - 1).unwrap();
            assert_eq!(backlog.budget.held(), 0);
            unread.went(STEP - 1);
        }
    }
}
