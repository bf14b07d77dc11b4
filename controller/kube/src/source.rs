// SPDX-License-Identifier: Apache-2.0
use crate::follow::{Shared, follow};
use crate::join::{self, Join, RECOVERED};
use crate::kinds::{
    CiliumConfigs, Kind, Markers, Namespaces, Nodes, Pods, ServiceRanges, Services, Slices,
};
use kube::Client;
use podveil_identity::{KubernetesName, TrustDomain};
use podveil_source::{Cluster, Defaults, Status};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// After the first change of a burst, how long to wait for the rest: a pod and its endpoint slice, the pods of a rollout.
const SETTLE: Duration = Duration::from_millis(3);
/// The ConfigMap in our own namespace that says when Podveil is to be taken out.
pub const UNINSTALL_CONFIG_MAP: &str = "podveil-uninstall";

/// Namespace and name of the ConfigMap that Cilium's agent is configured by.
const CILIUM: (&str, &str) = ("kube-system", "cilium-config");

/// What is read.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Scope {
    /// All that the nodes are told.
    All,
    /// Pods and namespaces only: who may have which identity.
    Pods,
}

#[derive(Clone, Debug)]
pub struct KubeOptions {
    /// Of the whole cluster; the API does not know it.
    pub trust_domain: TrustDomain,
    pub scope: Scope,
    /// The namespace of Podveil's own programs: never enrolled.
    pub own_namespace: KubernetesName,
    /// What holds where a namespace's labels say nothing.
    pub defaults: Defaults,
    /// Begin with pods also where Cilium's own `encryption.type=ztunnel` is on.
    pub take_over: bool,
}

/// A cluster that is being followed.
#[derive(Clone, Debug)]
pub struct KubeSource {
    cluster: watch::Receiver<Option<Arc<Cluster>>>,
    status: watch::Receiver<Status>,
}

impl KubeSource {
    /// Starts to follow the cluster until `stop`. Must be called on a tokio runtime.
    pub fn start(client: Client, options: KubeOptions, stop: CancellationToken) -> Self {
        let (cluster_tx, cluster) = watch::channel(None);
        let (status_tx, status) = watch::channel(Status::default());
        let shared = Shared::default();
        let watches = Watches {
            client,
            shared: shared.clone(),
            stop: stop.clone(),
        };
        watches.start::<Pods>(None, None);
        watches.start::<Namespaces>(None, None);
        if options.scope == Scope::All {
            watches.start::<Nodes>(None, None);
            watches.start::<Services>(None, None);
            watches.start::<Slices>(None, None);
            watches.start::<ServiceRanges>(None, None);
            if !options.take_over {
                watches.start::<CiliumConfigs>(CILIUM.0.parse().ok().as_ref(), Some(CILIUM.1));
            }
            watches.start::<Markers>(Some(&options.own_namespace), Some(UNINSTALL_CONFIG_MAP));
        }
        let joining = keep_joined(Join::new(options), shared, cluster_tx, status_tx);
        tokio::spawn(async move {
            stop.run_until_cancelled(joining).await;
        });
        Self { cluster, status }
    }

    /// `None` until every watch has read its whole list; then the newest state.
    pub fn cluster(&self) -> watch::Receiver<Option<Arc<Cluster>>> {
        self.cluster.clone()
    }

    pub fn status(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }
}

struct Watches {
    client: Client,
    shared: Shared,
    stop: CancellationToken,
}

impl Watches {
    /// Everywhere, or in one namespace; all objects, or the one of this name.
    fn start<K: Kind>(&self, namespace: Option<&KubernetesName>, name: Option<&str>) {
        let api = K::api(self.client.clone(), namespace.map(KubernetesName::as_str));
        let fields = name.map(|name| format!("metadata.name={name}"));
        let following = follow::<K>(api, fields, self.shared.clone());
        let stop = self.stop.clone();
        tokio::spawn(async move {
            stop.run_until_cancelled(following).await;
        });
    }
}

async fn keep_joined(
    mut join: Join,
    shared: Shared,
    cluster: watch::Sender<Option<Arc<Cluster>>>,
    status: watch::Sender<Status>,
) {
    let mut faulty = false;
    loop {
        let look_again = async {
            if faulty {
                tokio::time::sleep(RECOVERED).await;
            } else {
                std::future::pending().await
            }
        };
        tokio::select! {
            () = shared.changed.notified() => tokio::time::sleep(SETTLE).await,
            () = look_again => {}
        }
        let (newest, fault) = {
            let mut tables = shared.lock();
            (join.cluster(&tables), join::fault(&mut tables))
        };
        faulty = fault.is_some();
        let changed = newest.is_some();
        status.send_modify(|status| {
            status.changes += u64::from(changed);
            status.error = fault.map(|sentence| Arc::new(Fault(sentence)) as _);
        });
        if let Some(newest) = newest {
            cluster.send_replace(Some(Arc::new(newest)));
        }
    }
}

/// A watch that is broken, in one sentence.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Fault(Arc<str>);
