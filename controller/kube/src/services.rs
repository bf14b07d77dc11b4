// SPDX-License-Identifier: Apache-2.0
use crate::kinds::kubernetes_name;
use crate::pods::{is_tcp, number};
use crate::table::Kept;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use podveil_identity::KubernetesName;
use podveil_model::{Balancing, Scope, ServicePort};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

/// More than any service has; an object with absurd sizes gives no more than these.
const MAX_PORTS: usize = 1024;
/// What the API server fills in.
const DEFAULT_AFFINITY: Duration = Duration::from_secs(10_800);

/// A service without its endpoints.
#[derive(Debug, Eq, PartialEq)]
pub(crate) struct ServiceObject {
    pub name: Arc<str>,
    pub namespace: KubernetesName,
    /// Cluster addresses, which are inside the ranges of services.
    pub cluster_addresses: Vec<IpAddr>,
    /// External and load-balancer addresses.
    pub other_addresses: Vec<IpAddr>,
    /// By name; the only one may have none.
    pub ports: BTreeMap<Arc<str>, ServicePort>,
    pub node_ports: BTreeMap<u16, u16>,
    pub publish_not_ready: bool,
    pub balancing: Balancing,
}

impl Kept for ServiceObject {
    fn same(&self, other: &Self) -> bool {
        self == other
    }
}

/// `None` for an ExternalName: it is a name for somewhere else, and has no address of its own.
pub(crate) fn read(object: core::Service) -> Option<ServiceObject> {
    let spec = object.spec?;
    if spec.type_.as_deref() == Some("ExternalName") {
        return None;
    }
    let tcp = || {
        spec.ports
            .iter()
            .flatten()
            .filter(|port| is_tcp(port.protocol.as_deref()))
            .take(MAX_PORTS)
    };
    let ports = tcp().filter_map(|port| {
        let target = match &port.target_port {
            Some(IntOrString::Int(target)) => number(*target),
            // Each endpoint says its own.
            Some(IntOrString::String(_)) => Some(0),
            None => number(port.port),
        };
        let name = port.name.as_deref().unwrap_or_default().into();
        let port = ServicePort {
            port: number(port.port)?,
            target: target?,
        };
        Some((name, port))
    });
    let node_ports = tcp().filter_map(|port| Some((number(port.node_port?)?, number(port.port)?)));
    Some(ServiceObject {
        name: object.metadata.name.as_deref()?.into(),
        namespace: kubernetes_name(object.metadata.namespace.as_deref())?,
        // "None" is no address: clients of a headless service connect to its pods.
        cluster_addresses: spec
            .cluster_ips
            .iter()
            .flatten()
            .filter_map(|ip| ip.parse().ok())
            .collect(),
        other_addresses: other_addresses(&spec, object.status.as_ref()),
        ports: ports.collect(),
        node_ports: node_ports.collect(),
        publish_not_ready: spec.publish_not_ready_addresses.unwrap_or_default(),
        balancing: balancing(&spec),
    })
}

fn other_addresses(spec: &core::ServiceSpec, status: Option<&core::ServiceStatus>) -> Vec<IpAddr> {
    let load_balancer = status
        .and_then(|status| status.load_balancer.as_ref()?.ingress.as_ref())
        .into_iter()
        .flatten()
        // With ipMode Proxy the balancer wants to see the connection itself.
        .filter(|ingress| ingress.ip_mode.as_deref() != Some("Proxy"))
        .filter_map(|ingress| ingress.ip.as_deref());
    let mut addresses: Vec<IpAddr> = spec
        .external_ips
        .iter()
        .flatten()
        .map(String::as_str)
        .chain(load_balancer)
        .filter_map(|ip| ip.parse().ok())
        .collect();
    addresses.sort();
    addresses.dedup();
    addresses
}

fn balancing(spec: &core::ServiceSpec) -> Balancing {
    let local = spec.internal_traffic_policy.as_deref() == Some("Local");
    let prefer = match spec.traffic_distribution.as_deref() {
        _ if local => vec![Scope::Node],
        Some("PreferClose" | "PreferSameZone") => vec![Scope::Zone],
        Some("PreferSameNode") => vec![Scope::Zone, Scope::Node],
        _ => Vec::new(),
    };
    let affinity = (spec.session_affinity.as_deref() == Some("ClientIP")).then(|| {
        spec.session_affinity_config
            .as_ref()
            .and_then(|config| config.client_ip.as_ref()?.timeout_seconds)
            .and_then(|seconds| u64::try_from(seconds).ok())
            .map_or(DEFAULT_AFFINITY, Duration::from_secs)
    });
    Balancing {
        prefer,
        only_preferred: local,
        affinity,
    }
}
