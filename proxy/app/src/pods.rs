// SPDX-License-Identifier: Apache-2.0
//! The pods that this proxy serves, as the ZDS agent tells them.
//!
//! Each pod has one task for each path (outbound, inbound, plain inbound), a hold on its identity's certificate, and a
//! token that ends them all. Changes are made one at a time; reports and the admin page read in between.
//!
//! A pod whose listeners cannot be had is *pending*: the agent is told, and they are tried for again every
//! [`RETRY`]. A pod that comes again with other listeners (its holder was restarted) takes new connections from those;
//! connections that it has go on.

mod listeners;
mod pod;

pub use listeners::{ListenerSource, PodListenersError};
pub use pod::PodState;

use crate::metrics::{NodeMetrics, Shown, TrafficMetrics};
use crate::zds::{AddedWorkload, WorkloadInfo, Workloads};
use pod::Pod;
use podveil_ca_client::{TrustBundle, WorkloadCertificates};
use podveil_identity::{IdentityError, TrustDomain, WorkloadIdentity};
use podveil_inbound::Kubelet;
use podveil_model::Uid;
use podveil_netns::{NetNs, NetNsError};
use podveil_state::{Limits, StateHandle};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Between two tries for a pending pod's listeners, as the peers have it.
const RETRY: Duration = Duration::from_secs(5);
/// Between two looks whether connections are open.
const LOOK: Duration = Duration::from_millis(20);

/// What every pod of this process is given.
#[derive(Debug)]
pub struct Shared {
    pub trust_domain: TrustDomain,
    pub listeners: ListenerSource,
    /// On the sockets made in pods; `None` makes them without privileges.
    pub mark: Option<u32>,
    pub kubelet: Arc<dyn Kubelet>,
    pub limits: Limits,
    pub state: StateHandle,
    pub certificates: WorkloadCertificates,
    pub bundle: watch::Receiver<Arc<TrustBundle>>,
    pub traffic: Arc<TrafficMetrics>,
    pub metrics: NodeMetrics,
    /// Stop accepting in every pod.
    pub drain: CancellationToken,
    /// End every connection of every pod.
    pub stop: CancellationToken,
}

