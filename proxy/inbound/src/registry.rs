// SPDX-License-Identifier: Apache-2.0
//! The living connections of one pod, held against every change of the state.

use crate::rules::{self, Facts, Moment, Refused};
use podveil_state::{StateHandle, View};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

/// INVARIANT: the rules are asked about a connection once more after it is entered, so that a change in between reaches
/// it one way or the other.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    entries: Mutex<Entries>,
}

#[derive(Debug, Default)]
struct Entries {
    next: u64,
    living: HashMap<u64, Entry>,
}

#[derive(Debug)]
struct Entry {
    facts: Facts,
    revoke: oneshot::Sender<Refused>,
}

/// A place in the registry; leaving it is dropping this.
#[derive(Debug)]
pub(crate) struct Entered {
    registry: Arc<Registry>,
    number: u64,
    revoked: Option<oneshot::Receiver<Refused>>,
}

impl Registry {
    fn lock(&self) -> std::sync::MutexGuard<'_, Entries> {
        // The table is whole between any two statements, so a panic elsewhere cannot have broken it.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a connection; from now on it can be revoked.
    pub fn enter(self: &Arc<Self>, facts: Facts) -> Entered {
        let (revoke, revoked) = oneshot::channel();
        let mut entries = self.lock();
        let number = entries.next;
        entries.next += 1;
        entries.living.insert(number, Entry { facts, revoke });
        Entered {
            registry: self.clone(),
            number,
            revoked: Some(revoked),
        }
    }

    /// Ends every connection that the rules no longer allow.
    fn review(&self, view: &View) {
        let mut entries = self.lock();
        let refused: Vec<_> = entries
            .living
            .iter()
            .filter_map(|(number, entry)| {
                let answer = rules::check(view, &entry.facts, Moment::Living);
                answer.err().map(|refused| (*number, refused))
            })
            .collect();
        for (number, refused) in refused {
            if let Some(entry) = entries.living.remove(&number) {
                let _already_over = entry.revoke.send(refused);
            }
        }
    }

    /// Holds the connections against the state as long as `serving` goes on, on a task of its own: many changes must not
    /// hold up who is accepted.
    pub async fn watch_while(
        self: &Arc<Self>,
        state: &StateHandle,
        serving: impl Future<Output = ()>,
    ) {
        let closing = CancellationToken::new();
        let watching = tokio::spawn({
            let (registry, state, closing) = (self.clone(), state.clone(), closing.clone());
            async move { registry.watch(state, closing).await }
        });
        serving.await;
        closing.cancel();
        let _ended = watching.await;
    }

    /// Reviews at every change of the state, until `stop`.
    pub async fn watch(&self, state: StateHandle, stop: CancellationToken) {
        let mut changed = state.changed();
        // Connections entered before this began were checked against a view at least this old.
        self.review(&state.view());
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                change = changed.changed() => if change.is_err() { return },
            }
            self.review(&state.view());
        }
    }
}

impl Entered {
    /// Resolves when the connection must end.
    pub fn revoked(&mut self) -> impl Future<Output = Refused> + Send + use<> {
        let revoked = self.revoked.take();
        async move {
            match revoked {
                Some(revoked) => match revoked.await {
                    Ok(refused) => refused,
                    // The sender goes only with the entry, and the entry outlives the connection.
                    Err(_) => std::future::pending().await,
                },
                None => std::future::pending().await,
            }
        }
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.registry.lock().living.remove(&self.number);
    }
}
