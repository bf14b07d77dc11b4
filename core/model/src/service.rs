// SPDX-License-Identifier: Apache-2.0
use crate::Workload;
use podveil_identity::KubernetesName;
use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

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
    pub balancing: Balancing,
    /// Ports at every node's address that lead here: node port to service port.
    pub node_ports: BTreeMap<u16, u16>,
}

/// Which of its endpoints a service gives a client.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Balancing {
    /// What an endpoint should have in common with the client, widest first: those that share more of the first ones are
    /// taken before the others.
    pub prefer: Vec<Scope>,
    /// Only endpoints that share all of `prefer`, for connections to the service's cluster addresses.
    pub only_preferred: bool,
    /// A client keeps its endpoint as long as it comes back within this time.
    pub affinity: Option<Duration>,
}

/// Something that a client and an endpoint may share.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Scope {
    Network,
    Cluster,
    Region,
    Zone,
    Subzone,
    Node,
}

impl Scope {
    /// Do both have it, and the same?
    pub fn is_shared(self, one: &Workload, other: &Workload) -> bool {
        let same = |a: &str, b: &str| !a.is_empty() && a == b;
        match self {
            // There is one network: the cluster's own.
            Self::Network => true,
            Self::Cluster => one.cluster == other.cluster,
            Self::Region => same(&one.locality.region, &other.locality.region),
            Self::Zone => same(&one.locality.zone, &other.locality.zone),
            Self::Subzone => same(&one.locality.subzone, &other.locality.subzone),
            Self::Node => one.node == other.node,
        }
    }
}

/// A workload's own port for each port of a service: service port to target port.
pub type EndpointPorts = BTreeMap<u16, u16>;
