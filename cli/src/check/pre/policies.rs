// SPDX-License-Identifier: Apache-2.0
//! What other rules of the cluster would do to enrolled pods and to our own: NetworkPolicies, which see port 15008 where
//! there was the application's, and the pod security of our own namespace.

use super::{Survey, known};
use crate::check::Finding;
use k8s_openapi::api::networking::v1::{NetworkPolicy, NetworkPolicyPort};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt;
use podveil_model::HBONE_PORT;

const POD_SECURITY: &str = "pod-security.kubernetes.io/enforce";

pub fn judge(survey: &Survey) -> Vec<Finding> {
    let mut findings = Vec::new();
    let policies = known(
        "policies",
        "networkpolicies",
        &survey.network_policies,
        &mut findings,
    );
    findings.extend(policies.iter().filter_map(tunnels_blocked));
    findings.extend(own_namespace(survey));
    if findings.is_empty() && !survey.enrolled.is_empty() {
        findings.push(Finding::good(
            "policies",
            format!(
                "no NetworkPolicy of {} stands before port {HBONE_PORT}",
                names(survey)
            ),
        ));
    }
    findings
}

/// A rule that names ports, and none of them lets tunnels through.
fn tunnels_blocked(policy: &NetworkPolicy) -> Option<Finding> {
    let spec = policy.spec.as_ref()?;
    let incoming = spec
        .ingress
        .iter()
        .flatten()
        .map(|rule| rule.ports.as_deref());
    let outgoing = spec
        .egress
        .iter()
        .flatten()
        .map(|rule| rule.ports.as_deref());
    let blocks = |ports: Option<&[NetworkPolicyPort]>| {
        ports.is_some_and(|ports| !ports.is_empty() && !ports.iter().any(allows_tunnels))
    };
    let mut directions = Vec::new();
    if incoming.clone().any(blocks) {
        directions.push("from");
    }
    if outgoing.clone().any(blocks) {
        directions.push("to");
    }
    if directions.is_empty() {
        return None;
    }
    let (name, namespace) = (policy.name_any(), policy.namespace().unwrap_or_default());
    Some(Finding::problem(
        "policies",
        format!(
            "NetworkPolicy {namespace}/{name} names ports {} its pods' peers and leaves out {HBONE_PORT}, where tunnels go",
            directions.join(" and ")
        ),
        format!(
            "add TCP {HBONE_PORT} beside the ports in its rules; the ports themselves stay for peers that are not enrolled"
        ),
    ))
}

fn allows_tunnels(port: &NetworkPolicyPort) -> bool {
    let tcp = port
        .protocol
        .as_deref()
        .is_none_or(|protocol| protocol == "TCP");
    let hbone = i32::from(HBONE_PORT);
    tcp && match (&port.port, port.end_port) {
        (None, _) => true,
        (Some(IntOrString::Int(first)), Some(last)) => (*first..=last).contains(&hbone),
        (Some(IntOrString::Int(only)), None) => *only == hbone,
        (Some(IntOrString::String(_)), _) => false,
    }
}

fn own_namespace(survey: &Survey) -> Option<Finding> {
    let namespaces = survey.namespaces.as_ref().ok()?;
    let own = namespaces
        .iter()
        .find(|one| one.name_any() == survey.own_namespace)?;
    let level = own
        .labels()
        .get(POD_SECURITY)
        .filter(|level| *level != "privileged")?;
    Some(Finding::problem(
        "security",
        format!(
            "namespace {} enforces pod security {level:?}, and the node program enters pods' network namespaces",
            survey.own_namespace
        ),
        format!(
            "`kubectl label --overwrite namespace {} {POD_SECURITY}=privileged`",
            survey.own_namespace
        ),
    ))
}

fn names(survey: &Survey) -> String {
    survey
        .enrolled
        .iter()
        .cloned()
        .collect::<Vec<_>>()
        .join(", ")
}

#[cfg(test)]
mod tests {
    use super::super::testing::{nothing, objects, worse};
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn a_policy_that_leaves_out_the_tunnels_port_is_told() {
        for (ports, blocked) in [
            (json!(null), false),
            (json!([]), false),
            (json!([{ "port": 8080 }]), true),
            (json!([{ "port": "http" }]), true),
            (json!([{ "port": 8080 }, { "port": 15008 }]), false),
            (json!([{ "port": 15000, "endPort": 15010 }]), false),
            (json!([{ "protocol": "UDP" }]), true),
            (json!([{ "protocol": "TCP" }]), false),
        ] {
            let policy = json!({ "metadata": { "name": "web", "namespace": "shop" }, "spec": {
                "podSelector": {}, "ingress": [{ "ports": ports }] } });
            let survey = Survey {
                network_policies: objects([policy]),
                ..nothing()
            };
            assert_eq!(!worse(judge(&survey)).is_empty(), blocked, "{ports}");
        }
    }

    #[test]
    fn pod_security_of_our_own_namespace() {
        let with = |labels: Value| Survey {
            namespaces: objects([
                json!({ "metadata": { "name": "podveil-system", "labels": labels } }),
            ]),
            ..nothing()
        };
        assert_eq!(worse(judge(&with(json!({})))).len(), 0);
        assert_eq!(
            worse(judge(&with(json!({ POD_SECURITY: "privileged" })))).len(),
            0
        );
        assert_eq!(
            worse(judge(&with(json!({ POD_SECURITY: "restricted" })))).len(),
            1
        );
    }
}
