// SPDX-License-Identifier: Apache-2.0
use k8s_openapi::api::admissionregistration::v1::{
    MutatingWebhookConfiguration, ValidatingWebhookConfiguration, WebhookClientConfig,
};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1 as extensions;
use k8s_openapi::kube_aggregator::pkg::apis::apiregistration::v1::APIService;
use kube::ResourceExt;

/// Where a webhook that names no port is.
const DEFAULT_PORT: i32 = 443;

/// A service that the API server itself dials, and for what. It has no identity, so strict mode refuses it.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Backend {
    pub namespace: String,
    pub service: String,
    /// Of the service.
    pub port: i32,
    /// `ValidatingWebhookConfiguration policy`.
    pub object: String,
}

impl Backend {
    /// Those of one configuration of webhooks.
    pub fn of_mutating(one: &MutatingWebhookConfiguration) -> Vec<Self> {
        let object = format!("MutatingWebhookConfiguration {}", one.name_any());
        let hooks = one.webhooks.iter().flatten();
        hooks
            .filter_map(|hook| Self::of_webhook(&hook.client_config, &object))
            .collect()
    }

    /// Those of one configuration of webhooks.
    pub fn of_validating(one: &ValidatingWebhookConfiguration) -> Vec<Self> {
        let object = format!("ValidatingWebhookConfiguration {}", one.name_any());
        let hooks = one.webhooks.iter().flatten();
        hooks
            .filter_map(|hook| Self::of_webhook(&hook.client_config, &object))
            .collect()
    }

    /// `None` for an API that the API server serves itself.
    pub fn of_api(one: &APIService) -> Option<Self> {
        let service = one.spec.as_ref()?.service.as_ref()?;
        Some(Self {
            namespace: service.namespace.clone()?,
            service: service.name.clone()?,
            port: service.port.unwrap_or(DEFAULT_PORT),
            object: format!("APIService {}", one.name_any()),
        })
    }

    /// `None` for a kind whose versions nobody converts.
    pub fn of_definition(one: &extensions::CustomResourceDefinition) -> Option<Self> {
        let conversion = one.spec.conversion.as_ref()?.webhook.as_ref()?;
        let service = conversion.client_config.as_ref()?.service.as_ref()?;
        Some(Self {
            namespace: service.namespace.clone(),
            service: service.name.clone(),
            port: service.port.unwrap_or(DEFAULT_PORT),
            object: format!(
                "the conversion webhook of CustomResourceDefinition {}",
                one.name_any()
            ),
        })
    }

    fn of_webhook(config: &WebhookClientConfig, object: &str) -> Option<Self> {
        let service = config.service.as_ref()?;
        Some(Self {
            namespace: service.namespace.clone(),
            service: service.name.clone(),
            port: service.port.unwrap_or(DEFAULT_PORT),
            object: object.to_owned(),
        })
    }
}
