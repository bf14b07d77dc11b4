// SPDX-License-Identifier: Apache-2.0
//! Would Podveil go well here? The API's objects are gathered once, and judged topic by topic by pure functions. What
//! only a node can tell (BTF, cgroups, nftables) is told by the node program when it starts.

mod backends;
mod meshes;
mod network;
mod nodes;
mod permissions;
mod policies;

use super::Finding;
use crate::cluster::{Answered, Cluster};
use crate::output::Progress;
use k8s_openapi::api::admissionregistration::v1::{
    MutatingWebhookConfiguration, ValidatingWebhookConfiguration,
};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Node, Pod, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use k8s_openapi::kube_aggregator::pkg::apis::apiregistration::v1::APIService;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, ListParams};
use kube::{Api, Resource, ResourceExt};
use permissions::Permission;
use podveil_kube::each;
use podveil_source::labels;
use policies::cilium;
use serde::de::DeserializeOwned;
use std::collections::BTreeSet;
use std::fmt::Debug;

/// Objects of one page of a list.
const PAGE: u32 = 500;
const NOT_FOUND: u16 = 404;

/// What the API says about this cluster.
#[derive(Debug)]
pub(super) struct Survey {
    /// Podveil's own namespace.
    own_namespace: String,
    /// `1.33`.
    version: Answered<(u32, u32)>,
    nodes: Answered<Vec<Node>>,
    daemon_sets: Answered<Vec<DaemonSet>>,
    namespaces: Answered<Vec<Namespace>>,
    cilium: Answered<Option<ConfigMap>>,
    services: Answered<Vec<Service>>,
    mutating: Answered<Vec<MutatingWebhookConfiguration>>,
    validating: Answered<Vec<ValidatingWebhookConfiguration>>,
    api_services: Answered<Vec<APIService>>,
    definitions: Answered<Vec<CustomResourceDefinition>>,
    host_network_pods: Answered<Vec<Pod>>,
    /// Of enrolled namespaces.
    pods: Answered<Vec<Pod>>,
    /// Of enrolled namespaces.
    network_policies: Answered<Vec<NetworkPolicy>>,
    /// Cilium's, of enrolled namespaces.
    cilium_policies: Answered<Vec<DynamicObject>>,
    /// Cilium's of the whole cluster, if anybody is enrolled.
    clusterwide_policies: Answered<Vec<DynamicObject>>,
    permissions: Vec<Permission>,
    /// As labelled, and as asked for on the command line.
    enrolled: BTreeSet<String>,
    strict: BTreeSet<String>,
}

/// # Errors
/// If the API server cannot be reached at all. What it refuses becomes a finding.
pub(super) async fn survey(
    cluster: &Cluster,
    enrol: &[String],
    strict: &[String],
    progress: &mut Progress,
) -> anyhow::Result<Survey> {
    progress.say("asking the API server");
    let version = cluster.version().await?;
    let namespaces: Answered<Vec<Namespace>> = list(cluster, None, "").await;
    let known = namespaces.as_deref().unwrap_or_default();
    let labelled = |label: &str, value: &str| -> BTreeSet<String> {
        (known.iter())
            .filter(|namespace| namespace.labels().get(label).is_some_and(|is| is == value))
            .map(ResourceExt::name_any)
            .collect()
    };
    let mut enrolled = labelled(labels::ENROL, "true");
    let mut strict_ones: BTreeSet<String> = labelled(labels::MODE, "strict")
        .intersection(&enrolled)
        .cloned()
        .collect();
    strict_ones.extend(strict.iter().cloned());
    enrolled.extend(enrol.iter().chain(strict).cloned());
    progress.say("reading nodes, services and webhooks");
    let pods = list_in(cluster, &enrolled).await;
    let network_policies = list_in(cluster, &enrolled).await;
    let definitions = list(cluster, None, "").await;
    let each_enrolled = enrolled.iter().map(Some);
    let cilium_policies =
        list_defined(cluster, cilium::NAMESPACED, &definitions, each_enrolled).await;
    let everywhere = enrolled.iter().next().map(|_| None);
    let clusterwide_policies =
        list_defined(cluster, cilium::CLUSTERWIDE, &definitions, everywhere).await;
    Ok(Survey {
        own_namespace: cluster.namespace.clone(),
        version,
        nodes: list(cluster, None, "").await,
        daemon_sets: list(cluster, None, "").await,
        cilium: config_map(cluster, "kube-system", "cilium-config").await,
        services: list(cluster, None, "").await,
        mutating: list(cluster, None, "").await,
        validating: list(cluster, None, "").await,
        api_services: list(cluster, None, "").await,
        definitions,
        host_network_pods: list(cluster, None, "spec.hostNetwork=true").await,
        permissions: permissions::review(cluster, progress).await,
        pods,
        network_policies,
        cilium_policies,
        clusterwide_policies,
        namespaces,
        enrolled,
        strict: strict_ones,
    })
}

