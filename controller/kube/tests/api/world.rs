// SPDX-License-Identifier: Apache-2.0
//! An API server, a source that follows it, and objects as JSON.

use crate::relay::Relay;
use futures::StreamExt as _;
use podveil_cluster::{ApiServer, Controllers};
use podveil_kube::k8s_openapi::api::core::v1 as core;
use podveil_kube::k8s_openapi::api::discovery::v1::EndpointSlice;
use podveil_kube::kube::api::{
    DeleteParams, Patch, PatchParams, PostParams, WatchEvent, WatchParams,
};
use podveil_kube::kube::config::{KubeConfigOptions, Kubeconfig};
use podveil_kube::kube::{Api, Client, Config};
use podveil_kube::{KubeOptions, KubeSource, Patience, Scope};
use podveil_source::{Cluster, Pod, Status};
use serde_json::{Value, json};
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

/// Far above what any step takes; reached only when a state never comes.
const DEADLINE: Duration = Duration::from_secs(60);

/// Of clients that a test takes the server from: none waits for long.
pub const PATIENCE: Patience = Patience {
    answer: Duration::from_secs(5),
    silence: Duration::from_secs(4),
};

pub struct World {
    server: ApiServer,
    client: Client,
    source: Followed,
}

/// A source, as it is seen.
pub struct Followed {
    cluster: watch::Receiver<Option<Arc<Cluster>>>,
    status: watch::Receiver<Status>,
    _stop: DropGuard,
}

/// A source with something between it and the server.
pub struct Relayed {
    pub relay: Relay,
    source: Followed,
}

impl Followed {
    fn start(client: Client) -> Self {
        let stop = CancellationToken::new();
        let options = KubeOptions {
            trust_domain: podveil_identity::TrustDomain::new("cluster.local").unwrap(),
            scope: Scope::All,
            own_namespace: "podveil-system".parse().unwrap(),
            defaults: Default::default(),
            take_over: false,
        };
        let source = KubeSource::start(client, options, stop.clone());
        Self {
            cluster: source.cluster(),
            status: source.status(),
            _stop: stop.drop_guard(),
        }
    }

    pub fn cluster(&self) -> Arc<Cluster> {
        self.cluster.borrow().clone().unwrap()
    }

    pub fn changes(&self) -> u64 {
        self.status.borrow().changes
    }

    /// Waits for a state in which something is found.
    pub async fn until<T>(&self, what: &str, find: impl Fn(&Cluster) -> Option<T>) -> T {
        let mut cluster = self.cluster.clone();
        let waited = tokio::time::timeout(DEADLINE, async {
            loop {
                let newest = cluster.borrow_and_update().clone();
                if let Some(found) = newest.as_deref().and_then(&find) {
                    return found;
                }
                cluster.changed().await.unwrap();
            }
        });
        waited
            .await
            .unwrap_or_else(|_| panic!("not in time: {what}"))
    }

    pub async fn until_status(&self, what: &str, holds: impl Fn(&Status) -> bool) {
        let mut status = self.status.clone();
        tokio::time::timeout(2 * DEADLINE, status.wait_for(|status| holds(status)))
            .await
            .unwrap_or_else(|_| panic!("not in time: {what}"))
            .unwrap();
    }
}

impl Deref for World {
    type Target = Followed;

    fn deref(&self) -> &Followed {
        &self.source
    }
}

impl Deref for Relayed {
    type Target = Followed;

    fn deref(&self) -> &Followed {
        &self.source
    }
}

pub fn named(cluster: &Cluster, name: &str) -> Option<Arc<Pod>> {
    cluster.pods.iter().find(|pod| &*pod.name == name).cloned()
}

fn object<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

impl World {
    pub async fn start() -> Self {
        let server =
            tokio::task::spawn_blocking(|| ApiServer::start_with(Controllers::None).unwrap())
                .await
                .unwrap();
        let kubeconfig = Kubeconfig::read_from(server.kubeconfig()).unwrap();
        let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
            .await
            .unwrap();
        let client = Client::try_from(config).unwrap();
        let world = Self {
            server,
            source: Followed::start(client.clone()),
            client,
        };
        let nodes: Api<core::Node> = Api::all(world.client.clone());
        let node =
            object(json!({"metadata": {"name": "n1"}, "spec": {"podCIDRs": ["10.244.0.0/24"]}}));
        nodes.create(&PostParams::default(), &node).await.unwrap();
        world
            .until("the first state", |cluster| {
                (!cluster.nodes.is_empty()).then_some(())
            })
            .await;
        world
    }

