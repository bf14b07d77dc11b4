// SPDX-License-Identifier: Apache-2.0
//! The answer to a strict namespace: which of its services the API server itself dials. It has no identity, so from now
//! on it is refused there, unless the pods take that port in plain.

use podveil_identity::KubernetesName;
use podveil_kube::k8s_openapi::api::admissionregistration::v1::{
    MutatingWebhookConfiguration, ValidatingWebhookConfiguration,
};
use podveil_kube::k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use podveil_kube::k8s_openapi::kube_aggregator::pkg::apis::apiregistration::v1::APIService;
use podveil_kube::kube::api::ListParams;
use podveil_kube::kube::{self, Api, Client};
use podveil_kube::{Backend, Standing, each};
use podveil_model::{Mode, Uid};
use podveil_source::{Cluster, Pod, ServiceEntry, Target, labels, ports};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval};

const EVERY: Duration = Duration::from_secs(2);
/// These kinds are not watched: they change rarely, and are of use only where a namespace is strict.
const LIST_AGAIN: Duration = Duration::from_secs(300);
/// A definition of a custom resource may be large.
const PAGE: u32 = 20;

/// By strict namespace, a sentence for each service that is dialled there.
pub(crate) type Refused = BTreeMap<KubernetesName, Vec<String>>;

/// Runs until the controller stops. Only the replica that writes events asks the API server.
pub(crate) async fn look(
    client: Client,
    cluster: watch::Receiver<Option<Arc<Cluster>>>,
    standing: watch::Receiver<Standing>,
    refused: watch::Sender<Arc<Refused>>,
) {
    let mut known: Option<(BTreeSet<KubernetesName>, Instant, Vec<Backend>)> = None;
    let mut tick = interval(EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let newest = cluster.borrow().clone();
        let Some(cluster) = newest.filter(|_| standing.borrow().is_here()) else {
            known = None;
            continue;
        };
        let strict = strict(&cluster);
        let is_known = known.as_ref().is_some_and(|(last, at, _)| {
            *last == strict && (strict.is_empty() || at.elapsed() < LIST_AGAIN)
        });
        if !is_known {
            let listed = match strict.is_empty() {
                true => Ok(Vec::new()),
                false => backends(&client).await,
            };
            match listed {
                Ok(backends) => known = Some((strict, Instant::now(), backends)),
                Err(error) => tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "cannot see what the API server dials in strict namespaces"
                ),
            }
        }
        if let Some((strict, _, backends)) = &known {
            let newest = judge(&cluster, strict, backends);
            refused.send_if_modified(|last| {
                let changed = **last != newest;
                *last = Arc::new(newest);
                changed
            });
        }
    }
}

fn strict(cluster: &Cluster) -> BTreeSet<KubernetesName> {
    cluster
        .namespaces
        .iter()
        .filter(|(_, namespace)| namespace.enrols())
        .filter(|(_, namespace)| namespace.rules(None, cluster.defaults).0.mode == Mode::Strict)
        .map(|(name, _)| name.clone())
        .collect()
}

async fn backends(client: &Client) -> kube::Result<Vec<Backend>> {
    let page = || ListParams::default().limit(PAGE);
    let mut found = Vec::new();
    let mutating: Api<MutatingWebhookConfiguration> = Api::all(client.clone());
    each(&mutating, page(), |one| {
        found.extend(Backend::of_mutating(&one))
    })
    .await?;
    let validating: Api<ValidatingWebhookConfiguration> = Api::all(client.clone());
    each(&validating, page(), |one| {
        found.extend(Backend::of_validating(&one))
    })
    .await?;
    let apis: Api<APIService> = Api::all(client.clone());
    each(&apis, page(), |one| found.extend(Backend::of_api(&one))).await?;
    let definitions: Api<CustomResourceDefinition> = Api::all(client.clone());
    each(&definitions, page(), |one| {
        found.extend(Backend::of_definition(&one))
    })
    .await?;
    found.sort();
    found.dedup();
    Ok(found)
}

fn judge(cluster: &Cluster, strict: &BTreeSet<KubernetesName>, backends: &[Backend]) -> Refused {
    let mut refused = Refused::new();
    let mut pods: Option<HashMap<&Uid, &Pod>> = None;
    for backend in backends {
        let Some(namespace) = strict
            .iter()
            .find(|name| name.as_str() == backend.namespace)
        else {
            continue;
        };
        let pods =
            pods.get_or_insert_with(|| cluster.pods.iter().map(|pod| (&pod.uid, &**pod)).collect());
        let service = cluster
            .services
            .iter()
            .find(|one| one.namespace == *namespace && *one.name == *backend.service);
        if let Some(port) = closed(service.map(Arc::as_ref), backend.port, pods) {
            refused.entry(namespace.clone()).or_default().push(format!(
                "{} is served by service {} port {}: strict mode refuses the API server there. Annotate the pods \
                 behind it with {}={port}",
                backend.object,
                backend.service,
                backend.port,
                labels::PLAIN_INBOUND_PORTS,
            ));
        }
    }
    refused
}

/// The pods' port behind this one of a service, if any of them does not take it in plain.
fn closed(service: Option<&ServiceEntry>, port: i32, pods: &HashMap<&Uid, &Pod>) -> Option<u16> {
    let port = u16::try_from(port).ok()?;
    let Some(service) = service else {
        return Some(port);
    };
    if service.endpoints.is_empty() {
        let known = service.ports.iter().find(|known| known.port == port);
        return Some(known.map_or(port, |known| known.target).max(1));
    }
    service.endpoints.iter().find_map(|endpoint| {
        let target = *endpoint.ports.get(&port)?;
        let Target::Pod(uid) = &endpoint.target else {
            return None;
        };
        let pod = pods.get(uid).filter(|pod| !pod.host_network)?;
        (!takes_in_plain(pod, target)).then_some(target)
    })
}

fn takes_in_plain(pod: &Pod, port: u16) -> bool {
    let named = pod.annotations.get(labels::PLAIN_INBOUND_PORTS);
    named.is_some_and(|named| ports(named).is_ok_and(|ports| ports.contains(&port)))
}
