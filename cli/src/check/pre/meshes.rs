// SPDX-License-Identifier: Apache-2.0
//! Other meshes: their agents on the nodes, their labels on namespaces, their sidecars in pods.

use super::{Survey, known};
use crate::check::Finding;
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Container, Namespace, Pod};
use kube::ResourceExt;

/// DaemonSets that put rules into pods' namespaces.
const AGENTS: [(&str, &str); 6] = [
    ("consul-cni", "Consul"),
    ("istio-cni-node", "Istio"),
    ("kuma-cni-node", "Kuma"),
    ("linkerd-cni", "Linkerd"),
    ("osm-bootstrap", "Open Service Mesh"),
    ("ztunnel", "Istio ambient"),
];
/// Namespace labels and annotations by which another mesh takes pods; the empty value stands for any.
const MARKS: [(&str, &str, &str); 5] = [
    ("istio-injection", "enabled", "Istio"),
    ("istio.io/dataplane-mode", "ambient", "Istio ambient"),
    ("istio.io/rev", "", "Istio"),
    ("kuma.io/sidecar-injection", "enabled", "Kuma"),
    ("linkerd.io/inject", "enabled", "Linkerd"),
];
const SIDECARS: [(&str, &str); 4] = [
    ("consul-dataplane", "Consul"),
    ("istio-proxy", "Istio"),
    ("kuma-sidecar", "Kuma"),
    ("linkerd-proxy", "Linkerd"),
];
/// At most so many pods are named.
const TOLD: usize = 5;

pub fn judge(survey: &Survey) -> Vec<Finding> {
    let mut findings = Vec::new();
    let sets = known("meshes", "daemonsets", &survey.daemon_sets, &mut findings);
    findings.extend(sets.iter().filter_map(agent));
    let namespaces = known("meshes", "namespaces", &survey.namespaces, &mut findings);
    let enrolled = namespaces
        .iter()
        .filter(|namespace| survey.enrolled.contains(&namespace.name_any()));
    findings.extend(enrolled.filter_map(mark));
    let pods = known("meshes", "pods", &survey.pods, &mut findings);
    findings.extend(sidecars(pods));
    if findings.is_empty() {
        findings.push(Finding::good("meshes", "no other mesh was found"));
    }
    findings
}

fn agent(set: &DaemonSet) -> Option<Finding> {
    let name = set.name_any();
    let (_, mesh) = AGENTS.into_iter().find(|(known, _)| *known == name)?;
    Some(Finding::warning(
        "meshes",
        format!(
            "{mesh}'s agent runs on the nodes ({}/{name})",
            set.namespace().unwrap_or_default()
        ),
        "it may stay for other namespaces: take a namespace out of it before it is labelled for Podveil",
    ))
}

fn mark(namespace: &Namespace) -> Option<Finding> {
    let name = namespace.name_any();
    let (label, mesh) = MARKS.into_iter().find_map(|(key, value, mesh)| {
        let is = (namespace.labels().get(key)).or_else(|| namespace.annotations().get(key))?;
        (value.is_empty() || is == value).then_some((key, mesh))
    })?;
    Some(Finding::problem(
        "meshes",
        format!(
            "namespace {name} is {mesh}'s too ({label}): its pods would be held by both and are not captured"
        ),
        format!("`kubectl label namespace {name} {label}-`, then restart its pods"),
    ))
}

fn sidecars(pods: &[Pod]) -> Option<Finding> {
    let mesh = |pod: &Pod| {
        let spec = pod.spec.as_ref()?;
        let init = spec.init_containers.iter().flatten();
        let named = |one: &Container| {
            SIDECARS
                .into_iter()
                .find(|(known, _)| *known == one.name)
                .map(|(_, mesh)| mesh)
        };
        spec.containers.iter().chain(init).find_map(named)
    };
    let found: Vec<String> = (pods.iter())
        .filter_map(|pod| {
            let mesh = mesh(pod)?;
            let namespace = pod.namespace().unwrap_or_default();
            Some(format!("{namespace}/{} ({mesh})", pod.name_any()))
        })
        .collect();
    let more = found.len().saturating_sub(TOLD);
    let named = found[..found.len() - more].join(", ");
    let more = if more > 0 {
        format!(" and {more} more")
    } else {
        String::new()
    };
    (!found.is_empty()).then(|| {
        Finding::problem(
            "meshes",
            format!("pods with another mesh's sidecar are not captured: {named}{more}"),
            "switch its injection off for their namespace and restart them",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::super::testing::{nothing, objects, worse};
    use super::*;
    use serde_json::json;

    #[test]
    fn other_meshes_are_told_where_they_would_collide() {
        let namespace = |name: &str, key: &str, value: &str| json!({ "metadata": { "name": name, "labels": { key: value } } });
        let survey = Survey {
            daemon_sets: objects([
                json!({ "metadata": { "name": "ztunnel", "namespace": "istio-system" } }),
            ]),
            namespaces: objects([
                namespace("shop", "istio-injection", "enabled"),
                namespace("blog", "istio-injection", "disabled"),
                namespace("apart", "linkerd.io/inject", "enabled"),
            ]),
            pods: objects([
                json!({ "metadata": { "name": "web", "namespace": "shop" }, "spec": {
                    "containers": [{ "name": "app" }], "initContainers": [{ "name": "istio-proxy" }] } }),
                json!({ "metadata": { "name": "bare", "namespace": "shop" }, "spec": { "containers": [{ "name": "app" }] } }),
            ]),
            enrolled: ["shop".into(), "blog".into()].into(),
            ..nothing()
        };
        assert_eq!(
            worse(judge(&survey)),
            [
                "Warning: Istio ambient's agent runs on the nodes (istio-system/ztunnel)",
                "Problem: namespace shop is Istio's too (istio-injection): its pods would be held by both and are not captured",
                "Problem: pods with another mesh's sidecar are not captured: shop/web (Istio)",
            ]
        );
        assert_eq!(worse(judge(&nothing())), [""; 0]);
    }
}
