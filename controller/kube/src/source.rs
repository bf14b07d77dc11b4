// SPDX-License-Identifier: Apache-2.0
use kube::Client;
use podveil_identity::{KubernetesName, TrustDomain};
use podveil_source::{Cluster, Status};
use std::sync::Arc;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

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
        tokio::spawn(async move {
            stop.cancelled().await;
            drop((client, options, cluster_tx, status_tx));
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
