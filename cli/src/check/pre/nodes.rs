// SPDX-License-Identifier: Apache-2.0
//! The API server and the nodes: versions, kernels, architectures, and ports that are taken.

use super::{Survey, known};
use crate::check::Finding;
use crate::output::count;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::ResourceExt;
use std::collections::BTreeMap;

/// The chart's own bound (`kubeVersion`), above that from which tokens say on which node their pod runs (1.30,
/// ServiceAccountTokenPodNodeInfo): the CA decides by it.
const KUBERNETES: (u32, u32) = (1, 32);
/// nftables tell a socket's cgroup (v2) in namespaces from here on.
const KERNEL: (u32, u32) = (5, 13);
/// The node program's own, on every node's addresses.
const PORTS: [i32; 6] = [15000, 15002, 15020, 15021, 15022, 15023];

pub fn judge(survey: &Survey) -> Vec<Finding> {
    let mut findings = vec![kubernetes(survey)];
    let nodes = known("nodes", "nodes", &survey.nodes, &mut findings);
    findings.extend(kernels(nodes));
    findings.extend(platforms(nodes));
    let pods = known("ports", "pods", &survey.host_network_pods, &mut findings);
    findings.extend(ports(pods, &survey.own_namespace));
    findings
}

fn kubernetes(survey: &Survey) -> Finding {
    match &survey.version {
        Ok((major, minor)) if (*major, *minor) >= KUBERNETES => {
            Finding::good("kubernetes", format!("version {major}.{minor}"))
        }
        Ok((major, minor)) => Finding::problem(
            "kubernetes",
            format!(
                "version {major}.{minor}: tokens do not say on which node a pod runs, so no node program can prove itself"
            ),
            format!("upgrade to {}.{} or newer", KUBERNETES.0, KUBERNETES.1),
        ),
        Err(why) => Finding::unknown("kubernetes", format!("its version is not known: {why}"), ""),
    }
}

fn kernels(nodes: &[Node]) -> Vec<Finding> {
    let mut by_kernel: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for node in nodes {
        let info = node
            .status
            .as_ref()
            .and_then(|status| status.node_info.as_ref());
        let kernel = info.map_or("", |info| info.kernel_version.as_str());
        by_kernel.entry(kernel).or_default().push(node.name_any());
    }
    let finding = |(kernel, names): (&str, Vec<String>)| {
        let who = count(names.len(), "node");
        match version(kernel) {
            Some(version) if version >= KERNEL => {
                Finding::good("kernel", format!("{who} with Linux {kernel}"))
            }
            Some(_) => Finding::problem(
                "kernel",
                format!(
                    "Linux {kernel} on {}: older than {}.{}",
                    some(&names),
                    KERNEL.0,
                    KERNEL.1
                ),
                "upgrade these nodes, or keep the node program off them by `node.nodeSelector`: their pods are then not \
                 captured",
            ),
            None => Finding::unknown(
                "kernel",
                format!("{} do not say which kernel they run", some(&names)),
                "",
            ),
        }
    };
    let mut findings: Vec<_> = by_kernel.into_iter().map(finding).collect();
    if !nodes.is_empty() {
        findings.push(Finding::note(
            "kernel",
            "BTF, cgroup version and nftables can be read only on a node: the node program names what is missing when it \
             starts, and `status` shows it",
        ));
    }
    findings
}

fn platforms(nodes: &[Node]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for node in nodes {
        let Some(info) = node
            .status
            .as_ref()
            .and_then(|status| status.node_info.as_ref())
        else {
            continue;
        };
        if info.operating_system != "linux" {
            findings.push(Finding::warning(
                "nodes",
                format!(
                    "{} runs {}: its pods are not captured",
                    node.name_any(),
                    info.operating_system
                ),
                "do not label namespaces in strict mode whose pods it runs",
            ));
        } else if !matches!(info.architecture.as_str(), "amd64" | "arm64") {
            findings.push(Finding::problem(
                "nodes",
                format!(
                    "{} is {}: there is no image for it",
                    node.name_any(),
                    info.architecture
                ),
                "keep the node program off it by `node.nodeSelector`",
            ));
        }
    }
    findings
}

