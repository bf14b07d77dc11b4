// SPDX-License-Identifier: Apache-2.0
use ipnet::IpNet;
use podveil_identity::{KubernetesName, TrustDomain, WorkloadIdentity};
use podveil_model::{Mode, ServicePort, Uid};
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
    /// On a pod, a comma-separated list of ports, as the two below.
    pub const EXCLUDE_OUTBOUND_PORTS: &str = "podveil.io/exclude-outbound-ports";
    pub const EXCLUDE_INBOUND_PORTS: &str = "podveil.io/exclude-inbound-ports";
    pub const PLAIN_INBOUND_PORTS: &str = "podveil.io/plain-inbound-ports";
}

/// All that is known of a cluster, at one moment.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Cluster {
    /// Grows with every change, also across restarts: for files, the newest modification time in microseconds.
    pub version: u64,
    pub trust_domain: TrustDomain,
    /// `None`: the ranges of pods and services are not known.
    pub ranges: Option<Ranges>,
    /// What strict workloads may reach in plain.
    pub plain_outbound: Vec<IpNet>,
    pub nodes: BTreeSet<KubernetesName>,
    pub namespaces: BTreeMap<KubernetesName, Namespace>,
    /// In the order written, files by name; UIDs are unique.
    pub pods: Vec<Pod>,
    pub services: Vec<ServiceEntry>,
    pub policies: Vec<PolicyEntry>,
}

#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Ranges {
    pub pods: Vec<IpNet>,
    pub services: Vec<IpNet>,
}

#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Namespace {
    pub labels: BTreeMap<String, String>,
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

/// A service and the names of the pods behind it, in its own namespace.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ServiceEntry {
    pub name: Arc<str>,
    pub namespace: KubernetesName,
    pub addresses: Vec<IpAddr>,
    pub ports: Vec<ServicePort>,
    pub endpoints: BTreeSet<Arc<str>>,
    pub publish_not_ready: bool,
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
    pub fn is_enrolled(&self) -> bool {
        self.labels
            .get(labels::ENROL)
            .is_some_and(|value| value == "true")
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

impl Cluster {
    /// Equal in all but the version?
    pub fn same_state(&self, other: &Self) -> bool {
        let Self {
            version: _,
            trust_domain,
            ranges,
            plain_outbound,
            nodes,
            namespaces,
            pods,
            services,
            policies,
        } = self;
        *trust_domain == other.trust_domain
            && *ranges == other.ranges
            && *plain_outbound == other.plain_outbound
            && *nodes == other.nodes
            && *namespaces == other.namespaces
            && *pods == other.pods
            && *services == other.services
            && *policies == other.policies
    }

    pub fn namespace(&self, name: &KubernetesName) -> Option<&Namespace> {
        self.namespaces.get(name)
    }

    /// Should this pod be enrolled, by the labels as they stand? A pod opts out only where the mode is not strict.
    pub fn wants_enrolment(&self, pod: &Pod) -> bool {
        self.namespace(&pod.namespace).is_some_and(|namespace| {
            let mode = namespace.mode().ok().flatten().unwrap_or_default();
            pod.wants_enrolment(namespace, mode)
        })
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

    /// The one rule about who is enrolled, for whoever has settled the namespace's mode.
    pub fn wants_enrolment(&self, namespace: &Namespace, mode: Mode) -> bool {
        namespace.is_enrolled()
            && !self.host_network
            && !self.phase.is_finished()
            && (mode == Mode::Strict || !self.opts_out())
    }
}
