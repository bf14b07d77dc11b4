// SPDX-License-Identifier: Apache-2.0
//! What follows from the cluster alone: who owns which address, who stands behind which service, which policy selects
//! whom.

use foldhash::{HashMap, HashMapExt};
use podveil_identity::{KubernetesName, WorkloadIdentity};
use podveil_model::{
    EndpointPorts, External, Health, Mode, Service, ServiceKey, Stage, Uid, Workload,
};
use podveil_policy::{Policy, Scope};
use podveil_source::{Cluster, Phase, Pod, ServiceEntry, Target};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

/// What one pod, or one address without a pod, has from others.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Derived {
    pub addresses: Vec<IpAddr>,
    pub services: Behind,
    pub policies: BTreeSet<Arc<str>>,
    /// A sentence for each claim that was not granted.
    pub refused: Vec<String>,
}

/// Everything derived, and what could not be as it was written.
#[derive(Debug)]
pub(crate) struct Resolved<'a> {
    cluster: &'a Cluster,
    owners: HashMap<IpAddr, &'a Pod>,
    endpoints: Endpoints<'a>,
    selections: BTreeMap<PodKey<'a>, BTreeSet<Arc<str>>>,
    pub services: Vec<Arc<Service>>,
    pub policies: Vec<Arc<Policy>>,
    /// A sentence for each claim of a service that was not granted.
    pub conditions: Vec<String>,
}

type PodKey<'a> = (&'a KubernetesName, &'a str);

/// The services that somebody stands behind: the same one for all endpoints of one service alone.
type Behind = Arc<BTreeMap<ServiceKey, EndpointPorts>>;

/// Who stands behind which services.
#[derive(Debug, Default)]
struct Endpoints<'a> {
    addresses: BTreeMap<(&'a KubernetesName, IpAddr), Behind>,
    named: HashMap<PodKey<'a>, Behind>,
    pods: HashMap<&'a Uid, Behind>,
}

/// `seen`: the version at which a pod first appeared; one that is not in it appears now.
pub(crate) fn resolve(cluster: &Cluster, seen: impl Fn(&Uid) -> u64) -> Resolved<'_> {
    let owners = owners(cluster, seen);
    let mut conditions = Vec::new();
    Resolved {
        services: services(cluster, &owners, &mut conditions),
        endpoints: endpoints(cluster),
        selections: selections(cluster),
        policies: cluster
            .policies
            .iter()
            .map(|entry| Arc::new(entry.policy.clone()))
            .collect(),
        cluster,
        owners,
        conditions,
    }
}

impl Resolved<'_> {
    pub(crate) fn derived(&mut self, pod: &Pod) -> Derived {
        let mut refused = Vec::new();
        let addresses = granted(pod, &self.owners, &mut refused);
        let key = (&pod.namespace, &*pod.name);
        let mut services = self.endpoints.pods.remove(&pod.uid).unwrap_or_default();
        if let Some(named) = self.endpoints.named.get(&key) {
            let named = named
                .iter()
                .map(|(key, ports)| (key.clone(), ports.clone()));
            Arc::make_mut(&mut services).extend(named);
        }
        Derived {
            addresses,
            services,
            policies: self.selections.get(&key).cloned().unwrap_or_default(),
            refused,
        }
    }

    /// Endpoints that are no pods: destinations of services, in plain, and nobody's address.
    pub(crate) fn without_pods(&mut self) -> Vec<Workload> {
        let trust_domain = &self.cluster.trust_domain;
        std::mem::take(&mut self.endpoints.addresses)
            .into_iter()
            .filter_map(|((namespace, ip), services)| {
                let name: Arc<str> = format!("endpoint.{namespace}.{ip}").into();
                Some(Workload {
                    addresses: vec![ip],
                    services,
                    host_network: true,
                    ..bare(
                        Uid(name.clone()),
                        name,
                        WorkloadIdentity::new(trust_domain.clone(), namespace.as_str(), "default")
                            .ok()?,
                        NO_NODE.parse().ok()?,
                    )
                })
            })
            .collect()
    }
}