/// Another program in the node's own network that has one of our ports.
fn ports(pods: &[Pod], own_namespace: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    for pod in pods {
        if pod.namespace().as_deref() == Some(own_namespace) {
            continue;
        }
        let containers = pod.spec.as_ref().map(|spec| spec.containers.as_slice());
        let declared = containers
            .unwrap_or_default()
            .iter()
            .flat_map(|one| one.ports.iter().flatten());
        let taken: Vec<String> = declared
            .map(|port| port.container_port)
            .filter(|port| PORTS.contains(port))
            .map(|port| port.to_string())
            .collect();
        if !taken.is_empty() {
            findings.push(Finding::problem(
                "ports",
                format!(
                    "{}/{} has port {} of its node",
                    pod.namespace().unwrap_or_default(),
                    pod.name_any(),
                    taken.join(", ")
                ),
                "the node program needs it: move that pod's port, or keep one of the two off the node",
            ));
        }
    }
    findings
}

/// `5.15.0-91-generic` is (5, 15).
fn version(kernel: &str) -> Option<(u32, u32)> {
    let mut parts = kernel.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// The first few names.
fn some(names: &[String]) -> String {
    const NAMED: usize = 5;
    match names.len() {
        0..=NAMED => names.join(", "),
        more => format!("{} and {} more", names[..NAMED].join(", "), more - NAMED),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{nothing, objects, worse};
    use super::*;
    use serde_json::{Value, json};

    fn node(name: &str, kernel: &str, os: &str, architecture: &str) -> Value {
        json!({ "metadata": { "name": name }, "status": { "nodeInfo": {
            "kernelVersion": kernel, "operatingSystem": os, "architecture": architecture,
            "bootID": "", "containerRuntimeVersion": "", "kubeProxyVersion": "", "kubeletVersion": "",
            "machineID": "", "osImage": "", "systemUUID": "",
        } } })
    }

    #[test]
    fn kernels_and_platforms() {
        for (node, found) in [
            (node("n", "6.18.0", "linux", "amd64"), vec![]),
            (node("n", "5.13.0-52-generic", "linux", "arm64"), vec![]),
            (
                node("n", "5.4.0-1", "linux", "amd64"),
                vec!["Problem: Linux 5.4.0-1 on n: older than 5.13"],
            ),
            (
                node("n", "10.0.20348", "windows", "amd64"),
                vec!["Warning: n runs windows: its pods are not captured"],
            ),
            (
                node("n", "6.1.0", "linux", "riscv64"),
                vec!["Problem: n is riscv64: there is no image for it"],
            ),
            (
                node("n", "", "linux", "amd64"),
                vec!["Unknown: n do not say which kernel they run"],
            ),
        ] {
            let survey = Survey {
                nodes: objects([node]),
                ..nothing()
            };
            assert_eq!(worse(judge(&survey)), found);
        }
    }

    #[test]
    fn an_old_api_server_and_a_forbidden_list_are_told() {
        let survey = Survey {
            version: Ok((1, 29)),
            nodes: Err("forbidden".into()),
            ..nothing()
        };
        assert_eq!(
            worse(judge(&survey)),
            [
                "Problem: version 1.29: tokens do not say on which node a pod runs, so no node program can prove itself",
                "Unknown: nodes cannot be read: forbidden",
            ]
        );
    }

    #[test]
    fn a_port_of_ours_that_another_has_is_told() {
        let pod = |namespace: &str, port: i32| {
            json!({ "metadata": { "name": "p", "namespace": namespace }, "spec": { "containers": [
                { "name": "c", "ports": [{ "containerPort": port }] },
            ] } })
        };
        let survey = Survey {
            host_network_pods: objects([
                pod("other", 15020),
                pod("other", 9100),
                pod("podveil-system", 15020),
            ]),
            ..nothing()
        };
        assert_eq!(
            worse(judge(&survey)),
            ["Problem: other/p has port 15020 of its node"]
        );
    }
}
