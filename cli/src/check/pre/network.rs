// SPDX-License-Identifier: Apache-2.0
//! The CNI agents that are there, and of Cilium how it is set.

use super::{Survey, known};
use crate::check::Finding;
use k8s_openapi::api::apps::v1::DaemonSet;
use kube::ResourceExt;
use std::collections::{BTreeMap, BTreeSet};

/// Agents by the names of their DaemonSets, as their own manifests have them.
const AGENTS: [(&str, &str); 12] = [
    ("antrea-agent", "Antrea"),
    ("aws-node", "Amazon VPC CNI"),
    ("azure-cns", "Azure CNI"),
    ("calico-node", "Calico"),
    ("canal", "Canal"),
    ("cilium", "Cilium"),
    ("kindnet", "kindnet"),
    ("kube-flannel-ds", "flannel"),
    ("kube-ovn-cni", "Kube-OVN"),
    ("kube-router", "kube-router"),
    ("ovnkube-node", "OVN-Kubernetes"),
    ("weave-net", "Weave Net"),
];
/// IPv6 needs this much (RFC 8200 §5).
const LEAST_MTU: u32 = 1280;

pub fn judge(survey: &Survey) -> Vec<Finding> {
    let mut findings = Vec::new();
    let sets = known("cni", "daemonsets", &survey.daemon_sets, &mut findings);
    let found = agents(sets);
    findings.push(match found.len() {
        0 => Finding::note(
            "cni",
            "no CNI agent that is known here; any that gives pods addresses will do",
        ),
        1 => Finding::good("cni", found.iter().copied().collect::<Vec<_>>().join("")),
        _ => Finding::note(
            "cni",
            format!(
                "several: {}",
                found.into_iter().collect::<Vec<_>>().join(", ")
            ),
        ),
    });
    match &survey.cilium {
        Ok(Some(config)) => findings.extend(cilium(&config.data.clone().unwrap_or_default())),
        Ok(None) => findings.push(Finding::good("mtu", MTU)),
        Err(why) => findings.push(Finding::unknown(
            "cni",
            format!("how Cilium is set cannot be read: {why}"),
            "`kubectl get configmap -n kube-system cilium-config` as whoever runs this",
        )),
    }
    findings
}

const MTU: &str =
    "nothing to change: tunnels are TCP from the pods' own namespaces, whose MTU holds for them";

fn agents(sets: &[DaemonSet]) -> BTreeSet<&'static str> {
    let agent = |set: &DaemonSet| {
        let name = set.name_any();
        AGENTS
            .into_iter()
            .find(|(known, _)| *known == name)
            .map(|(_, title)| title)
    };
    sets.iter().filter_map(agent).collect()
}

/// The agent's flags, as its ConfigMap holds them.
fn cilium(config: &BTreeMap<String, String>) -> Vec<Finding> {
    let is_on = |key: &str| config.get(key).is_some_and(|value| value == "true");
    let mut findings = Vec::new();
    if is_on("enable-ztunnel") {
        findings.push(Finding::problem(
            "cilium",
            "encryption.type=ztunnel is on: its agent captures the same pods, and both would hold their ports",
            "turn it off (`helm upgrade cilium ... --set encryption.enabled=false`) before a namespace is labelled",
        ));
    }
    for (key, name) in [("enable-ipsec", "IPsec"), ("enable-wireguard", "WireGuard")] {
        if is_on(key) {
            findings.push(Finding::note(
                "cilium",
                format!(
                    "{name} between nodes is on: it works, and enrolled TCP is then encrypted twice"
                ),
            ));
        }
    }
    if config
        .get("enable-policy")
        .is_some_and(|value| value == "always")
    {
        findings.push(Finding::warning(
            "cilium",
            "enable-policy=always: what no policy allows is dropped, and tunnels go to port 15008",
            "allow TCP 15008 between enrolled namespaces",
        ));
    }
    if is_on("cni-exclusive") {
        findings.push(Finding::warning(
            "cilium",
            "cni.exclusive is on: its agent takes other plugins out of its list, and new pods are plain until they are captured",
            "`helm upgrade cilium ... --set cni.exclusive=false`, or install Podveil with node.cni.enabled=false",
        ));
    }
    if is_on("kube-proxy-replacement") && !is_on("bpf-lb-sock-hostns-only") {
        findings.push(Finding::note(
            "cilium",
            "its socket load balancer chooses endpoints before capture: connections are encrypted, and are counted by pod \
             and not by service",
        ));
    }
    let mtu = config
        .get("mtu")
        .and_then(|mtu| mtu.parse::<u32>().ok())
        .filter(|mtu| *mtu != 0);
    findings.push(match mtu {
        Some(mtu) if mtu < LEAST_MTU => Finding::problem(
            "mtu",
            format!("Cilium's mtu is {mtu}: less than IPv6 needs"),
            format!("set at least {LEAST_MTU}"),
        ),
        _ => Finding::good("mtu", MTU),
    });
    if findings.len() == 1 {
        findings.push(Finding::good(
            "cilium",
            "nothing in its configuration is in the way",
        ));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::super::testing::{nothing, objects, worse};
    use super::*;
    use serde_json::json;

    #[test]
    fn how_cilium_is_set() {
        for (key, value, found) in [
            ("enable-wireguard", "true", vec![]),
            (
                "enable-ztunnel",
                "true",
                vec![
                    "Problem: encryption.type=ztunnel is on: its agent captures the same pods, and both would hold their ports",
                ],
            ),
            ("enable-ztunnel", "false", vec![]),
            (
                "enable-policy",
                "always",
                vec![
                    "Warning: enable-policy=always: what no policy allows is dropped, and tunnels go to port 15008",
                ],
            ),
            (
                "cni-exclusive",
                "true",
                vec![
                    "Warning: cni.exclusive is on: its agent takes other plugins out of its list, and new pods are plain until they are captured",
                ],
            ),
            ("cni-exclusive", "false", vec![]),
            ("mtu", "0", vec![]),
            (
                "mtu",
                "1200",
                vec!["Problem: Cilium's mtu is 1200: less than IPv6 needs"],
            ),
        ] {
            let config = json!({ "data": { key: value } });
            let survey = Survey {
                cilium: Ok(Some(serde_json::from_value(config).unwrap())),
                ..nothing()
            };
            assert_eq!(worse(judge(&survey)), found, "{key}={value}");
        }
    }

    #[test]
    fn agents_are_known_by_name() {
        let survey = Survey {
            daemon_sets: objects([
                json!({ "metadata": { "name": "cilium", "namespace": "kube-system" } }),
                json!({ "metadata": { "name": "logs", "namespace": "kube-system" } }),
            ]),
            ..nothing()
        };
        assert_eq!(judge(&survey)[0].what, "Cilium");
    }
}
