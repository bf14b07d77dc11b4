// SPDX-License-Identifier: Apache-2.0
use super::{Malformed, Parsed, at_most, ip, kubernetes_name, workload};
use ipnet::IpNet;
use podveil_identity::KubernetesName;
use podveil_model::MeshConfig;
use podveil_proto::podveil::node::v1 as wire;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

const MAX_RANGES: usize = 4096;
/// Twice what Kubernetes supports.
const MAX_NODES: usize = 10_000;
/// Twice what Kubernetes supports.
const MAX_NAMESPACES: usize = 20_000;
const MAX_NODE_ADDRESSES: usize = 64;
/// Far above what a controller names.
const MAX_OUTLYING: usize = 65_536;

impl TryFrom<wire::MeshConfig> for Parsed<MeshConfig> {
    type Error = Malformed;

    fn try_from(wire: wire::MeshConfig) -> Result<Self, Malformed> {
        Ok(Self(MeshConfig {
            trust_domain: workload::trust_domain("trust_domain", &wire.trust_domain)?,
            pod_ranges: ranges("pod_ranges", wire.pod_ranges)?,
            service_ranges: ranges("service_ranges", wire.service_ranges)?,
            ranges_known: wire.ranges_known,
            outlying: (wire.outlying_known)
                .then(|| outlying(wire.outlying))
                .transpose()?,
            plain_outbound_ranges: ranges("plain_outbound_ranges", wire.plain_outbound_ranges)?,
            plain_outbound_namespaces: namespaces(wire.plain_outbound_namespaces)?,
            nodes: nodes(wire.nodes)?,
            // The rest is needed all the same, and a namespace that is left out counts as enrolled.
            not_enrolled: (wire.not_enrolled.iter())
                .take(MAX_NAMESPACES)
                .filter_map(|name| name.parse().ok())
                .collect(),
            epoch: workload::epoch(wire.epoch),
        }))
    }
}

fn outlying(addresses: Vec<Vec<u8>>) -> Result<BTreeSet<IpAddr>, Malformed> {
    at_most(MAX_OUTLYING, "outlying", addresses)?
        .iter()
        .map(|bytes| ip("outlying", bytes))
        .collect()
}

fn namespaces(names: Vec<String>) -> Result<BTreeSet<KubernetesName>, Malformed> {
    let field = "plain_outbound_namespaces";
    at_most(MAX_RANGES, field, names)?
        .iter()
        .map(|name| kubernetes_name(field, name))
        .collect()
}

fn nodes(nodes: Vec<wire::Node>) -> Result<BTreeMap<KubernetesName, Vec<IpAddr>>, Malformed> {
    let mut parsed = BTreeMap::new();
    for node in at_most(MAX_NODES, "nodes", nodes)? {
        let addresses = at_most(MAX_NODE_ADDRESSES, "nodes.addresses", node.addresses)?;
        let addresses: Result<Vec<IpAddr>, Malformed> = addresses
            .iter()
            .map(|bytes| ip("nodes.addresses", bytes))
            .collect();
        parsed.insert(kubernetes_name("nodes.name", &node.name)?, addresses?);
    }
    Ok(parsed)
}

fn ranges(field: &'static str, values: Vec<String>) -> Result<Vec<IpNet>, Malformed> {
    at_most(MAX_RANGES, field, values)?
        .into_iter()
        .map(|value| {
            value.parse().map_err(|_| Malformed::BadCidr {
                field,
                value: super::shortened(&value),
            })
        })
        .collect()
}
