// SPDX-License-Identifier: Apache-2.0
use crate::kinds::kubernetes_name;
use crate::pods::{is_tcp, number};
use crate::services::ServiceObject;
use crate::table::Kept;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use podveil_identity::KubernetesName;
use podveil_model::{EndpointPorts, Uid};
use podveil_source::{Endpoint, ServiceEntry, Target};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

const SERVICE_LABEL: &str = "kubernetes.io/service-name";
/// More than any slice has; an object with absurd sizes gives no more than these.
const MAX_PORTS: usize = 1024;

/// One of the slices of a service.
#[derive(Debug, Eq, PartialEq)]
pub(crate) struct Slice {
    pub namespace: KubernetesName,
    pub service: Arc<str>,
    /// By the name of the service's port.
    pub ports: BTreeMap<Arc<str>, u16>,
    pub endpoints: Vec<SliceEndpoint>,
}

#[derive(Debug, Eq, PartialEq)]
pub(crate) struct SliceEndpoint {
    pub target: Target,
    /// Takes connections, or would if it were not ending.
    pub serving: bool,
    pub terminating: bool,
}

impl Kept for Slice {
    fn same(&self, other: &Self) -> bool {
        self == other
    }
}

/// `None` for a slice of nobody, or of names instead of addresses.
pub(crate) fn read(object: EndpointSlice) -> Option<Slice> {
    let labels = object.metadata.labels?;
    if object.address_type == "FQDN" {
        return None;
    }
    let ports = object
        .ports
        .iter()
        .flatten()
        .filter(|port| is_tcp(port.protocol.as_deref()))
        .filter_map(|port| {
            let name = port.name.as_deref().unwrap_or_default().into();
            Some((name, number(port.port?)?))
        })
        .take(MAX_PORTS)
        .collect();
    let mut endpoints = Vec::with_capacity(object.endpoints.len());
    for endpoint in object.endpoints {
        let conditions = endpoint.conditions.unwrap_or_default();
        let ready = conditions.ready.unwrap_or(true);
        let serving = conditions.serving.unwrap_or(ready);
        let terminating = conditions.terminating.unwrap_or_default();
        let pod = endpoint
            .target_ref
            .filter(|target| target.kind.as_deref() == Some("Pod"))
            .and_then(|target| target.uid);
        let targets: Vec<Target> = match pod {
            Some(uid) => vec![Target::Pod(Uid(uid.into()))],
            None => endpoint
                .addresses
                .iter()
                .filter_map(|ip| ip.parse::<IpAddr>().ok())
                .map(Target::Address)
                .collect(),
        };
        endpoints.extend(targets.into_iter().map(|target| SliceEndpoint {
            target,
            serving,
            terminating,
        }));
    }
    Some(Slice {
        namespace: kubernetes_name(object.metadata.namespace.as_deref())?,
        service: labels.get(SERVICE_LABEL)?.as_str().into(),
        ports,
        endpoints,
    })
}

/// A service with what its slices put behind it. An endpoint that is in two of them at once is one.
pub(crate) fn join(service: &ServiceObject, slices: &[Arc<Slice>]) -> ServiceEntry {
    let mut endpoints: BTreeMap<&Target, EndpointPorts> = BTreeMap::new();
    for slice in slices {
        let ports: EndpointPorts = service
            .ports
            .iter()
            .filter_map(|(name, port)| Some((port.port, *slice.ports.get(name)?)))
            .collect();
        for endpoint in &slice.endpoints {
            let takes = match &endpoint.target {
                // Whether a pod ends is known from itself.
                Target::Pod(_) | Target::Name(_) => endpoint.serving || service.publish_not_ready,
                Target::Address(_) => {
                    (endpoint.serving || service.publish_not_ready) && !endpoint.terminating
                }
            };
            if takes {
                endpoints
                    .entry(&endpoint.target)
                    .or_default()
                    .extend(&ports);
            }
        }
    }
    ServiceEntry {
        name: service.name.clone(),
        namespace: service.namespace.clone(),
        addresses: [&*service.cluster_addresses, &*service.other_addresses].concat(),
        ports: service.ports.values().copied().collect(),
        node_ports: service.node_ports.clone(),
        endpoints: endpoints
            .into_iter()
            .map(|(target, ports)| Endpoint {
                target: target.clone(),
                ports,
            })
            .collect(),
        publish_not_ready: service.publish_not_ready,
        balancing: service.balancing.clone(),
    }
}