pub(super) fn judge(survey: &Survey) -> Vec<Finding> {
    let mut findings: Vec<_> = unknown_namespaces(survey).collect();
    findings.extend(nodes::judge(survey));
    findings.extend(network::judge(survey));
    findings.extend(meshes::judge(survey));
    findings.extend(policies::judge(survey));
    findings.extend(backends::judge(survey));
    findings.extend(permissions::judge(&survey.permissions));
    findings
}

/// A name that was mistyped would count as a namespace without policies.
fn unknown_namespaces(survey: &Survey) -> impl Iterator<Item = Finding> {
    let known = survey.namespaces.as_deref().ok();
    let is_there = move |name: &String| {
        known.is_none_or(|known| known.iter().any(|one| one.name_any() == *name))
    };
    let unknown = survey.enrolled.iter().filter(move |name| !is_there(name));
    unknown.map(|name| {
        Finding::problem(
            "namespace",
            format!("there is no namespace {name}"),
            "`kubectl get namespaces`; or make it first",
        )
    })
}

/// What was listed, or one finding that says that it was not.
fn known<'a, T>(
    subject: &'static str,
    what: &str,
    answered: &'a Answered<Vec<T>>,
    findings: &mut Vec<Finding>,
) -> &'a [T] {
    match answered {
        Ok(items) => items,
        Err(why) => {
            findings.push(Finding::unknown(
                subject,
                format!("{what} cannot be read: {why}"),
                format!("`kubectl auth can-i list {what} -A` as whoever runs this"),
            ));
            &[]
        }
    }
}

async fn list<K>(cluster: &Cluster, namespace: Option<&str>, fields: &str) -> Answered<Vec<K>>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned,
    K: ListApi,
{
    let api = K::api(cluster, namespace);
    let mut page = ListParams::default().limit(PAGE);
    if !fields.is_empty() {
        page = page.fields(fields);
    }
    let mut items = Vec::new();
    let listed = each(&api, page, |item| items.push(item)).await;
    listed.map_err(|error| error.to_string())?;
    Ok(items)
}

async fn list_in<K>(cluster: &Cluster, namespaces: &BTreeSet<String>) -> Answered<Vec<K>>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned,
    K: ListApi,
{
    let mut items = Vec::new();
    for namespace in namespaces {
        items.extend(list(cluster, Some(namespace), "").await?);
    }
    Ok(items)
}

/// Objects of a kind that need not be there; not asked for where nobody defines it.
async fn list_defined(
    cluster: &Cluster,
    (kind, plural): (&str, &str),
    definitions: &Answered<Vec<CustomResourceDefinition>>,
    namespaces: impl IntoIterator<Item = Option<&String>>,
) -> Answered<Vec<DynamicObject>> {
    let is_it = |one: &CustomResourceDefinition| {
        one.spec.group == cilium::GROUP && one.spec.names.plural == plural
    };
    if (definitions.as_ref()).is_ok_and(|known| !known.iter().any(is_it)) {
        return Ok(Vec::new());
    }
    let kind = GroupVersionKind::gvk(cilium::GROUP, cilium::VERSION, kind);
    let kind = ApiResource::from_gvk_with_plural(&kind, plural);
    let mut items = Vec::new();
    for namespace in namespaces {
        let client = cluster.client.clone();
        let api = match namespace {
            Some(namespace) => Api::namespaced_with(client, namespace, &kind),
            None => Api::all_with(client, &kind),
        };
        let page = ListParams::default().limit(PAGE);
        match each(&api, page, |item| items.push(item)).await {
            Ok(()) => {}
            Err(kube::Error::Api(status)) if status.code == NOT_FOUND => {}
            Err(error) => return Err(error.to_string()),
        }
    }
    Ok(items)
}

