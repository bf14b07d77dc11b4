// SPDX-License-Identifier: Apache-2.0
use crate::Epoch;
use ipnet::IpNet;
use podveil_identity::TrustDomain;
use std::net::IpAddr;

/// What every node must know about the whole.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct MeshConfig {
    pub trust_domain: TrustDomain,
    pub pod_ranges: Vec<IpNet>,
    pub service_ranges: Vec<IpNet>,
    /// False: the ranges cannot be known, so every unknown address is asked for once.
    pub ranges_known: bool,
    /// What strict workloads may reach in plain: cluster DNS, the API server, listed namespaces.
    pub plain_outbound_ranges: Vec<IpNet>,
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
}
