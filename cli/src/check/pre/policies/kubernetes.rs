// SPDX-License-Identifier: Apache-2.0
//! NetworkPolicies: rules add up, so one that lets tunnels through between all pods of a namespace is enough for it.

use super::ports::{Named, Ports};
use super::{Directions, blocked, is_empty};
use crate::check::Finding;
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::networking::v1::{
    IPBlock, NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec,
};
use kube::ResourceExt;

/// A rule of either direction.
struct Rule<'a> {
    peers: &'a [NetworkPolicyPeer],
    ports: Vec<Ports>,
}

/// The addresses that pods have, as nodes say; empty where they do not.
pub fn pod_ranges(nodes: &[Node]) -> Vec<IpNet> {
    let specs = nodes.iter().filter_map(|node| node.spec.as_ref());
    specs
        .flat_map(|spec| spec.pod_cidrs.iter().flatten().chain(&spec.pod_cidr))
        .filter_map(|range| range.parse().ok())
        .collect()
}

/// The directions in which this policy lets tunnels through between every pod of its namespace and every other.
pub fn opens(policy: &NetworkPolicy) -> Directions {
    let Some(spec) = policy.spec.as_ref() else {
        return Directions::default();
    };
    let opens = |rule: &Rule| {
        let everybody = rule.peers.is_empty()
            || (rule.peers.iter()).any(|peer| {
                let pods = peer.pod_selector.as_ref().is_none_or(is_empty);
                peer.namespace_selector.as_ref().is_some_and(is_empty) && pods
            });
        everybody && Named::by(&rule.ports).lets_tunnels_through()
    };
    match spec.pod_selector.as_ref().is_none_or(is_empty) {
        true => Directions {
            from: incoming(spec).any(|rule| opens(&rule)),
            to: outgoing(spec).any(|rule| opens(&rule)),
        },
        false => Directions::default(),
    }
}

/// `open`: where another policy lets them through.
pub fn judge(policy: &NetworkPolicy, open: Directions, pods: &[IpNet]) -> Option<Finding> {
    let spec = policy.spec.as_ref()?;
    let refuses =
        |rule: Rule| Named::by(&rule.ports) == Named::Connections && !is_outside(rule.peers, pods);
    let refused = Directions {
        from: incoming(spec).any(refuses),
        to: outgoing(spec).any(refuses),
    };
    let (name, namespace) = (policy.name_any(), policy.namespace().unwrap_or_default());
    blocked(
        &format!("NetworkPolicy {namespace}/{name}"),
        refused.without(open),
        "beside the ports in its rules",
    )
}

fn incoming(spec: &NetworkPolicySpec) -> impl Iterator<Item = Rule<'_>> {
    let rules = spec.ingress.iter().flatten();
    let rules = rules.filter(|_| is_in_force(spec, "Ingress"));
    rules.map(|rule| Rule::new(rule.from.as_deref(), rule.ports.as_deref()))
}

fn outgoing(spec: &NetworkPolicySpec) -> impl Iterator<Item = Rule<'_>> {
    let rules = spec.egress.iter().flatten();
    let rules = rules.filter(|_| is_in_force(spec, "Egress"));
    rules.map(|rule| Rule::new(rule.to.as_deref(), rule.ports.as_deref()))
}

fn is_in_force(spec: &NetworkPolicySpec, direction: &str) -> bool {
    let types = spec.policy_types.as_deref().unwrap_or_default();
    types.is_empty() || types.iter().any(|one| one == direction)
}

impl<'a> Rule<'a> {
    fn new(peers: Option<&'a [NetworkPolicyPeer]>, ports: Option<&[NetworkPolicyPort]>) -> Self {
        Self {
            peers: peers.unwrap_or_default(),
            ports: ports.unwrap_or_default().iter().map(Ports::from).collect(),
        }
    }
}