async fn config_map(cluster: &Cluster, namespace: &str, name: &str) -> Answered<Option<ConfigMap>> {
    let api: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), namespace);
    api.get_opt(name).await.map_err(|error| error.to_string())
}

/// How a kind is listed: over all namespaces or in one, or without namespaces.
trait ListApi: Sized {
    fn api(cluster: &Cluster, namespace: Option<&str>) -> Api<Self>;
}

macro_rules! list_api {
    ($($kind:ty),* $(,)?) => {
        $(impl ListApi for $kind {
            fn api(cluster: &Cluster, _namespace: Option<&str>) -> Api<Self> {
                Api::all(cluster.client.clone())
            }
        })*
    };
    (namespaced: $($kind:ty),* $(,)?) => {
        $(impl ListApi for $kind {
            fn api(cluster: &Cluster, namespace: Option<&str>) -> Api<Self> {
                match namespace {
                    Some(namespace) => Api::namespaced(cluster.client.clone(), namespace),
                    None => Api::all(cluster.client.clone()),
                }
            }
        })*
    };
}

list_api!(
    APIService,
    CustomResourceDefinition,
    MutatingWebhookConfiguration,
    Namespace,
    Node,
    ValidatingWebhookConfiguration,
);
list_api!(namespaced: DaemonSet, NetworkPolicy, Pod, Service);

#[cfg(test)]
mod tests {
    use super::testing::{nothing, objects, worse};
    use super::*;
    use serde_json::json;

    #[test]
    fn a_namespace_that_is_not_there_is_named() {
        let with = |namespaces| Survey {
            namespaces,
            enrolled: ["shop".to_owned()].into(),
            ..nothing()
        };
        let told = |survey| worse(unknown_namespaces(&survey).collect());
        let shop = json!({ "metadata": { "name": "shop" } });
        assert_eq!(told(with(objects([shop]))), Vec::<String>::new());
        let expected = ["Problem: there is no namespace shop"];
        assert_eq!(told(with(objects([]))), expected);
        assert_eq!(told(with(Err("forbidden".into()))), Vec::<String>::new());
    }
}

#[cfg(test)]
mod testing {
    use super::*;
    use serde_json::Value;

    /// A cluster in which there is nothing.
    pub fn nothing() -> Survey {
        Survey {
            own_namespace: "podveil-system".into(),
            version: Ok((1, 33)),
            nodes: Ok(Vec::new()),
            daemon_sets: Ok(Vec::new()),
            namespaces: Ok(Vec::new()),
            cilium: Ok(None),
            services: Ok(Vec::new()),
            mutating: Ok(Vec::new()),
            validating: Ok(Vec::new()),
            api_services: Ok(Vec::new()),
            definitions: Ok(Vec::new()),
            host_network_pods: Ok(Vec::new()),
            pods: Ok(Vec::new()),
            network_policies: Ok(Vec::new()),
            cilium_policies: Ok(Vec::new()),
            clusterwide_policies: Ok(Vec::new()),
            permissions: Vec::new(),
            enrolled: BTreeSet::new(),
            strict: BTreeSet::new(),
        }
    }

    pub fn objects<K: DeserializeOwned>(
        objects: impl IntoIterator<Item = Value>,
    ) -> Answered<Vec<K>> {
        let parse = |one| serde_json::from_value(one).expect("an object of the test");
        Ok(objects.into_iter().map(parse).collect())
    }

    /// `level: what`, for those that are worse than good to know.
    pub fn worse(findings: Vec<Finding>) -> Vec<String> {
        (findings.into_iter())
            .filter(|finding| finding.level > crate::check::finding::Level::Note)
            .map(|finding| format!("{:?}: {}", finding.level, finding.what))
            .collect()
    }
}