/// Why a pod is not served. Told to the agent and in reports.
#[derive(Debug, thiserror::Error)]
pub enum AddError {
    #[error("the pod has no legal identity")]
    Identity(#[source] IdentityError),
    #[error("no listeners")]
    Listeners(#[source] PodListenersError),
    #[error("the descriptor is not a network namespace")]
    Namespace(#[source] NetNsError),
    #[error("the proxy is stopping")]
    Stopping,
}

/// The pods, shared by those who change them and those who read them.
#[derive(Clone, Debug)]
pub struct Pods {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    shared: Arc<Shared>,
    table: Mutex<BTreeMap<Uid, Entry>>,
    /// Held by whoever changes pods, over its waits: the table itself is never locked over one.
    turn: tokio::sync::Mutex<()>,
    changes: watch::Sender<u64>,
}

#[derive(Debug)]
enum Entry {
    Pending(Pending),
    Up(Arc<Pod>),
}

#[derive(Clone, Debug)]
struct Pending {
    info: WorkloadInfo,
    identity: WorkloadIdentity,
    netns: Arc<NetNs>,
    reason: Arc<str>,
}

impl Pods {
    pub fn new(shared: Shared) -> Self {
        Self {
            inner: Arc::new(Inner {
                shared: Arc::new(shared),
                table: Mutex::default(),
                turn: tokio::sync::Mutex::default(),
                changes: watch::Sender::new(0),
            }),
        }
    }

    /// Tells of each change in [`Self::states`] but the number of connections.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.inner.changes.subscribe()
    }

    /// Every pod that the agent told of, by uid.
    pub fn states(&self) -> Vec<PodState> {
        let table = self.table();
        table
            .iter()
            .map(|(uid, entry)| match entry {
                Entry::Pending(pending) => PodState {
                    uid: uid.clone(),
                    info: pending.info.clone(),
                    identity: pending.identity.clone(),
                    ready: Err(pending.reason.clone()),
                    carried: 0,
                },
                Entry::Up(pod) => pod.state(),
            })
            .collect()
    }

    /// The open connections of a pod, at most `limit` of them.
    pub fn connections(&self, uid: &Uid, limit: usize) -> Vec<Shown> {
        let pod = match self.table().get(uid) {
            Some(Entry::Up(pod)) => pod.clone(),
            Some(Entry::Pending(_)) | None => return Vec::new(),
        };
        pod.connections(limit)
    }

    /// Pods whose listeners are not served.
    pub fn pending(&self) -> usize {
        let pending = |entry: &&Entry| matches!(entry, Entry::Pending(_));
        self.table().values().filter(pending).count()
    }

    /// Tries again for the listeners of pending pods, until `stop`.
    pub async fn retry(&self, stop: &CancellationToken) {
        let tries = async {
            loop {
                tokio::time::sleep(RETRY).await;
                let _turn = self.inner.turn.lock().await;
                for (uid, pending) in self.all_pending() {
                    let _reported = self.take(&uid, pending).await;
                }
            }
        };
        let _stopped: Option<()> = stop.run_until_cancelled(tries).await;
    }

    /// Waits for a moment at which no connection is open, at most `bound`; new ones are accepted meanwhile.
    pub async fn quiet(&self, bound: Duration) {
        let open = || {
            let table = self.table();
            table.values().any(|entry| match entry {
                Entry::Pending(_) => false,
                Entry::Up(pod) => pod.carried() > 0,
            })
        };
        let quiet = async {
            while open() {
                tokio::time::sleep(LOOK).await;
            }
        };
        // Those that are open then are for the drain.
        let _in_time = tokio::time::timeout(bound, quiet).await;
    }

    /// Stops accepting, gives connections `bound` to end, then ends them. No pod is taken any more.
    pub async fn drain(&self, bound: Duration) {
        let shared = &self.inner.shared;
        shared.drain.cancel();
        let _turn = self.inner.turn.lock().await;
        let pods: Vec<Arc<Pod>> = std::mem::take(&mut *self.table())
            .into_values()
            .filter_map(|entry| match entry {
                Entry::Pending(_) => None,
                Entry::Up(pod) => Some(pod),
            })
            .collect();
        let ended = async {
            for pod in &pods {
                pod.ended().await;
            }
        };
        if tokio::time::timeout(bound, ended).await.is_err() {
            let carried: u32 = pods.iter().map(|pod| pod.carried()).sum();
            tracing::warn!(carried, "the drain bound has passed; connections are reset");
        }
        shared.stop.cancel();
        for pod in pods {
            pod.end().await;
        }
        self.changed();
    }

    async fn add(&self, workload: AddedWorkload) -> Result<(), AddError> {
        let AddedWorkload { uid, info, netns } = workload;
        if self.inner.shared.drain.is_cancelled() {
            return Err(AddError::Stopping);
        }
        let netns = Arc::new(NetNs::from_fd(netns).map_err(AddError::Namespace)?);
        let trust_domain = self.inner.shared.trust_domain.clone();
        let identity = WorkloadIdentity::new(trust_domain, &info.namespace, &info.service_account)
            .map_err(AddError::Identity)?;
        let replaced = match self.table().get(&uid) {
            Some(Entry::Up(pod)) => !pod.is_in(&netns) || pod.identity() != &identity,
            Some(Entry::Pending(_)) | None => false,
        };
        if !info.addresses.is_empty() {
            let state = &self.inner.shared.state;
            state.tell_local(uid.clone(), info.addresses.clone()).await;
        }
        if replaced {
            tracing::info!(%uid, "the pod has another network namespace or identity; its former one ends");
            self.remove(&uid).await;
        }
        let pending = Pending {
            info,
            identity,
            netns,
            reason: "its listeners are being taken".into(),
        };
        self.take(&uid, pending).await
    }

    /// Gets the pod's listeners and serves them; the pod is pending if that fails.
    async fn take(&self, uid: &Uid, pending: Pending) -> Result<(), AddError> {
        let shared = &self.inner.shared;
        let known = match self.table().get(uid) {
            Some(Entry::Up(pod)) => Some(pod.clone()),
            Some(Entry::Pending(_)) | None => None,
        };
        if known.is_some() && !shared.listeners.may_change() {
            return Ok(());
        }
        let listeners = match shared.listeners.of(uid, &pending.netns).await {
            Ok(listeners) => listeners,
            // What is served goes on being served.
            Err(error) if known.is_some() => return Err(AddError::Listeners(error)),
            Err(error) => {
                let error = AddError::Listeners(error);
                let reason: Arc<str> = sentence(&error).into();
                tracing::warn!(%uid, %reason, "a pod cannot be served yet");
                self.table()
                    .insert(uid.clone(), Entry::Pending(Pending { reason, ..pending }));
                self.changed();
                return Err(error);
            }
        };
        match known {
            Some(pod) => pod.serve_anew(listeners),
            None => {
                let Pending {
                    info,
                    identity,
                    netns,
                    ..
                } = pending;
                let identity_text = identity.to_string();
                let changes = self.inner.changes.clone();
                let pod = Pod::start(
                    shared.clone(),
                    uid.clone(),
                    info,
                    identity,
                    netns,
                    listeners,
                    changes,
                );
                tracing::info!(%uid, identity = identity_text, "a pod is served");
                self.table().insert(uid.clone(), Entry::Up(Arc::new(pod)));
                shared.metrics.pods_started.inc();
            }
        }
        self.changed();
        Ok(())
    }

    /// Ends everything of the pod and waits until it has ended.
    async fn remove(&self, uid: &Uid) {
        let entry = self.table().remove(uid);
        self.changed();
        if let Some(Entry::Up(pod)) = entry {
            pod.end().await;
            self.inner.shared.metrics.pods_stopped.inc();
            tracing::info!(%uid, "a pod is no longer served");
        }
    }

    fn all_pending(&self) -> Vec<(Uid, Pending)> {
        let table = self.table();
        table
            .iter()
            .filter_map(|(uid, entry)| match entry {
                Entry::Pending(pending) => Some((uid.clone(), pending.clone())),
                Entry::Up(_) => None,
            })
            .collect()
    }

    fn changed(&self) {
        let (mut up, mut pending) = (0, 0);
        for entry in self.table().values() {
            match entry {
                Entry::Pending(_) => pending += 1,
                Entry::Up(_) => up += 1,
            }
        }
        self.inner.shared.metrics.active_pods.set(up);
        self.inner.shared.metrics.pending_pods.set(pending);
        self.inner.changes.send_modify(|number| *number += 1);
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<Uid, Entry>> {
        // Every change of the table is one call, so a panic elsewhere leaves it whole.
        self.inner
            .table
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Workloads for Pods {
    async fn add(&mut self, workload: AddedWorkload) -> Result<(), String> {
        let _turn = self.inner.turn.lock().await;
        Self::add(self, workload)
            .await
            .map_err(|error| sentence(&error))
    }

    async fn delete(&mut self, uid: &Uid) {
        let _turn = self.inner.turn.lock().await;
        self.remove(uid).await;
    }

    async fn retain(&mut self, named: &BTreeSet<Uid>) {
        let _turn = self.inner.turn.lock().await;
        let gone: Vec<Uid> = {
            let table = self.table();
            table
                .keys()
                .filter(|uid| !named.contains(*uid))
                .cloned()
                .collect()
        };
        for uid in gone {
            self.remove(&uid).await;
        }
    }
}

/// An error with its sources, for another process.
fn sentence(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