/// Nothing but addresses that no pod has. Where nobody says which pods have, any may be one's.
fn is_outside(peers: &[NetworkPolicyPeer], pods: &[IpNet]) -> bool {
    !(peers.is_empty() || pods.is_empty())
        && (peers.iter()).all(|peer| {
            let block = peer.ip_block.as_ref();
            block.is_some_and(|block| pods.iter().all(|range| !has_some(block, range)))
        })
}

fn has_some(block: &IPBlock, range: &IpNet) -> bool {
    let Ok(whole) = block.cidr.parse::<IpNet>() else {
        return true;
    };
    let excepted = block.except.iter().flatten();
    let excepted = excepted
        .filter_map(|one| one.parse::<IpNet>().ok())
        .any(|one| one.contains(range));
    (whole.contains(range) || range.contains(&whole)) && !excepted
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const IN: Directions = Directions {
        from: true,
        to: false,
    };

    fn policy(spec: Value) -> NetworkPolicy {
        let policy = json!({ "metadata": { "name": "web", "namespace": "shop" }, "spec": spec });
        serde_json::from_value(policy).unwrap()
    }

    #[test]
    fn a_policy_that_leaves_out_the_tunnels_port_is_told() {
        for (ports, told) in [
            (json!(null), false),
            (json!([]), false),
            (json!([{ "port": 8080 }]), true),
            (json!([{ "port": "http" }]), true),
            (json!([{ "port": 8080 }, { "port": 15008 }]), false),
            (json!([{ "port": 15000, "endPort": 15010 }]), false),
            // What it lets through becomes no tunnel, or is asked of nobody who is enrolled.
            (json!([{ "protocol": "UDP" }]), false),
            (
                json!([{ "protocol": "UDP", "port": 53 }, { "port": 53 }]),
                false,
            ),
            (json!([{ "protocol": "TCP" }]), false),
        ] {
            let policy = policy(json!({ "podSelector": {}, "ingress": [{ "ports": ports }] }));
            let found = judge(&policy, Directions::default(), &[]);
            assert_eq!(found.is_some(), told, "{ports}");
            assert!(
                judge(&policy, IN, &[]).is_none(),
                "another lets them through"
            );
        }
        let rule = json!([{ "ports": [{ "port": 80 }] }]);
        let only_in = json!({ "podSelector": {}, "policyTypes": ["Ingress"], "egress": rule });
        assert!(judge(&policy(only_in), Directions::default(), &[]).is_none());
    }

    #[test]
    fn addresses_that_no_pod_has_are_not_about_tunnels() {
        let pods: Vec<IpNet> = vec!["10.244.0.0/24".parse().unwrap()];
        for (block, told) in [
            (json!({ "cidr": "192.0.2.0/24" }), false),
            (json!({ "cidr": "0.0.0.0/0" }), true),
            (
                json!({ "cidr": "0.0.0.0/0", "except": ["10.0.0.0/8"] }),
                false,
            ),
            (json!({ "cidr": "10.244.0.7/32" }), true),
            (json!({ "cidr": "fd00::/8" }), false),
        ] {
            let rule = json!([{ "to": [{ "ipBlock": block }], "ports": [{ "port": 443 }] }]);
            let policy = policy(json!({ "podSelector": {}, "egress": rule }));
            let found = judge(&policy, Directions::default(), &pods);
            assert_eq!(found.is_some(), told, "{block}");
            assert!(judge(&policy, Directions::default(), &[]).is_some());
        }
    }

    #[test]
    fn a_policy_of_its_own_may_let_tunnels_through() {
        let tunnels = json!([{ "port": 15008 }]);
        for (pods, peers, opens_in) in [
            (json!({}), json!(null), true),
            (json!({}), json!([{ "namespaceSelector": {} }]), true),
            (json!({}), json!([{ "podSelector": {} }]), false),
            (
                json!({ "matchLabels": { "app": "web" } }),
                json!(null),
                false,
            ),
        ] {
            let rule = json!([{ "from": peers, "ports": tunnels }]);
            let policy = policy(json!({ "podSelector": pods, "ingress": rule }));
            assert_eq!(opens(&policy).from, opens_in, "{pods} {peers}");
            assert!(!opens(&policy).to);
        }
    }
}
