// SPDX-License-Identifier: Apache-2.0
//! The kinds that are watched, and what each is turned into.

use crate::table::{Kept, Table};
use crate::{endpoints, objects, pods, services};
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use kube::{Api, Client, Resource};
use podveil_identity::KubernetesName;
use podveil_source::{Namespace, Pod};
use std::fmt::Debug;
use std::sync::Arc;

/// A kind that is watched.
pub(crate) trait Kind: Send + 'static {
    const NAME: &'static str;
    /// Without it the rest is still worth something: not every cluster has it.
    const OPTIONAL: bool = false;
    type Object: Resource<DynamicType = ()>
        + Clone
        + Debug
        + serde::de::DeserializeOwned
        + Send
        + 'static;
    type Kept: Kept + Send + Sync + 'static;

    /// All of the cluster, or those of one namespace.
    fn api(client: Client, namespace: Option<&str>) -> Api<Self::Object>;
    /// `None` for an object that no API server would send.
    fn key(object: &Self::Object) -> Option<Arc<str>>;
    /// `None`: nothing of this object is of use.
    fn read(object: Self::Object) -> Option<Self::Kept>;
    fn table(tables: &mut Tables) -> &mut Table<Self::Kept>;
}

/// All that has been read.
#[derive(Debug, Default)]
pub(crate) struct Tables {
    pub namespaces: Table<Namespace>,
    pub pods: Table<Pod>,
    pub nodes: Table<objects::NodeObject>,
    pub services: Table<services::ServiceObject>,
    pub slices: Table<endpoints::Slice>,
    pub ranges: Table<objects::ServiceRange>,
    pub cilium: Table<objects::CiliumEncrypts>,
    pub markers: Table<objects::Marker>,
    /// The newest version of any object so far.
    pub version: u64,
}

pub(crate) struct Namespaces;
pub(crate) struct Pods;
pub(crate) struct Nodes;
pub(crate) struct Services;
pub(crate) struct Slices;
pub(crate) struct ServiceRanges;
pub(crate) struct CiliumConfigs;
pub(crate) struct Markers;

/// `<namespace>/<name>`, or the name alone.
fn name<K: Resource<DynamicType = ()>>(object: &K) -> Option<Arc<str>> {
    let meta = object.meta();
    let name = meta.name.as_deref()?;
    Some(match meta.namespace.as_deref() {
        Some(namespace) => format!("{namespace}/{name}").into(),
        None => name.into(),
    })
}

macro_rules! api {
    (cluster, $client:expr, $namespace:expr) => {{
        let _: Option<&str> = $namespace;
        Api::all($client)
    }};
    (namespaced, $client:expr, $namespace:expr) => {
        match $namespace {
            Some(namespace) => Api::namespaced($client, namespace),
            None => Api::all($client),
        }
    };
}

macro_rules! kind {
    ($kind:ident, $scope:ident, $name:literal, $object:ty, $kept:ty, $read:path, $key:expr, $table:ident, $optional:literal) => {
        impl Kind for $kind {
            const NAME: &'static str = $name;
            const OPTIONAL: bool = $optional;
            type Object = $object;
            type Kept = $kept;

            fn api(client: Client, namespace: Option<&str>) -> Api<$object> {
                api!($scope, client, namespace)
            }

            fn key(object: &$object) -> Option<Arc<str>> {
                $key(object)
            }

            fn read(object: $object) -> Option<$kept> {
                $read(object)
            }

            fn table(tables: &mut Tables) -> &mut Table<$kept> {
                &mut tables.$table
            }
        }
    };
}

// A pod by its UID: one that replaces another may be seen before the other is gone.
kind!(
    Pods,
    namespaced,
    "pods",
    core::Pod,
    Pod,
    pods::read,
    uid,
    pods,
    false
);
kind!(
    Namespaces,
    cluster,
    "namespaces",
    core::Namespace,
    Namespace,
    objects::namespace,
    name,
    namespaces,
    false
);
kind!(
    Nodes,
    cluster,
    "nodes",
    core::Node,
    objects::NodeObject,
    objects::node,
    name,
    nodes,
    false
);
kind!(
    Services,
    namespaced,
    "services",
    core::Service,
    services::ServiceObject,
    services::read,
    name,
    services,
    false
);
kind!(
    Slices,
    namespaced,
    "endpointslices",
    EndpointSlice,
    endpoints::Slice,
    endpoints::read,
    name,
    slices,
    false
);
kind!(
    ServiceRanges,
    cluster,
    "servicecidrs",
    ServiceCIDR,
    objects::ServiceRange,
    objects::service_range,
    name,
    ranges,
    true
);
kind!(
    CiliumConfigs,
    namespaced,
    "configmaps",
    core::ConfigMap,
    objects::CiliumEncrypts,
    objects::cilium_encrypts,
    name,
    cilium,
    true
);
kind!(
    Markers,
    namespaced,
    "configmaps",
    core::ConfigMap,
    objects::Marker,
    objects::marker,
    name,
    markers,
    true
);

fn uid(pod: &core::Pod) -> Option<Arc<str>> {
    pod.metadata.uid.as_deref().map(Into::into)
}

/// Versions of objects, as numbers that can be compared (KEP-5504). 0 for one that is none.
pub(crate) fn version<K: Resource>(object: &K) -> u64 {
    object
        .meta()
        .resource_version
        .as_deref()
        .and_then(|version| version.parse().ok())
        .unwrap_or_default()
}

/// A name that the API server has checked.
pub(crate) fn kubernetes_name(name: Option<&str>) -> Option<KubernetesName> {
    name?.parse().ok()
}

/// Of these labels or annotations, those that somebody reads.
pub(crate) fn only(
    all: Option<std::collections::BTreeMap<String, String>>,
    read: &[&str],
) -> std::collections::BTreeMap<String, String> {
    let mut all = all.unwrap_or_default();
    all.retain(|key, _| read.contains(&key.as_str()));
    all
}

impl Kept for Pod {
    fn same(&self, other: &Self) -> bool {
        let Self {
            name,
            namespace,
            uid,
            node_uid,
            node,
            service_account,
            addresses,
            labels,
            annotations,
            phase,
            host_network,
            ready,
            owner,
            host_ports,
            probe_ports,
            created,
            version: _,
            decided: _,
        } = self;
        *name == other.name
            && *namespace == other.namespace
            && *uid == other.uid
            && *node_uid == other.node_uid
            && *node == other.node
            && *service_account == other.service_account
            && *addresses == other.addresses
            && *labels == other.labels
            && *annotations == other.annotations
            && *phase == other.phase
            && *host_network == other.host_network
            && *ready == other.ready
            && *owner == other.owner
            && *host_ports == other.host_ports
            && *probe_ports == other.probe_ports
            && *created == other.created
    }

    fn follow(&mut self, before: &Self) {
        let decides_the_same = self.node == before.node
            && self.labels == before.labels
            && self.annotations == before.annotations
            && self.host_network == before.host_network;
        if decides_the_same {
            self.decided = before.decided;
        }
    }
}
