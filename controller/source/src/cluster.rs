// SPDX-License-Identifier: Apache-2.0
use ipnet::IpNet;
use podveil_identity::{KubernetesName, TrustDomain, WorkloadIdentity};
use podveil_model::{Balancing, EndpointPorts, External, Locality, Mode, ServicePort, Uid};
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
}

/// One pod; `workloads` in the file.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Pod {
    pub name: Arc<str>,
    pub namespace: KubernetesName,
    pub uid: Uid,
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

impl Namespace {
    /// Has the label that enrols, whatever becomes of it.
    pub fn is_labelled(&self) -> bool {
        self.labels
            .get(labels::ENROL)
            .is_some_and(|value| value == "true")
    }

    /// # Errors
    /// [`BadExternal`] for a value that is neither `allow` nor `refuse`.
    pub fn external(&self) -> Result<Option<External>, BadExternal> {
        match self.labels.get(labels::EXTERNAL).map(String::as_str) {
            None => Ok(None),
            Some("allow") => Ok(Some(External::Allow)),
            Some("refuse") => Ok(Some(External::Refuse)),
            Some(value) => Err(BadExternal {
                value: value.to_owned(),
            }),
        }
    }

    /// `None` where nothing is said.
    ///
    /// # Errors
    /// [`BadMode`] for a value that is neither `permissive` nor `strict`.
    pub fn mode(&self) -> Result<Option<Mode>, BadMode> {
        match self.labels.get(labels::MODE).map(String::as_str) {
            None => Ok(None),
            Some("permissive") => Ok(Some(Mode::Permissive)),
            Some("strict") => Ok(Some(Mode::Strict)),
            Some(value) => Err(BadMode {
                value: value.to_owned(),
            }),
        }
    }
}

#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("label podveil.io/mode is {value:?}, not \"permissive\" or \"strict\"")]
pub struct BadMode {
    pub value: String,
}

#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("label podveil.io/external is {value:?}, not \"allow\" or \"refuse\"")]
pub struct BadExternal {
    pub value: String,
}

impl Cluster {
    /// Equal in all but the version?
    pub fn same_state(&self, other: &Self) -> bool {
        let Self {
            version: _,
            trust_domain,
            ranges,
            plain_outbound,
            released,
            nodes,
            namespaces,
            pods,
            services,
            policies,
        } = self;
        *trust_domain == other.trust_domain
            && *ranges == other.ranges
            && *plain_outbound == other.plain_outbound
            && *released == other.released
            && *nodes == other.nodes
            && *namespaces == other.namespaces
            && *pods == other.pods
            && *services == other.services
            && *policies == other.policies
    }

    pub fn namespace(&self, name: &KubernetesName) -> Option<&Namespace> {
        self.namespaces.get(name).map(Arc::as_ref)
    }

    /// Should this pod be enrolled, by the labels as they stand? A pod opts out only where the mode is not strict.
    pub fn wants_enrolment(&self, pod: &Pod) -> bool {
        self.namespace(&pod.namespace).is_some_and(|namespace| {
            let mode = namespace.mode().ok().flatten().unwrap_or_default();
            self.enrolment(pod, namespace, mode).is_ok()
        })
    }

    /// The one rule about who is enrolled, for whoever has settled the namespace's mode.
    ///
    /// # Errors
    /// Why not.
    pub fn enrolment(
        &self,
        pod: &Pod,
        namespace: &Namespace,
        mode: Mode,
    ) -> Result<(), NotEnrolled> {
        if namespace.own {
            Err(NotEnrolled::OwnNamespace)
        } else if !namespace.is_labelled() {
            Err(NotEnrolled::NotLabelled)
        } else if self.released.is_some() {
            Err(NotEnrolled::Released)
        } else if pod.phase.is_finished() {
            Err(NotEnrolled::Finished)
        } else if pod.host_network {
            Err(NotEnrolled::HostNetwork)
        } else if mode != Mode::Strict && pod.opts_out() {
            Err(NotEnrolled::OptedOut)
        } else {
            Ok(())
        }
    }
}

/// Why a pod is not enrolled.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq, thiserror::Error)]
pub enum NotEnrolled {
    #[error("the pod has finished")]
    Finished,
    #[error("the pod shares its node's network")]
    HostNetwork,
    #[error("the namespace has no label io.cilium/mtls-enabled=true")]
    NotLabelled,
    #[error("the pod's label io.cilium/mtls-enabled=false opts out")]
    OptedOut,
    #[error("Podveil's own namespace is never enrolled")]
    OwnNamespace,
    #[error("Podveil is being uninstalled")]
    Released,
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
