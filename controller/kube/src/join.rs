// SPDX-License-Identifier: Apache-2.0
//! From tables to one state of the cluster.

use crate::endpoints::{self, Slice};
use crate::kinds::Tables;
use crate::services::ServiceObject;
use crate::source::{KubeOptions, Scope};
use crate::table::{Fault, Kept, Table};
use foldhash::{HashMap, HashMapExt};
use ipnet::IpNet;
use podveil_source::{Cluster, Node, Ranges, ServiceEntry};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// A watch that has not failed again for so long has recovered, also where nothing has changed since.
pub(crate) const RECOVERED: Duration = Duration::from_secs(60);

/// Makes states, and remembers what the last one was made of.
#[derive(Debug)]
pub(crate) struct Join {
    options: KubeOptions,
    services: HashMap<Arc<str>, Joined>,
    released: Option<u64>,
}

#[derive(Debug)]
struct Joined {
    service: Arc<ServiceObject>,
    slices: Vec<Arc<Slice>>,
    entry: Arc<ServiceEntry>,
}

impl Join {
    pub(crate) fn new(options: KubeOptions) -> Self {
        Self {
            options,
            services: HashMap::new(),
            released: None,
        }
    }

    /// `None` until every table that belongs to it is complete.
    pub(crate) fn cluster(&mut self, tables: &Tables) -> Option<Cluster> {
        let pods = tables.pods.complete && tables.namespaces.complete;
        let rest = tables.nodes.complete
            && tables.services.complete
            && tables.slices.complete
            && tables.ranges.complete
            && (tables.cilium.complete || self.options.take_over)
            && tables.markers.complete;
        if !pods || !(rest || self.options.scope == Scope::Pods) {
            return None;
        }
        // A request is taken back by the object that carried it. One that is gone went with the installation, while
        // programs of it still end: they are to end as they were asked to.
        if let Some(marker) = tables.markers.values().next() {
            self.released = marker.asked.then_some(marker.version);
        }
        Some(Cluster {
            version: tables.version,
            trust_domain: self.options.trust_domain.clone(),
            ranges: ranges(tables),
            plain_outbound: plain_outbound(tables.services.values().map(Arc::as_ref)),
            defaults: self.options.defaults,
            cilium_encrypts: tables.cilium.values().next().is_some(),
            released: self.released,
            nodes: tables
                .nodes
                .values()
                .map(|node| {
                    let kept = Node {
                        addresses: node.addresses.clone(),
                        locality: node.locality.clone(),
                    };
                    (node.name.clone(), kept)
                })
                .collect(),
            namespaces: tables
                .namespaces
                .iter()
                .filter_map(|(name, namespace)| {
                    let name: podveil_identity::KubernetesName = name.parse().ok()?;
                    let mut namespace = namespace.clone();
                    if name == self.options.own_namespace {
                        Arc::make_mut(&mut namespace).own = true;
                    }
                    Some((name, namespace))
                })
                .collect(),
            pods: tables.pods.values().cloned().collect(),
            services: self.services(tables),
            policies: Vec::new(),
        })
    }

    fn services(&mut self, tables: &Tables) -> Vec<Arc<ServiceEntry>> {
        let mut slices: HashMap<(&str, &str), Vec<Arc<Slice>>> = HashMap::new();
        for slice in tables.slices.values() {
            slices
                .entry((slice.namespace.as_str(), &*slice.service))
                .or_default()
                .push(slice.clone());
        }
        let mut before = std::mem::take(&mut self.services);
        let mut entries = Vec::new();
        for (key, service) in tables.services.iter() {
            let slices = slices
                .remove(&(service.namespace.as_str(), &*service.name))
                .unwrap_or_default();
            let joined = match before.remove(key) {
                Some(last)
                    if Arc::ptr_eq(&last.service, service)
                        && last.slices.len() == slices.len()
                        && last
                            .slices
                            .iter()
                            .zip(&slices)
                            .all(|(last, new)| Arc::ptr_eq(last, new)) =>
                {
                    last
                }
                _ => Joined {
                    entry: Arc::new(endpoints::join(service, &slices)),
                    service: service.clone(),
                    slices,
                },
            };
            entries.push(joined.entry.clone());
            self.services.insert(key.clone(), joined);
        }
        entries
    }
}