/// The node of an endpoint that runs on none we know. `.invalid` is reserved (RFC 2606), so no node is called so.
const NO_NODE: &str = "none.invalid";

/// Which pod has an address: a running one before one that ends, then the newest, then the one written last.
fn owners(cluster: &Cluster, seen: impl Fn(&Uid) -> u64) -> HashMap<IpAddr, &Pod> {
    let mut owners: HashMap<IpAddr, &Pod> = HashMap::with_capacity(cluster.pods.len());
    // When it was made is the same for every reader; when it was seen only where nobody says that.
    let claim = |pod: &Pod| (pod.phase == Phase::Running, pod.created, seen(&pod.uid));
    for pod in &cluster.pods {
        if pod.host_network || pod.phase.is_finished() {
            continue;
        }
        for ip in &pod.addresses {
            let owner = owners.entry(*ip).or_insert(pod);
            if owner.uid != pod.uid && claim(owner) <= claim(pod) {
                *owner = pod;
            }
        }
    }
    owners
}

fn granted(pod: &Pod, owners: &HashMap<IpAddr, &Pod>, refused: &mut Vec<String>) -> Vec<IpAddr> {
    if pod.host_network {
        return pod.addresses.clone();
    }
    let mut granted = Vec::with_capacity(pod.addresses.len());
    for ip in &pod.addresses {
        match owners.get(ip) {
            Some(owner) if owner.uid != pod.uid => {
                refused.push(format!("address {ip} belongs to the newer {}", owner.uid));
            }
            // The same address written twice is one.
            _ if granted.contains(ip) => {}
            _ => granted.push(*ip),
        }
    }
    granted
}

/// As it is published, but for what enrolment and settings decide.
pub(crate) fn workload(cluster: &Cluster, pod: &Pod, derived: Derived) -> Workload {
    let label = |names: &[&str], default: &str| -> Arc<str> {
        names
            .iter()
            .find_map(|name| pod.labels.get(*name))
            .map_or(default, String::as_str)
            .into()
    };
    let node = cluster.nodes.get(&pod.node);
    Workload {
        addresses: derived.addresses,
        services: derived.services,
        policies: derived.policies,
        locality: node.map_or_else(Default::default, |node| node.locality.clone()),
        health: match pod.phase {
            Phase::Terminating => Health::Terminating,
            _ if !pod.ready => Health::Unhealthy,
            _ => Health::Healthy,
        },
        host_network: pod.host_network,
        workload_name: pod.owner.as_ref().unwrap_or(&pod.name).clone(),
        // The names that Istio's own controller looks at, in its order.
        canonical_name: label(
            &[
                "service.istio.io/canonical-name",
                "app.kubernetes.io/name",
                "app",
            ],
            pod.owner.as_ref().unwrap_or(&pod.name),
        ),
        canonical_revision: label(
            &[
                "service.istio.io/canonical-revision",
                "app.kubernetes.io/version",
                "version",
            ],
            "latest",
        ),
        host_ports: pod.host_ports.clone(),
        node_uid: pod.node_uid.clone(),
        probe_ports: pod.probe_ports.clone(),
        ..bare(
            pod.uid.clone(),
            pod.name.clone(),
            pod.identity(&cluster.trust_domain),
            pod.node.clone(),
        )
    }
}

/// Not enrolled, healthy, without addresses.
fn bare(uid: Uid, name: Arc<str>, identity: WorkloadIdentity, node: KubernetesName) -> Workload {
    Workload {
        uid,
        node_uid: None,
        workload_name: name.clone(),
        canonical_name: name.clone(),
        canonical_revision: "latest".into(),
        name,
        identity,
        node,
        addresses: Vec::new(),
        locality: Default::default(),
        health: Health::Healthy,
        host_network: false,
        cluster: "Kubernetes".into(),
        capacity: 1,
        stage: Stage::None,
        epoch: Default::default(),
        mode: Mode::default(),
        external: External::default(),
        services: Arc::default(),
        policies: BTreeSet::new(),
        exclude_outbound_ports: BTreeSet::new(),
        exclude_inbound_ports: BTreeSet::new(),
        plain_inbound_ports: BTreeSet::new(),
        probe_ports: BTreeSet::new(),
        host_ports: BTreeMap::new(),
    }
}

