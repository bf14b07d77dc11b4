// SPDX-License-Identifier: Apache-2.0
use crate::Epoch;
use ipnet::IpNet;
use podveil_identity::{KubernetesName, TrustDomain};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// What every node must know about the whole.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct MeshConfig {
    pub trust_domain: TrustDomain,
    pub pod_ranges: Vec<IpNet>,
    pub service_ranges: Vec<IpNet>,
    /// False: the ranges cannot be known, so every unknown address is asked for once.
    pub ranges_known: bool,
    /// Addresses of workloads and services that are in none of the ranges. `None`: not told, or too many; then any other
    /// address may be one.
    pub outlying: Option<BTreeSet<IpAddr>>,
    /// What strict workloads may reach in plain: cluster DNS, the API server, listed addresses.
    pub plain_outbound_ranges: Vec<IpNet>,
    /// The same for all services and workloads of these namespaces.
    pub plain_outbound_namespaces: BTreeSet<KubernetesName>,
    /// The nodes' own addresses: there every service's NodePort and a pod's hostPorts are reached.
    pub nodes: BTreeMap<KubernetesName, Vec<IpAddr>>,
    /// Namespaces without the label that enrols. One that is not among them counts as enrolled: nobody may have told of it.
    pub not_enrolled: BTreeSet<KubernetesName>,
    pub epoch: Epoch,
}

impl MeshConfig {
    /// May this address belong to a pod or a service of the cluster?
    pub fn may_be_inside(&self, ip: IpAddr) -> bool {
        !self.ranges_known
            || self
                .pod_ranges
                .iter()
                .chain(&self.service_ranges)
                .any(|range| range.contains(&ip))
    }

    /// May the control plane know somebody by this address? Where not, nobody needs to ask.
    pub fn may_be_known(&self, ip: IpAddr) -> bool {
        self.may_be_inside(ip)
            || self
                .outlying
                .as_ref()
                .is_none_or(|outlying| outlying.contains(&ip))
    }
}