    /// Another source, by way of a relay.
    pub async fn relayed(&self) -> Relayed {
        let address = self.server.url().strip_prefix("https://").unwrap();
        let relay = Relay::start(address.parse().unwrap()).await;
        let kubeconfig = Kubeconfig::read_from(self.server.kubeconfig()).unwrap();
        let options = KubeConfigOptions::default();
        let mut config = Config::from_custom_kubeconfig(kubeconfig, &options)
            .await
            .unwrap();
        config.cluster_url = format!("https://{}", relay.address).parse().unwrap();
        let client = podveil_kube::client_of(&config, PATIENCE).unwrap();
        Relayed {
            relay,
            source: Followed::start(client),
        }
    }

    /// The code of the error by which a watch of pods from this version on begins, if it does.
    pub async fn watch_from(&self, version: u64) -> Option<u16> {
        let pods: Api<core::Pod> = Api::all(self.client.clone());
        let params = WatchParams::default().timeout(5);
        let mut events = match pods.watch(&params, &version.to_string()).await {
            Ok(events) => events.boxed(),
            Err(podveil_kube::kube::Error::Api(status)) => return Some(status.code),
            Err(error) => panic!("{error}"),
        };
        match events.next().await {
            Some(Ok(WatchEvent::Error(status))) => Some(status.code),
            _ => None,
        }
    }

    pub async fn namespace(&self, name: &str, labels: Value) {
        let api: Api<core::Namespace> = Api::all(self.client.clone());
        let namespace = object(json!({"metadata": {"name": name, "labels": labels}}));
        api.create(&PostParams::default(), &namespace)
            .await
            .unwrap();
        // Without controllers nobody makes the account that a pod is given.
        let accounts: Api<core::ServiceAccount> = Api::namespaced(self.client.clone(), name);
        let account = object(json!({"metadata": {"name": "default"}}));
        accounts
            .create(&PostParams::default(), &account)
            .await
            .unwrap();
    }

    pub async fn label_namespace(&self, name: &str, labels: Value) {
        let api: Api<core::Namespace> = Api::all(self.client.clone());
        let patch = Patch::Merge(json!({"metadata": {"labels": labels}}));
        api.patch(name, &PatchParams::default(), &patch)
            .await
            .unwrap();
    }

    fn pods(&self, namespace: &str) -> Api<core::Pod> {
        Api::namespaced(self.client.clone(), namespace)
    }

    /// Bound to the node; `more` may give ports and annotations.
    pub async fn pod(&self, namespace: &str, name: &str, more: Value) {
        let pod = object(json!({
            "metadata": {"name": name, "annotations": more.get("annotations")},
            "spec": {
                "nodeName": "n1",
                "automountServiceAccountToken": false,
                "containers": [{"name": "c", "image": "none", "ports": more.get("ports")}],
            },
        }));
        self.pods(namespace)
            .create(&PostParams::default(), &pod)
            .await
            .unwrap();
    }

    pub async fn pod_status(&self, namespace: &str, name: &str, mut status: Value) {
        if let Some(ip) = status.pointer("/podIPs/0/ip").cloned() {
            status["podIP"] = ip;
        }
        let patch = Patch::Merge(json!({"status": status}));
        self.pods(namespace)
            .patch_status(name, &PatchParams::default(), &patch)
            .await
            .unwrap();
    }

    pub async fn annotate_pod(&self, namespace: &str, name: &str, annotations: Value) {
        let patch = Patch::Merge(json!({"metadata": {"annotations": annotations}}));
        self.pods(namespace)
            .patch(name, &PatchParams::default(), &patch)
            .await
            .unwrap();
    }

    pub async fn delete_pod(&self, namespace: &str, name: &str) {
        let now = DeleteParams::default().grace_period(0);
        self.pods(namespace).delete(name, &now).await.unwrap();
    }

    pub async fn service(&self, namespace: &str, name: &str, spec: Value) {
        let api: Api<core::Service> = Api::namespaced(self.client.clone(), namespace);
        let service = object(json!({"metadata": {"name": name}, "spec": spec}));
        api.create(&PostParams::default(), &service).await.unwrap();
    }

    pub async fn slice(
        &self,
        namespace: &str,
        name: &str,
        service: &str,
        port_name: &str,
        port: u16,
        endpoints: Value,
    ) {
        let api: Api<EndpointSlice> = Api::namespaced(self.client.clone(), namespace);
        let slice = object(json!({
            "metadata": {"name": name, "labels": {"kubernetes.io/service-name": service}},
            "addressType": "IPv4",
            "ports": [{"name": port_name, "port": port}],
            "endpoints": endpoints,
        }));
        api.create(&PostParams::default(), &slice).await.unwrap();
    }

    pub fn kill_server(&mut self) {
        self.server.kill();
    }

    pub fn resume_server(&mut self) {
        tokio::task::block_in_place(|| self.server.resume().unwrap());
    }
}
