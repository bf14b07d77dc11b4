// SPDX-License-Identifier: Apache-2.0
use crate::rules::Defaults;
use ipnet::IpNet;
use podveil_identity::{KubernetesName, TrustDomain, WorkloadIdentity};
use podveil_model::{Balancing, EndpointPorts, Locality, ServicePort, Uid};
use podveil_policy::Policy;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

/// Labels and annotations that decide something.
pub mod labels {
    /// On a namespace, exactly `true`: its pods are enrolled. On a pod, exactly `false`: it opts out.
    pub const ENROL: &str = "io.cilium/mtls-enabled";
    /// On a namespace: `permissive` or `strict`.
    pub const MODE: &str = "podveil.io/mode";
    /// On a namespace: `allow` or `refuse` for addresses outside the cluster.
    pub const EXTERNAL: &str = "podveil.io/external";
    /// On a namespace: `allow` or `refuse` that its pods opt out.
    pub const POD_OPT_OUT: &str = "podveil.io/pod-opt-out";
    /// On a pod, a comma-separated list of ports, as the two below.
    pub const EXCLUDE_OUTBOUND_PORTS: &str = "podveil.io/exclude-outbound-ports";
    pub const EXCLUDE_INBOUND_PORTS: &str = "podveil.io/exclude-inbound-ports";
    pub const PLAIN_INBOUND_PORTS: &str = "podveil.io/plain-inbound-ports";
}

/// All that is known of a cluster, at one moment.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Cluster {
    /// Grows with every change, also across restarts: for files, the newest modification time in microseconds; for
    /// Kubernetes, the newest `resourceVersion` read.
    pub version: u64,
    pub trust_domain: TrustDomain,
    /// `None`: the ranges of pods and services are not known.
    pub ranges: Option<Ranges>,
    /// What strict workloads may reach in plain.
    pub plain_outbound: Vec<IpNet>,
    pub defaults: Defaults,
    /// Cilium's own `encryption.type=ztunnel` is on, and nobody has set that Podveil takes over.
    pub cilium_encrypts: bool,
    /// Every namespace counts as not labelled, since this version: Podveil is being taken out.
    pub released: Option<u64>,
    pub nodes: BTreeMap<KubernetesName, Node>,
    pub namespaces: BTreeMap<KubernetesName, Arc<Namespace>>,
    /// In the order written, files by name; UIDs are unique. What has not changed is the same `Arc` as before.
    pub pods: Vec<Arc<Pod>>,
    pub services: Vec<Arc<ServiceEntry>>,
    pub policies: Vec<PolicyEntry>,
}

#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Ranges {
    pub pods: Vec<IpNet>,
    pub services: Vec<IpNet>,
}

#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Node {
    /// The node's own, where NodePorts and hostPorts are reached.
    pub addresses: Vec<IpAddr>,
    pub locality: Locality,
}

#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Namespace {
    pub labels: BTreeMap<String, String>,
    /// Podveil's own: never enrolled.
    pub own: bool,
    /// Empty where nobody gives one.
    pub uid: Arc<str>,
    /// As [`Pod::version`].
    pub version: u64,
    /// As [`Pod::decided`].
    pub decided: u64,
}

/// One pod; `workloads` in the file.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Pod {
    pub name: Arc<str>,
    pub namespace: KubernetesName,
    pub uid: Uid,
    /// The UID that its node knows it by, where that is another one: a pod from a file on the node, which the kubelet
    /// shows to the cluster as a copy with a UID of its own.
    pub node_uid: Option<Uid>,
    pub node: KubernetesName,
    pub service_account: KubernetesName,
    pub addresses: Vec<IpAddr>,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
    pub phase: Phase,
    pub host_network: bool,
    pub ready: bool,
    /// The name of what made it, e.g. of its Deployment; telemetry only.
    pub owner: Option<Arc<str>>,
    /// Ports of its node that lead to it: host port to its own port.
    pub host_ports: BTreeMap<u16, u16>,
    /// Its own ports that its spec names for probes and hooks of the kubelet.
    pub probe_ports: BTreeSet<u16>,
    /// When it was made, in seconds of Unix time; 0 if not known.
    pub created: u64,
    /// How new this is: its `resourceVersion`, or the version of the file. Comparable between all readers of one cluster.
    pub version: u64,
    /// The version since which all of it that decides about enrolment is as it is: the same for all who have followed it.
    pub decided: u64,
}

