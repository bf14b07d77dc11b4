// SPDX-License-Identifier: Apache-2.0
//! What other rules of the cluster would do to enrolled pods and to our own: NetworkPolicies and Cilium's, which see port 15008
//! where there was the application's, and the pod security of our own namespace.

pub mod cilium;
mod kubernetes;
mod ports;

use super::{Survey, known};
use crate::check::Finding;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::ResourceExt;
use podveil_model::HBONE_PORT;
use std::collections::BTreeMap;

const POD_SECURITY: &str = "pod-security.kubernetes.io/enforce";

/// Whether something holds for connections from peers to the pods, and from the pods to peers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Directions {
    from: bool,
    to: bool,
}

impl Directions {
    fn or(self, other: Self) -> Self {
        Self {
            from: self.from || other.from,
            to: self.to || other.to,
        }
    }

    fn without(self, other: Self) -> Self {
        Self {
            from: self.from && !other.from,
            to: self.to && !other.to,
        }
    }

    fn words(self) -> Option<&'static str> {
        match (self.from, self.to) {
            (false, false) => None,
            (true, false) => Some("from"),
            (false, true) => Some("to"),
            (true, true) => Some("from and to"),
        }
    }
}

/// Where policies let tunnels through between all pods: what others leave out does not count there, since rules add up.
#[derive(Debug, Default)]
struct Open {
    everywhere: Directions,
    namespaces: BTreeMap<String, Directions>,
}

impl Open {
    /// `None`: in every namespace.
    fn add(&mut self, namespace: Option<&str>, directions: Directions) {
        let place = match namespace {
            Some(namespace) => self.namespaces.entry(namespace.to_owned()).or_default(),
            None => &mut self.everywhere,
        };
        *place = place.or(directions);
    }

    fn in_namespace(&self, namespace: Option<&str>) -> Directions {
        let own = namespace.and_then(|namespace| self.namespaces.get(namespace));
        self.everywhere.or(own.copied().unwrap_or_default())
    }
}

pub fn judge(survey: &Survey) -> Vec<Finding> {
    let mut findings = policies(survey);
    findings.extend(own_namespace(survey));
    if findings.is_empty() && !survey.enrolled.is_empty() {
        findings.push(Finding::good(
            "policies",
            format!(
                "no NetworkPolicy and no policy of Cilium's in {} stands before port {HBONE_PORT}; others are not looked at",
                names(survey)
            ),
        ));
    }
    findings
}

fn policies(survey: &Survey) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut listed = |what, answered| known("policies", what, answered, &mut findings);
    let of_cilium = [
        listed(cilium::NAMESPACED.1, &survey.cilium_policies),
        listed(cilium::CLUSTERWIDE.1, &survey.clusterwide_policies),
    ];
    let of_kubernetes = known(
        "policies",
        "networkpolicies",
        &survey.network_policies,
        &mut findings,
    );
    let mut read = Vec::new();
    for policy in of_cilium.into_iter().flatten() {
        match cilium::read(policy, &survey.enrolled) {
            Ok(policy) => read.push(policy),
            Err(finding) => findings.push(finding),
        }
    }
    let mut open = Open::default();
    for policy in of_kubernetes {
        open.add(policy.namespace().as_deref(), kubernetes::opens(policy));
    }
    for policy in &read {
        open.add(policy.namespace(), policy.opens());
    }
    let pods = kubernetes::pod_ranges(survey.nodes.as_deref().unwrap_or_default());
    findings.extend(of_kubernetes.iter().filter_map(|policy| {
        let open = open.in_namespace(policy.namespace().as_deref());
        kubernetes::judge(policy, open, &pods)
    }));
    findings.extend(
        (read.iter()).flat_map(|policy| policy.judge(open.in_namespace(policy.namespace()))),
    );
    findings
}

/// Does it choose everything?
fn is_empty(selector: &LabelSelector) -> bool {
    let labels = selector.match_labels.as_ref();
    let expressions = selector.match_expressions.as_ref();
    labels.is_none_or(BTreeMap::is_empty) && expressions.is_none_or(Vec::is_empty)
}

/// A policy with a rule that names ports, and none of them lets tunnels through. `cure`: where that is to be said.
fn blocked(policy: &str, directions: Directions, cure: &str) -> Option<Finding> {
    let directions = directions.words()?;
    Some(Finding::problem(
        "policies",
        format!(
            "{policy} names ports {directions} its pods' peers and leaves out {HBONE_PORT}, where tunnels go"
        ),
        format!(
            "let TCP {HBONE_PORT} through {cure}; the ports themselves stay for peers that are not enrolled"
        ),
    ))
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
    fn what_one_policy_leaves_out_another_may_let_through() {
        let spec = |port: &str| json!({ "endpointSelector": {}, "ingress": [{ "toPorts": [{ "ports": [{ "port": port }] }] }] });
        let of_cilium = |namespace: Option<&str>, spec| json!({ "apiVersion": "cilium.io/v2", "kind": "-", "metadata": { "name": "one", "namespace": namespace }, "spec": spec });
        let web = json!({ "metadata": { "name": "web", "namespace": "shop" }, "spec": {
            "podSelector": {}, "ingress": [{ "ports": [{ "port": 80 }] }] } });
        let with = |more: Vec<Value>, clusterwide: Vec<Value>| Survey {
            network_policies: objects([web.clone()]),
            cilium_policies: objects(more),
            clusterwide_policies: objects(clusterwide),
            enrolled: ["shop".to_owned()].into(),
            ..nothing()
        };
        assert_eq!(worse(judge(&with(vec![], vec![]))).len(), 1);
        let other = of_cilium(Some("shop"), spec("8080"));
        assert_eq!(worse(judge(&with(vec![other.clone()], vec![]))).len(), 2);
        let open = of_cilium(Some("shop"), spec("15008"));
        assert_eq!(worse(judge(&with(vec![other, open], vec![]))).len(), 0);
        let everywhere = of_cilium(None, spec("15008"));
        assert_eq!(worse(judge(&with(vec![], vec![everywhere]))).len(), 0);
        let elsewhere = of_cilium(Some("other"), spec("15008"));
        assert_eq!(worse(judge(&with(vec![elsewhere], vec![]))).len(), 1);
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
