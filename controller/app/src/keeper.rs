// SPDX-License-Identifier: Apache-2.0
//! The one writer of the index.

use podveil_identity::{KubernetesName, TrustDomain};
use podveil_index::{Awaited, Index, Module, Report, Saved, Start};
use podveil_source::Cluster;
use podveil_xds_server::{Publisher, Snapshot};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

/// What the streams of reports say.
#[derive(Debug)]
pub(crate) enum Event {
    Connected {
        node: KubernetesName,
        module: Module,
    },
    Disconnected {
        node: KubernetesName,
        module: Module,
    },
    Reported {
        node: KubernetesName,
        module: Module,
        report: Report,
    },
}

/// The index, written by [`Keeper`] and read for status and metrics.
#[derive(Clone, Debug)]
pub(crate) struct Shared(Arc<Mutex<Index>>);

impl Shared {
    pub(crate) fn new(saved: Saved, start: Start) -> Self {
        Self(Arc::new(Mutex::new(Index::new(saved, start))))
    }

    pub(crate) fn status(&self) -> podveil_index::Status {
        self.lock().status(now())
    }

    pub(crate) fn letting_go(&self) -> podveil_index::LettingGo {
        self.lock().letting_go(now())
    }

    fn lock(&self) -> MutexGuard<'_, Index> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The one clock, which tests may pause.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// CANCEL: nothing is missed.
async fn changed_after(
    cluster: &mut watch::Receiver<Option<Arc<Cluster>>>,
    rested: Instant,
) -> Result<(), watch::error::RecvError> {
    tokio::time::sleep_until(rested.into()).await;
    cluster.changed().await
}

#[derive(Debug)]
pub(crate) struct Keeper {
    pub index: Shared,
    pub trust_domain: TrustDomain,
    pub cluster: watch::Receiver<Option<Arc<Cluster>>>,
    pub events: mpsc::Receiver<Event>,
    pub publisher: Publisher,
    pub saved: watch::Sender<Saved>,
    /// What nodes that take their configuration elsewhere are asked for.
    pub awaited: watch::Sender<Arc<Awaited>>,
}

impl Keeper {
    /// Ends with `stop`, or when the source is gone.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        self.apply();
        // A new state costs as much as the cluster is large. However fast they come, there is as much rest as work.
        let mut began = Some(now());
        let mut rested = now();
        loop {
            let wakeup = self.advance();
            if let Some(began) = began.take() {
                let ended = now();
                rested = ended + ended.saturating_duration_since(began);
            }
            let wait = async {
                match wakeup {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                changed = changed_after(&mut self.cluster, rested) => match changed {
                    Ok(()) => {
                        began = Some(now());
                        self.apply();
                    }
                    Err(_) => return,
                },
                event = self.events.recv() => match event {
                    Some(event) => self.take(event),
                    None => return,
                },
                () = wait => {}
            }
        }
    }

    fn apply(&mut self) {
        let Some(cluster) = self.cluster.borrow_and_update().clone() else {
            return;
        };
        if cluster.trust_domain == self.trust_domain {
            self.index.lock().apply(now(), &cluster);
        } else {
            tracing::error!(
                configured = %self.trust_domain,
                found = %cluster.trust_domain,
                "the cluster state is of another trust domain; the last good one stays in use"
            );
        }
    }

    /// Takes the event and all that wait behind it, so that one pass answers them all.
    fn take(&mut self, first: Event) {
        let mut index = self.index.lock();
        let mut next = Some(first);
        while let Some(event) = next {
            match event {
                Event::Connected { node, module } => index.connected(now(), &node, module),
                Event::Disconnected { node, module } => index.disconnected(now(), &node, module),
                Event::Reported {
                    node,
                    module,
                    report,
                } => index.report(now(), &node, module, report),
            }
            next = self.events.try_recv().ok();
        }
    }

    /// Publishes until nothing is due any more; says when to look again.
    fn advance(&self) -> Option<Instant> {
        let mut index = self.index.lock();
        let mut published = false;
        while let Some(snapshot) = index.poll(now()) {
            let number = self.publisher.publish(Snapshot {
                workloads: snapshot.workloads,
                services: snapshot.services,
                policies: snapshot.policies,
                mesh: Some(snapshot.mesh),
            });
            index.published(number);
            published = true;
        }
        if published {
            self.awaited.send_replace(Arc::new(index.awaited()));
        }
        if let Some(saved) = index.take_unsaved() {
            self.saved.send_replace(saved);
        }
        index.next_wakeup()
    }
}
