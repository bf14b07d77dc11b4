// SPDX-License-Identifier: Apache-2.0
//! What follows from the cluster alone: who owns which address, who stands behind which service, which policy selects
//! whom.

use podveil_identity::KubernetesName;
use podveil_model::{EndpointPorts, Health, Service, ServiceKey, Uid, Workload};
use podveil_policy::{Policy, Scope};
use podveil_source::{Cluster, Phase, Pod, ServiceEntry};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

/// Everything derived, and what could not be as it was written.
#[derive(Debug, Default)]
pub(crate) struct Resolved {
    /// All that are not finished. The fields that enrolment and settings decide have their defaults.
    pub workloads: BTreeMap<Uid, Workload>,
    pub services: Vec<Arc<Service>>,
    pub policies: Vec<Arc<Policy>>,
    /// A sentence for each claim that was not granted, by pod.
    pub refused: BTreeMap<Uid, Vec<String>>,
    /// The same for services and policies.
    pub conditions: Vec<String>,
}

/// `seen`: the version at which a pod first appeared; one that is not in it appears now.
pub(crate) fn resolve(cluster: &Cluster, seen: impl Fn(&Uid) -> u64) -> Resolved {
    let mut resolved = Resolved {
        policies: cluster
            .policies
            .iter()
            .map(|entry| Arc::new(entry.policy.clone()))
            .collect(),
        ..Resolved::default()
    };
    let pods: Vec<&Pod> = cluster
        .pods
        .iter()
        .filter(|pod| !pod.phase.is_finished())
        .collect();
    let owners = owners(&pods, seen);
    let services = services(cluster, &owners, &mut resolved.conditions);
    let policies = selections(cluster);
    for pod in &pods {
        let mut refused = Vec::new();
        let addresses = granted(pod, &owners, &mut refused);
        if !refused.is_empty() {
            resolved.refused.insert(pod.uid.clone(), refused);
        }
        let key = (&pod.namespace, &*pod.name);
        let workload = Workload {
            services: services.endpoints.get(&key).cloned().unwrap_or_default(),
            policies: policies.get(&key).cloned().unwrap_or_default(),
            ..workload(cluster, pod, addresses)
        };
        resolved.workloads.insert(pod.uid.clone(), workload);
    }
    resolved.services = services.services;
    resolved
}

/// Which pod has an address: a running one before one that ends, then the newest, then the one written last.
fn owners<'a>(pods: &[&'a Pod], seen: impl Fn(&Uid) -> u64) -> HashMap<IpAddr, &'a Pod> {
    let mut owners: HashMap<IpAddr, (bool, u64, &Pod)> = HashMap::new();
    for pod in pods.iter().filter(|pod| !pod.host_network) {
        let claim = (pod.phase == Phase::Running, seen(&pod.uid));
        for ip in &pod.addresses {
            let owner = owners.entry(*ip).or_insert((claim.0, claim.1, pod));
            if (owner.0, owner.1) <= claim {
                *owner = (claim.0, claim.1, pod);
            }
        }
    }
    owners
        .into_iter()
        .map(|(ip, (_, _, pod))| (ip, pod))
        .collect()
}

fn granted(pod: &Pod, owners: &HashMap<IpAddr, &Pod>, refused: &mut Vec<String>) -> Vec<IpAddr> {
    if pod.host_network {
        return Vec::new();
    }
    let mut granted = Vec::new();
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

fn workload(cluster: &Cluster, pod: &Pod, addresses: Vec<IpAddr>) -> Workload {
    let label = |names: &[&str], default: &str| -> Arc<str> {
        names
            .iter()
            .find_map(|name| pod.labels.get(*name))
            .map_or(default, String::as_str)
            .into()
    };
    Workload {
        uid: pod.uid.clone(),
        name: pod.name.clone(),
        identity: pod.identity(&cluster.trust_domain),
        addresses,
        node: pod.node.clone(),
        health: match pod.phase {
            Phase::Terminating => Health::Terminating,
            _ if !pod.ready => Health::Unhealthy,
            _ => Health::Healthy,
        },
        host_network: pod.host_network,
        workload_name: pod.name.clone(),
        // The names that Istio's own controller looks at, in its order.
        canonical_name: label(
            &[
                "service.istio.io/canonical-name",
                "app.kubernetes.io/name",
                "app",
            ],
            &pod.name,
        ),
        canonical_revision: label(
            &[
                "service.istio.io/canonical-revision",
                "app.kubernetes.io/version",
                "version",
            ],
            "latest",
        ),
        cluster: "Kubernetes".into(),
        capacity: 1,
        stage: Default::default(),
        epoch: Default::default(),
        mode: Default::default(),
        services: BTreeMap::new(),
        policies: BTreeSet::new(),
        exclude_outbound_ports: BTreeSet::new(),
        exclude_inbound_ports: BTreeSet::new(),
        plain_inbound_ports: BTreeSet::new(),
        probe_ports: BTreeSet::new(),
        host_ports: BTreeMap::new(),
        locality: Default::default(),
        external: Default::default(),
    }
}

type PodKey<'a> = (&'a KubernetesName, &'a str);

#[derive(Default)]
struct Services<'a> {
    services: Vec<Arc<Service>>,
    /// By pod, the services it stands behind.
    endpoints: HashMap<PodKey<'a>, BTreeMap<ServiceKey, EndpointPorts>>,
}

fn services<'a>(
    cluster: &'a Cluster,
    owners: &HashMap<IpAddr, &Pod>,
    conditions: &mut Vec<String>,
) -> Services<'a> {
    let mut resolved = Services::default();
    let mut taken: HashMap<IpAddr, String> = HashMap::new();
    for entry in &cluster.services {
        let key = key(entry);
        let ports: EndpointPorts = entry
            .ports
            .iter()
            .map(|port| (port.port, port.target))
            .collect();
        for name in &entry.endpoints {
            resolved
                .endpoints
                .entry((&entry.namespace, &**name))
                .or_default()
                .insert(key.clone(), ports.clone());
        }
        let mut addresses = Vec::new();
        for ip in &entry.addresses {
            // An address leads to one place. A pod's own is proved by its identity, so the pod has it.
            let other = owners.get(ip).map(|pod| pod.uid.to_string());
            match other.or_else(|| taken.get(ip).cloned()) {
                Some(other) => {
                    conditions.push(format!("service {key}: address {ip} belongs to {other}"));
                }
                None => {
                    taken.insert(*ip, key.to_string());
                    addresses.push(*ip);
                }
            }
        }
        resolved.services.push(Arc::new(Service {
            name: entry.name.clone(),
            addresses,
            ports: entry.ports.clone(),
            publish_not_ready: entry.publish_not_ready,
            balancing: Default::default(),
            node_ports: BTreeMap::new(),
            key,
        }));
    }
    resolved
}

fn key(entry: &ServiceEntry) -> ServiceKey {
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
