// SPDX-License-Identifier: Apache-2.0
//! What the API server itself dials: webhooks and aggregated APIs. It has no identity, so strict mode refuses it.

use super::{Survey, known};
use crate::check::Finding;
use k8s_openapi::api::admissionregistration::v1::WebhookClientConfig;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt;
use std::collections::BTreeMap;

/// Where a webhook that names no port is.
const DEFAULT_PORT: i32 = 443;

/// A service that the API server dials, and for what.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct Backend {
    namespace: String,
    service: String,
    port: i32,
    /// `ValidatingWebhookConfiguration policy`.
    object: String,
}

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
    let mut backends = Vec::new();
    let subject = "webhooks";
    for one in known(
        subject,
        "mutatingwebhookconfigurations",
        &survey.mutating,
        findings,
    ) {
        let object = format!("MutatingWebhookConfiguration {}", one.name_any());
        let configs = one
            .webhooks
            .iter()
            .flatten()
            .map(|hook| &hook.client_config);
        backends.extend(configs.filter_map(|config| webhook(config, &object)));
    }
    for one in known(
        subject,
        "validatingwebhookconfigurations",
        &survey.validating,
        findings,
    ) {
        let object = format!("ValidatingWebhookConfiguration {}", one.name_any());
        let configs = one
            .webhooks
            .iter()
            .flatten()
            .map(|hook| &hook.client_config);
        backends.extend(configs.filter_map(|config| webhook(config, &object)));
    }
    for one in known(subject, "apiservices", &survey.api_services, findings) {
        let service = one.spec.as_ref().and_then(|spec| spec.service.as_ref());
        let named =
            service.and_then(|service| service.namespace.as_ref().zip(service.name.as_ref()));
        if let Some((namespace, name)) = named {
            backends.push(Backend {
                namespace: namespace.clone(),
                service: name.clone(),
                port: service
                    .and_then(|service| service.port)
                    .unwrap_or(DEFAULT_PORT),
                object: format!("APIService {}", one.name_any()),
            });
        }
    }
    for one in known(
        subject,
        "customresourcedefinitions",
        &survey.definitions,
        findings,
    ) {
        let conversion = one
            .spec
            .conversion
            .as_ref()
            .and_then(|conversion| conversion.webhook.as_ref());
        let service = conversion
            .and_then(|webhook| webhook.client_config.as_ref())
            .and_then(|config| config.service.as_ref());
        if let Some(service) = service {
            backends.push(Backend {
                namespace: service.namespace.clone(),
                service: service.name.clone(),
                port: service.port.unwrap_or(DEFAULT_PORT),
                object: format!(
                    "the conversion webhook of CustomResourceDefinition {}",
                    one.name_any()
                ),
            });
        }
    }
    backends.sort();
    backends.dedup();
    backends
}

fn webhook(config: &WebhookClientConfig, object: &str) -> Option<Backend> {
    let service = config.service.as_ref()?;
    Some(Backend {
        namespace: service.namespace.clone(),
        service: service.name.clone(),
        port: service.port.unwrap_or(DEFAULT_PORT),
        object: object.to_owned(),
    })
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
