// SPDX-License-Identifier: Apache-2.0
//! What the API server itself dials: webhooks and aggregated APIs. It has no identity, so strict mode refuses it.

use super::{Survey, known};
use crate::check::Finding;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt;
use podveil_kube::Backend;
use std::collections::BTreeMap;

pub fn judge(survey: &Survey) -> Vec<Finding> {
    if survey.strict.is_empty() {
        return vec![Finding::note(
            "webhooks",
            "no namespace is strict; `--strict NAMESPACE` judges as if one were",
        )];
    }
    let mut findings = Vec::new();
    let services = known("webhooks", "services", &survey.services, &mut findings);
    let refused = backends(survey, &mut findings)
        .into_iter()
        .filter(|backend| survey.strict.contains(&backend.namespace))
        .collect::<Vec<_>>();
    if refused.is_empty() && findings.is_empty() {
        findings.push(Finding::good(
            "webhooks",
            "the API server dials nothing in a strict namespace",
        ));
    }
    findings.extend(refused.iter().map(|backend| finding(backend, services)));
    findings
}

fn backends(survey: &Survey, findings: &mut Vec<Finding>) -> Vec<Backend> {
    const SUBJECT: &str = "webhooks";
    let mut backends = Vec::new();
    let kind = "mutatingwebhookconfigurations";
    let listed = known(SUBJECT, kind, &survey.mutating, findings);
    backends.extend(listed.iter().flat_map(Backend::of_mutating));
    let kind = "validatingwebhookconfigurations";
    let listed = known(SUBJECT, kind, &survey.validating, findings);
    backends.extend(listed.iter().flat_map(Backend::of_validating));
    let listed = known(SUBJECT, "apiservices", &survey.api_services, findings);
    backends.extend(listed.iter().filter_map(Backend::of_api));
    let kind = "customresourcedefinitions";
    let listed = known(SUBJECT, kind, &survey.definitions, findings);
    backends.extend(listed.iter().filter_map(Backend::of_definition));
    backends.sort();
    backends.dedup();
    backends
}

fn finding(backend: &Backend, services: &[Service]) -> Finding {
    let Backend {
        namespace,
        service,
        port,
        object,
    } = backend;
    let found = services
        .iter()
        .find(|one| one.namespace().as_ref() == Some(namespace) && one.name_any() == *service);
    let target = found
        .and_then(|service| target(service, *port))
        .unwrap_or(port.to_string());
    let selector: BTreeMap<String, String> = found
        .and_then(|service| service.spec.as_ref())
        .and_then(|spec| spec.selector.clone())
        .unwrap_or_default();
    let selector: Vec<String> = selector
        .iter()
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    Finding::problem(
        "webhooks",
        format!(
            "{object} is served by {namespace}/{service} port {port}: strict mode refuses the API server there"
        ),
        format!(
            "annotate the pods behind it ({}) with podveil.io/plain-inbound-ports={target}",
            if selector.is_empty() {
                "the service has no selector".to_owned()
            } else {
                selector.join(",")
            }
        ),
    )
}

/// The pods' own port behind a port of their service.
fn target(service: &Service, port: i32) -> Option<String> {
    let ports = service.spec.as_ref()?.ports.as_ref()?;
    let found = ports.iter().find(|known| known.port == port)?;
    Some(match &found.target_port {
        Some(IntOrString::Int(target)) => target.to_string(),
        Some(IntOrString::String(name)) => format!("<their port {name:?}>"),
        None => port.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::super::testing::{nothing, objects, worse};
    use super::*;
    use serde_json::json;

    fn survey() -> Survey {
        let hook = |namespace: &str| {
            json!({ "metadata": { "name": "policy" }, "webhooks": [{
                "name": "a.b.c", "admissionReviewVersions": ["v1"], "sideEffects": "None",
                "clientConfig": { "service": { "namespace": namespace, "name": "gate" } },
            }] })
        };
        Survey {
            validating: objects([hook("guard"), hook("elsewhere")]),
            api_services: objects([json!({ "metadata": { "name": "v1.metrics" }, "spec": {
                "groupPriorityMinimum": 1, "versionPriority": 1,
                "service": { "namespace": "guard", "name": "metrics", "port": 8443 } } })]),
            services: objects([
                json!({ "metadata": { "name": "gate", "namespace": "guard" }, "spec": {
                "selector": { "app": "gate" }, "ports": [{ "port": 443, "targetPort": 9443 }] } }),
            ]),
            strict: ["guard".into()].into(),
            ..nothing()
        }
    }

    #[test]
    fn what_the_api_server_dials_in_a_strict_namespace_is_told_with_the_port() {
        let findings = judge(&survey());
        assert_eq!(
            findings[0].cure,
            "annotate the pods behind it (app=gate) with podveil.io/plain-inbound-ports=9443"
        );
        assert_eq!(
            worse(findings),
            [
                "Problem: ValidatingWebhookConfiguration policy is served by guard/gate port 443: strict mode refuses the API \
                 server there",
                "Problem: APIService v1.metrics is served by guard/metrics port 8443: strict mode refuses the API server there",
            ]
        );
    }

    #[test]
    fn without_a_strict_namespace_nothing_is_refused() {
        let survey = Survey {
            strict: Default::default(),
            ..survey()
        };
        assert_eq!(worse(judge(&survey)), [""; 0]);
    }
}