/// Known only where all that has an address keeps to what is said of ranges: some networks give out addresses by a plan
/// of their own, and then an address that is in no range may be a pod's all the same.
fn ranges(tables: &Tables) -> Option<Ranges> {
    let of_nodes: HashMap<&str, _> = tables
        .nodes
        .values()
        .map(|node| (node.name.as_str(), &node.ranges))
        .collect();
    let services: Vec<_> = tables
        .ranges
        .values()
        .flat_map(|range| range.0.iter().copied())
        .collect();
    if services.is_empty() || of_nodes.is_empty() || of_nodes.values().any(|of| of.is_empty()) {
        return None;
    }
    let pods_keep_to_them = tables
        .pods
        .values()
        .filter(|pod| !pod.host_network && !pod.phase.is_finished())
        .all(|pod| {
            let of_node = of_nodes.get(pod.node.as_str());
            pod.addresses
                .iter()
                .all(|ip| of_node.is_some_and(|of| of.iter().any(|range| range.contains(ip))))
        });
    let services_keep_to_them = tables
        .services
        .values()
        .flat_map(|service| &service.cluster_addresses)
        .all(|ip| services.iter().any(|range| range.contains(ip)));
    (pods_keep_to_them && services_keep_to_them).then(|| Ranges {
        // In the nodes' own order, which is the same each time.
        pods: (tables.nodes.values().flat_map(|node| &node.ranges).copied()).collect(),
        services,
    })
}

/// What strict workloads reach in plain, since neither can be enrolled: the cluster's names and the API server. Both
/// have one well-known name in every cluster (Kubernetes DNS-Based Service Discovery; `default/kubernetes`).
fn plain_outbound<'a>(services: impl Iterator<Item = &'a ServiceObject>) -> Vec<IpNet> {
    const REACHED: [(&str, &str); 2] = [("default", "kubernetes"), ("kube-system", "kube-dns")];
    services
        .filter(|service| REACHED.contains(&(service.namespace.as_str(), &*service.name)))
        .flat_map(|service| &service.cluster_addresses)
        .map(|ip| IpNet::from(*ip))
        .collect()
}

/// The newest fault of any watch; those that have recovered are forgotten.
pub(crate) fn fault(tables: &mut Tables) -> Option<Arc<str>> {
    [
        current(&mut tables.pods),
        current(&mut tables.namespaces),
        current(&mut tables.nodes),
        current(&mut tables.services),
        current(&mut tables.slices),
        current(&mut tables.ranges),
        current(&mut tables.cilium),
        current(&mut tables.markers),
    ]
    .into_iter()
    .flatten()
    .max_by_key(|fault| fault.at)
    .map(|fault| fault.sentence)
}

fn current<V: Kept>(table: &mut Table<V>) -> Option<Fault> {
    let now = Instant::now();
    if table
        .fault
        .as_ref()
        .is_some_and(|fault| now.duration_since(fault.at) > RECOVERED)
    {
        table.fault = None;
    }
    table.fault.clone()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::Marker;
    use crate::services;
    use k8s_openapi::api::core::v1::Service;

    #[test]
    fn an_uninstallation_is_taken_back_by_its_object_and_not_by_the_end_of_that() {
        let mut tables = Tables::default();
        tables.pods.end();
        tables.namespaces.end();
        let mut join = Join::new(KubeOptions {
            scope: Scope::Pods,
            trust_domain: podveil_identity::TrustDomain::new("cluster.local").unwrap(),
            own_namespace: "podveil-system".parse().unwrap(),
            defaults: Default::default(),
            take_over: false,
        });
        let marker = |version, asked| Some(Marker { version, asked });
        for (marker, released) in [
            (None, None),
            (marker(5, false), None),
            (marker(6, true), Some(6)),
            (None, Some(6)),
            (marker(8, false), None),
            (None, None),
        ] {
            tables.markers.apply("podveil-uninstall".into(), marker);
            assert_eq!(join.cluster(&tables).unwrap().released, released);
        }
    }

    #[test]
    fn strict_workloads_reach_the_api_server_and_names_and_no_other_service() {
        let services: Vec<ServiceObject> = [
            ("default", "kubernetes", "10.96.0.1"),
            ("kube-system", "kube-dns", "10.96.0.10"),
            ("kube-system", "metrics", "10.96.0.11"),
            ("shop", "kubernetes", "10.96.0.12"),
        ]
        .map(|(namespace, name, ip)| {
            let service: Service = serde_json::from_value(serde_json::json!({
                "metadata": { "namespace": namespace, "name": name },
                "spec": { "clusterIP": ip, "clusterIPs": [ip], "ports": [{ "port": 443 }] },
            }))
            .unwrap();
            services::read(service).unwrap()
        })
        .into();
        let expected: Vec<IpNet> = ["10.96.0.1/32", "10.96.0.10/32"]
            .map(|range| range.parse().unwrap())
            .into();
        assert_eq!(plain_outbound(services.iter()), expected);
    }
}
