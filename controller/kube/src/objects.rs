// SPDX-License-Identifier: Apache-2.0
//! The smaller kinds: namespaces, nodes, ranges of services, and the marker of an uninstallation.

use crate::kinds::{kubernetes_name, only, version};
use crate::table::Kept;
use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use podveil_identity::KubernetesName;
use podveil_model::Locality;
use podveil_source::{Namespace, labels};
use std::net::IpAddr;
use std::sync::Arc;

/// On [`UNINSTALL_CONFIG_MAP`](crate::UNINSTALL_CONFIG_MAP), `true`: Podveil is to let go of every pod.
pub const UNINSTALL: &str = "podveil.io/uninstall";

impl Kept for Namespace {
    fn same(&self, other: &Self) -> bool {
        self.labels == other.labels && self.own == other.own && self.uid == other.uid
    }

    fn follow(&mut self, before: &Self) {
        if self.same(before) {
            self.decided = before.decided;
        }
    }
}

/// Whether it is our own is for the reader to say.
pub(crate) fn namespace(object: core::Namespace) -> Option<Namespace> {
    Some(Namespace {
        version: version(&object),
        decided: version(&object),
        labels: only(
            object.metadata.labels,
            &[
                labels::ENROL,
                labels::EXTERNAL,
                labels::MODE,
                labels::POD_OPT_OUT,
            ],
        ),
        own: false,
        uid: object.metadata.uid.as_deref().unwrap_or_default().into(),
    })
}

#[derive(Debug, Eq, PartialEq)]
pub(crate) struct NodeObject {
    pub name: KubernetesName,
    pub addresses: Vec<IpAddr>,
    pub ranges: Vec<IpNet>,
    pub locality: Locality,
}

impl Kept for NodeObject {
    fn same(&self, other: &Self) -> bool {
        self == other
    }
}

pub(crate) fn node(object: core::Node) -> Option<NodeObject> {
    let name = kubernetes_name(object.metadata.name.as_deref())?;
    let node_labels = object.metadata.labels.unwrap_or_default();
    let label = |key: &str| -> Arc<str> { node_labels.get(key).map_or("", String::as_str).into() };
    let status = object.status.unwrap_or_default();
    let mut addresses: Vec<IpAddr> = status
        .addresses
        .unwrap_or_default()
        .iter()
        .filter(|address| matches!(address.type_.as_str(), "InternalIP" | "ExternalIP"))
        .filter_map(|address| address.address.parse().ok())
        .collect();
    addresses.sort();
    addresses.dedup();
    let spec = object.spec.unwrap_or_default();
    let ranges = spec
        .pod_cidrs
        .unwrap_or_else(|| spec.pod_cidr.into_iter().collect())
        .iter()
        .filter_map(|range| range.parse().ok())
        .collect();
    Some(NodeObject {
        name,
        addresses,
        ranges,
        locality: Locality {
            region: label("topology.kubernetes.io/region"),
            zone: label("topology.kubernetes.io/zone"),
            subzone: "".into(),
        },
    })
}

#[derive(Debug, Eq, PartialEq)]
pub(crate) struct ServiceRange(pub Vec<IpNet>);

impl Kept for ServiceRange {
    fn same(&self, other: &Self) -> bool {
        self == other
    }
}

pub(crate) fn service_range(object: ServiceCIDR) -> Option<ServiceRange> {
    let ranges = object.spec?.cidrs?;
    Some(ServiceRange(
        ranges
            .iter()
            .filter_map(|range| range.parse().ok())
            .collect(),
    ))
}

#[derive(Debug, Eq, PartialEq)]
pub(crate) struct CiliumEncrypts;

impl Kept for CiliumEncrypts {
    fn same(&self, _: &Self) -> bool {
        true
    }
}

/// `None` unless Cilium's agent captures pods for a ztunnel of its own.
pub(crate) fn cilium_encrypts(object: core::ConfigMap) -> Option<CiliumEncrypts> {
    let on = object.data?.get("enable-ztunnel")?.parse() == Ok(true);
    on.then_some(CiliumEncrypts)
}

#[derive(Debug, Eq, PartialEq)]
pub(crate) struct Marker {
    /// Since when it asks, or asks no longer: how far it is is written to the same object.
    pub version: u64,
    /// Podveil is to let go.
    pub asked: bool,
}

impl Kept for Marker {
    fn same(&self, other: &Self) -> bool {
        self.asked == other.asked
    }

    fn follow(&mut self, before: &Self) {
        if self.same(before) {
            self.version = before.version;
        }
    }
}

pub(crate) fn marker(object: core::ConfigMap) -> Option<Marker> {
    let version = version(&object);
    let annotations = object.metadata.annotations.unwrap_or_default();
    let asked = (annotations.get(UNINSTALL)).is_some_and(|value| value == "true");
    Some(Marker { version, asked })
}
