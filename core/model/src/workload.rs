// SPDX-License-Identifier: Apache-2.0
use crate::{EndpointPorts, Epoch, Mode, ServiceKey, Stage};
use podveil_identity::{KubernetesName, WorkloadIdentity};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

/// Names one running instance for its whole life; a replaced pod of the same name has another.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Uid(pub Arc<str>);

impl fmt::Display for Uid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<&str> for Uid {
    fn from(uid: &str) -> Self {
        Self(uid.into())
    }
}

/// May a new connection be sent there?
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Health {
    #[default]
    Healthy,
    /// Keeps its connections, gets no new one through a service.
    Terminating,
    Unhealthy,
}

/// Where a workload runs; empty where nothing is said.
#[derive(Clone, Debug, Default, Eq, Hash, PartialEq)]
pub struct Locality {
    pub region: Arc<str>,
    pub zone: Arc<str>,
    pub subzone: Arc<str>,
}

/// What becomes of connections to addresses outside the cluster.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum External {
    /// Plain, counted and logged as plain.
    #[default]
    Allow,
    Refuse,
}

/// One running instance.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Workload {
    pub uid: Uid,
    /// The UID that its node knows it by, where that is another one: a pod from a file on the node, which the kubelet
    /// shows to the cluster as a copy with a UID of its own.
    pub node_uid: Option<Uid>,
    pub name: Arc<str>,
    pub identity: WorkloadIdentity,
    /// All addresses at which it is reached; whether they are its own says `host_network`.
    pub addresses: Vec<IpAddr>,
    pub node: KubernetesName,
    pub locality: Locality,
    pub health: Health,
    /// Its addresses are not its own: a host-network pod's are its node's, those of an endpoint without a pod may be
    /// anybody's. They lead to it through a service, and never say who somebody is.
    pub host_network: bool,
    pub stage: Stage,
    pub epoch: Epoch,
    pub mode: Mode,
    pub external: External,
    /// Telemetry only: the owner's name, e.g. of the Deployment.
    pub workload_name: Arc<str>,
    pub canonical_name: Arc<str>,
    pub canonical_revision: Arc<str>,
    pub cluster: Arc<str>,
    /// The services it is an endpoint of, with its own port for each port of theirs. Endpoints of the same services may
    /// share it.
    pub services: Arc<BTreeMap<ServiceKey, EndpointPorts>>,
    /// Policies that select it beyond those of its namespace: `<namespace>/<name>`.
    pub policies: BTreeSet<Arc<str>>,
    pub exclude_outbound_ports: BTreeSet<u16>,
    pub exclude_inbound_ports: BTreeSet<u16>,
    pub plain_inbound_ports: BTreeSet<u16>,
    /// Its own ports that its spec names for probes and hooks of the kubelet.
    pub probe_ports: BTreeSet<u16>,
    /// Ports of its node that lead to it: host port to its own port.
    pub host_ports: BTreeMap<u16, u16>,
    /// Load-balancing weight; 1 where nothing is said.
    pub capacity: u32,
}

/// What the controller decides about a workload, and its epoch orders.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Decision {
    pub stage: Stage,
    pub epoch: Epoch,
    pub mode: Mode,
    pub external: External,
    pub exclude_outbound_ports: BTreeSet<u16>,
    pub exclude_inbound_ports: BTreeSet<u16>,
    pub plain_inbound_ports: BTreeSet<u16>,
}

impl Workload {
    pub fn namespace(&self) -> &KubernetesName {
        &self.identity.namespace
    }

    /// What was decided about it.
    pub fn decision(&self) -> Decision {
        Decision {
            stage: self.stage,
            epoch: self.epoch,
            mode: self.mode,
            external: self.external,
            exclude_outbound_ports: self.exclude_outbound_ports.clone(),
            exclude_inbound_ports: self.exclude_inbound_ports.clone(),
            plain_inbound_ports: self.plain_inbound_ports.clone(),
        }
    }

    /// This state with another decision, at its epoch: an epoch orders decisions (enrolment, mode, settings) and nothing else. A
    /// replica that decided earlier, or only began to count there, still knows addresses and health.
    pub fn decided_as(&self, decision: Decision) -> Self {
        let Decision {
            stage,
            epoch,
            mode,
            external,
            exclude_outbound_ports,
            exclude_inbound_ports,
            plain_inbound_ports,
        } = decision;
        Self {
            stage,
            epoch,
            mode,
            external,
            exclude_outbound_ports,
            exclude_inbound_ports,
            plain_inbound_ports,
            ..self.clone()
        }
    }

    /// Is it the same for whoever captures and fences it: all but whether and by whom connections are sent there?
    pub fn is_captured_like(&self, other: &Self) -> bool {
        let sent_there_like = Self {
            health: other.health,
            locality: other.locality.clone(),
            services: other.services.clone(),
            capacity: other.capacity,
            ..self.clone()
        };
        sent_there_like == *other
    }

    /// The address of the same family as `like`, if it has one.
    pub fn address_like(&self, like: IpAddr) -> Option<IpAddr> {
        self.addresses
            .iter()
            .copied()
            .find(|ip| ip.is_ipv4() == like.is_ipv4())
    }
}