fn endpoints(cluster: &Cluster) -> Endpoints<'_> {
    let mut endpoints = Endpoints::default();
    for entry in &cluster.services {
        let key = key(entry);
        let mut alone: Option<(&EndpointPorts, Behind)> = None;
        for endpoint in &entry.endpoints {
            let ports = &endpoint.ports;
            let behind = match &alone {
                Some((same, behind)) if *same == ports => behind.clone(),
                _ => {
                    let behind = Arc::new(BTreeMap::from([(key.clone(), ports.clone())]));
                    alone = Some((ports, behind.clone()));
                    behind
                }
            };
            // Most stand behind one service alone.
            let other = match &endpoint.target {
                Target::Address(ip) => endpoints
                    .addresses
                    .insert((&entry.namespace, *ip), behind)
                    .map(|other| (endpoints.addresses.get_mut(&(&entry.namespace, *ip)), other)),
                Target::Name(name) => endpoints
                    .named
                    .insert((&entry.namespace, &**name), behind)
                    .map(|other| (endpoints.named.get_mut(&(&entry.namespace, &**name)), other)),
                Target::Pod(uid) => endpoints
                    .pods
                    .insert(uid, behind)
                    .map(|other| (endpoints.pods.get_mut(uid), other)),
            };
            if let Some((Some(behind), mut other)) = other {
                Arc::make_mut(&mut other)
                    .entry(key.clone())
                    .or_default()
                    .extend(ports.iter().map(|(from, to)| (*from, *to)));
                *behind = other;
            }
        }
    }
    endpoints
}

fn services(
    cluster: &Cluster,
    owners: &HashMap<IpAddr, &Pod>,
    conditions: &mut Vec<String>,
) -> Vec<Arc<Service>> {
    let mut services = Vec::with_capacity(cluster.services.len());
    let mut taken: HashMap<IpAddr, ServiceKey> = HashMap::new();
    for entry in &cluster.services {
        let key = key(entry);
        let mut addresses = Vec::with_capacity(entry.addresses.len());
        for ip in &entry.addresses {
            // An address leads to one place. A pod's own is proved by its identity, so the pod has it.
            let other = owners.get(ip).map(|pod| pod.uid.to_string());
            match other.or_else(|| taken.get(ip).map(ToString::to_string)) {
                Some(other) => {
                    conditions.push(format!("service {key}: address {ip} belongs to {other}"));
                }
                None => {
                    taken.insert(*ip, key.clone());
                    addresses.push(*ip);
                }
            }
        }
        services.push(Arc::new(Service {
            name: entry.name.clone(),
            addresses,
            ports: entry.ports.clone(),
            publish_not_ready: entry.publish_not_ready,
            balancing: entry.balancing.clone(),
            node_ports: entry.node_ports.clone(),
            key,
        }));
    }
    services
}

pub(crate) fn key(entry: &ServiceEntry) -> ServiceKey {
    ServiceKey {
        hostname: format!("{}.{}.svc.cluster.local", entry.name, entry.namespace).into(),
        namespace: entry.namespace.clone(),
    }
}

/// By pod, the policies that select it by name.
fn selections(cluster: &Cluster) -> BTreeMap<PodKey<'_>, BTreeSet<Arc<str>>> {
    let mut selections: BTreeMap<PodKey<'_>, BTreeSet<Arc<str>>> = BTreeMap::new();
    for entry in &cluster.policies {
        let policy = &entry.policy;
        let (Scope::WorkloadSelector, Some(namespace)) = (policy.scope, &policy.key.namespace)
        else {
            continue;
        };
        for name in &entry.workloads {
            selections
                .entry((namespace, &**name))
                .or_default()
                .insert(policy.key.to_string().into());
        }
    }
    selections
}