#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub enum Phase {
    #[default]
    Running,
    /// Told to end; still has its addresses and connections.
    Terminating,
    Succeeded,
    Failed,
}

/// A service and what stands behind it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ServiceEntry {
    pub name: Arc<str>,
    pub namespace: KubernetesName,
    /// Cluster, external and load-balancer addresses.
    pub addresses: Vec<IpAddr>,
    pub ports: Vec<ServicePort>,
    /// Ports at every node's address that lead here: node port to service port.
    pub node_ports: BTreeMap<u16, u16>,
    pub endpoints: Vec<Endpoint>,
    pub publish_not_ready: bool,
    pub balancing: Balancing,
}

/// One endpoint of a service, with its own port for each of the service's.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Endpoint {
    pub target: Target,
    pub ports: EndpointPorts,
}

#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Target {
    /// No pod, or one that shares its node's address.
    Address(IpAddr),
    /// A pod by name, in the service's namespace.
    Name(Arc<str>),
    Pod(Uid),
}

/// A policy and, where it selects workloads, the names of the pods in its namespace.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PolicyEntry {
    pub policy: Policy,
    pub workloads: BTreeSet<Arc<str>>,
}

impl Phase {
    /// A finished pod owns nothing any more: its addresses may already be another's.
    pub fn is_finished(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed)
    }
}

impl Cluster {
    /// Equal in all but the version?
    pub fn same_state(&self, other: &Self) -> bool {
        self.same_surroundings(other) && self.pods == other.pods && self.services == other.services
    }

    /// Equal in all but the version, the pods and the services?
    pub fn same_surroundings(&self, other: &Self) -> bool {
        let Self {
            version: _,
            pods: _,
            services: _,
            trust_domain,
            ranges,
            plain_outbound,
            defaults,
            cilium_encrypts,
            released,
            nodes,
            namespaces,
            policies,
        } = self;
        *trust_domain == other.trust_domain
            && *ranges == other.ranges
            && *plain_outbound == other.plain_outbound
            && *defaults == other.defaults
            && *cilium_encrypts == other.cilium_encrypts
            && *released == other.released
            && *nodes == other.nodes
            && *namespaces == other.namespaces
            && *policies == other.policies
    }

    pub fn namespace(&self, name: &KubernetesName) -> Option<&Namespace> {
        self.namespaces.get(name).map(Arc::as_ref)
    }
}

impl ServiceEntry {
    pub fn same_but_for_endpoints(&self, other: &Self) -> bool {
        let Self {
            name,
            namespace,
            addresses,
            ports,
            node_ports,
            endpoints: _,
            publish_not_ready,
            balancing,
        } = self;
        *name == other.name
            && *namespace == other.namespace
            && *addresses == other.addresses
            && *ports == other.ports
            && *node_ports == other.node_ports
            && *publish_not_ready == other.publish_not_ready
            && *balancing == other.balancing
    }
}

impl Pod {
    pub fn identity(&self, trust_domain: &TrustDomain) -> WorkloadIdentity {
        WorkloadIdentity {
            trust_domain: trust_domain.clone(),
            namespace: self.namespace.clone(),
            service_account: self.service_account.clone(),
        }
    }

    /// The label by which a pod asks to be left out. Whether it may is for the reader to decide.
    pub fn opts_out(&self) -> bool {
        self.labels
            .get(labels::ENROL)
            .is_some_and(|value| value == "false")
    }
}
