// SPDX-License-Identifier: Apache-2.0
use podveil_identity::KubernetesName;
use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

/// `<namespace>/<hostname>`.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ServiceKey {
    pub namespace: KubernetesName,
    pub hostname: Arc<str>,
}

impl fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.hostname)
    }
}

/// A port of a service. `target` 0: named, each endpoint says its own.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ServicePort {
    pub port: u16,
    pub target: u16,
}

/// A name and addresses in front of endpoints. Its endpoints are the workloads that name it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Service {
    pub key: ServiceKey,
    pub name: Arc<str>,
    /// Cluster, external and load-balancer addresses.
    pub addresses: Vec<IpAddr>,
    pub ports: Vec<ServicePort>,
    /// Endpoints that are not ready get connections too.
    pub publish_not_ready: bool,
}

/// A workload's own port for each port of a service: service port to target port.
pub type EndpointPorts = BTreeMap<u16, u16>;
