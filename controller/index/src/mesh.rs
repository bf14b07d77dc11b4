// SPDX-License-Identifier: Apache-2.0
//! What every node is told of the whole.

use ipnet::IpNet;
use podveil_model::{Epoch, MeshConfig};
use podveil_source::Cluster;
use std::collections::BTreeSet;
use std::net::IpAddr;

/// Half a megabyte of the longest names, so that the mesh configuration stays well below what a node takes. One that is not told
/// counts as enrolled where nobody can be asked.
const MAX_NOT_ENROLLED: usize = 8_000;
/// Addresses in none of the ranges that are named one by one; where there are more, a node that does not hold everything asks
/// for each.
const MAX_OUTLYING: usize = 4_096;

/// At no epoch yet. `addresses`: all that a node may be told of.
pub(crate) fn mesh(cluster: &Cluster, addresses: impl Iterator<Item = IpAddr>) -> MeshConfig {
    let known = cluster.ranges.as_ref();
    let ranges = known.cloned().unwrap_or_default();
    MeshConfig {
        trust_domain: cluster.trust_domain.clone(),
        ranges_known: known.is_some(),
        outlying: known.and_then(|known| {
            let ranges = known.pods.iter().chain(&known.services);
            outlying(ranges, addresses)
        }),
        pod_ranges: ranges.pods,
        service_ranges: ranges.services,
        plain_outbound_ranges: cluster.plain_outbound.clone(),
        plain_outbound_namespaces: BTreeSet::new(),
        nodes: cluster
            .nodes
            .iter()
            .filter(|(_, node)| !node.addresses.is_empty())
            .map(|(name, node)| (name.clone(), node.addresses.clone()))
            .collect(),
        not_enrolled: (cluster.namespaces.iter())
            .filter(|(_, namespace)| !namespace.enrols())
            .map(|(name, _)| name.clone())
            .take(MAX_NOT_ENROLLED)
            .collect(),
        epoch: Epoch::default(),
    }
}

/// `None` where they are too many.
fn outlying<'a>(
    ranges: impl Iterator<Item = &'a IpNet>,
    addresses: impl Iterator<Item = IpAddr>,
) -> Option<BTreeSet<IpAddr>> {
    // No two of them overlap, so an address can only be in the last that begins before it.
    let mut ranges = IpNet::aggregate(&ranges.copied().collect());
    ranges.sort_by_key(IpNet::network);
    let is_inside = |ip: &IpAddr| {
        let begun = ranges.partition_point(|range| range.network() <= *ip);
        let last = begun.checked_sub(1).and_then(|last| ranges.get(last));
        last.is_some_and(|range| range.contains(ip))
    };
    let mut outlying = BTreeSet::new();
    for ip in addresses.filter(|ip| !is_inside(ip)) {
        outlying.insert(ip);
        if outlying.len() > MAX_OUTLYING {
            return None;
        }
    }
    Some(outlying)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_in_none_of_the_ranges_is_named() {
        let ranges: Vec<IpNet> = [
            "10.0.1.0/24",
            "10.0.0.0/24",
            "10.9.0.0/16",
            "10.9.1.0/24",
            "fd00::/64",
        ]
        .map(|range| range.parse().unwrap())
        .into();
        let addresses = [
            "10.0.0.0",
            "10.0.1.255",
            "10.0.2.0",
            "10.9.1.7",
            "10.9.2.7",
            "9.255.255.255",
            "fd00::7",
            "fd01::7",
            "203.0.113.7",
        ];
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let named = outlying(ranges.iter(), addresses.into_iter().map(ip)).unwrap();
        let expected = ["9.255.255.255", "10.0.2.0", "203.0.113.7", "fd01::7"];
        assert_eq!(named, expected.map(ip).into());
    }

    #[test]
    fn where_they_are_too_many_none_is_named() {
        let many = |count: u32| (0..count).map(|number| IpAddr::from(number.to_be_bytes()));
        let limit = u32::try_from(MAX_OUTLYING).unwrap();
        assert_eq!(
            outlying([].iter(), many(limit)).unwrap().len(),
            MAX_OUTLYING
        );
        assert_eq!(outlying([].iter(), many(limit + 1)), None);
    }
}
