// SPDX-License-Identifier: Apache-2.0
use crate::kinds::{kubernetes_name, only, version};
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use podveil_model::Uid;
use podveil_source::{Phase, Pod, labels};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

/// More ports than any pod names; an object with absurd sizes gives no more than these.
const MAX_PORTS: usize = 256;
/// Longer than any list of ports that is meant.
const MAX_ANNOTATION_BYTES: usize = 4096;
const LABELS: &[&str] = &[
    labels::ENROL,
    "app",
    "app.kubernetes.io/name",
    "app.kubernetes.io/version",
    "service.istio.io/canonical-name",
    "service.istio.io/canonical-revision",
    "version",
];
const ANNOTATIONS: &[&str] = &[
    labels::EXCLUDE_INBOUND_PORTS,
    labels::EXCLUDE_OUTBOUND_PORTS,
    labels::PLAIN_INBOUND_PORTS,
];

/// By the kubelet on the copies that it makes of pods from files on its node: the UID that it knows the pod by.
const CONFIG_MIRROR: &str = "kubernetes.io/config.mirror";
const CONFIG_HASH: &str = "kubernetes.io/config.hash";

/// `None` for a pod that is not bound to a node yet: nobody can reach it, and no node has to do with it.
pub(crate) fn read(object: core::Pod) -> Option<Pod> {
    let version = version(&object);
    let metadata = object.metadata;
    let spec = object.spec?;
    let status = object.status.unwrap_or_default();
    let node = kubernetes_name(spec.node_name.as_deref())?;
    let host_network = spec.host_network.unwrap_or_default();
    let node_uid = node_uid(&metadata, node.as_str());
    let mut annotations = only(metadata.annotations, ANNOTATIONS);
    for value in annotations.values_mut() {
        // Too long to be right, and cut off it still is: a sentence says so, and nobody carries it around.
        if value.len() > MAX_ANNOTATION_BYTES {
            *value = format!("{} bytes", value.len());
        }
    }
    Some(Pod {
        name: metadata.name.as_deref()?.into(),
        namespace: kubernetes_name(metadata.namespace.as_deref())?,
        uid: Uid(metadata.uid.as_deref()?.into()),
        node_uid,
        service_account: kubernetes_name(Some(
            spec.service_account_name.as_deref().unwrap_or("default"),
        ))?,
        addresses: addresses(&status, host_network),
        phase: phase(&status, metadata.deletion_timestamp.is_some()),
        ready: is_ready(&status),
        owner: owner(
            metadata.owner_references.as_deref().unwrap_or_default(),
            metadata.labels.as_ref(),
        ),
        host_ports: host_ports(&spec, host_network),
        probe_ports: probe_ports(&spec),
        created: metadata
            .creation_timestamp
            .and_then(|time| u64::try_from(time.0.as_second()).ok())
            .unwrap_or_default(),
        labels: only(metadata.labels, LABELS),
        annotations,
        node,
        host_network,
        version,
        decided: version,
    })
}

/// Of a pod from a file on this node. Both annotations and the owner must be as a kubelet writes them; the UID is a hash
/// of 32 digits, so that whoever writes them by hand cannot name a pod that was made through the API, whose UID has dashes.
fn node_uid(metadata: &ObjectMeta, node: &str) -> Option<Uid> {
    let annotation = |name| metadata.annotations.as_ref()?.get(name);
    let hash = annotation(CONFIG_HASH)?;
    let mut owners = metadata.owner_references.iter().flatten();
    let of_node = owners.any(|owner| owner.kind == "Node" && owner.name == node);
    let is_hash = hash.len() == 32 && hash.bytes().all(|byte| byte.is_ascii_hexdigit());
    (of_node && is_hash && annotation(CONFIG_MIRROR) == Some(hash))
        .then(|| Uid(hash.as_str().into()))
}

fn addresses(status: &core::PodStatus, host_network: bool) -> Vec<IpAddr> {
    let of_host = status
        .host_ips
        .iter()
        .flatten()
        .filter_map(|host| host.ip.parse::<IpAddr>().ok());
    let mut addresses: Vec<IpAddr> = status
        .pod_ips
        .iter()
        .flatten()
        .filter_map(|pod| pod.ip.parse().ok())
        .collect();
    if host_network && addresses.is_empty() {
        addresses.extend(of_host);
    }
    addresses
}

fn phase(status: &core::PodStatus, deleted: bool) -> Phase {
    match status.phase.as_deref() {
        Some("Succeeded") => Phase::Succeeded,
        Some("Failed") => Phase::Failed,
        _ if deleted => Phase::Terminating,
        _ => Phase::Running,
    }
}

fn is_ready(status: &core::PodStatus) -> bool {
    status
        .conditions
        .iter()
        .flatten()
        .any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// The controller's name; for a ReplicaSet that of the Deployment, without the hash of its template.
fn owner(
    references: &[k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference],
    labels: Option<&BTreeMap<String, String>>,
) -> Option<Arc<str>> {
    let owner = references
        .iter()
        .find(|reference| reference.controller == Some(true))?;
    let hash = labels.and_then(|labels| labels.get("pod-template-hash"));
    let name = match hash {
        Some(hash) if owner.kind == "ReplicaSet" => owner
            .name
            .strip_suffix(hash.as_str())
            .and_then(|name| name.strip_suffix('-'))
            .unwrap_or(&owner.name),
        _ => &owner.name,
    };
    Some(name.into())
}

/// Containers that run beside each other, sidecars among them.
fn containers(spec: &core::PodSpec) -> impl Iterator<Item = &core::Container> {
    spec.containers
        .iter()
        .chain(spec.init_containers.iter().flatten())
}

fn host_ports(spec: &core::PodSpec, host_network: bool) -> BTreeMap<u16, u16> {
    if host_network {
        return BTreeMap::new();
    }
    containers(spec)
        .flat_map(|container| container.ports.iter().flatten())
        .filter(|port| is_tcp(port.protocol.as_deref()))
        // One that listens at loopback only is nobody else's business.
        .filter(|port| {
            !port
                .host_ip
                .as_deref()
                .and_then(|ip| ip.parse::<IpAddr>().ok())
                .is_some_and(|ip| ip.is_loopback())
        })
        .filter_map(|port| Some((number(port.host_port?)?, number(port.container_port)?)))
        .take(MAX_PORTS)
        .collect()
}

/// The ports that the kubelet dials at the pod's own address.
fn probe_ports(spec: &core::PodSpec) -> BTreeSet<u16> {
    containers(spec)
        .flat_map(|container| probed(container).filter_map(|port| resolve(container, &port)))
        .take(MAX_PORTS)
        .collect()
}

fn probed(container: &core::Container) -> impl Iterator<Item = IntOrString> + '_ {
    let probes = [
        &container.liveness_probe,
        &container.readiness_probe,
        &container.startup_probe,
    ];
    let of_probes = probes.into_iter().flatten().flat_map(|probe| {
        [
            probe.http_get.as_ref().and_then(http),
            probe.tcp_socket.as_ref().and_then(tcp),
            probe.grpc.as_ref().map(|grpc| IntOrString::Int(grpc.port)),
        ]
    });
    let lifecycle = container.lifecycle.as_ref();
    let hooks = [
        lifecycle.and_then(|lifecycle| lifecycle.post_start.as_ref()),
        lifecycle.and_then(|lifecycle| lifecycle.pre_stop.as_ref()),
    ];
    let of_hooks = hooks.into_iter().flatten().flat_map(|hook| {
        [
            hook.http_get.as_ref().and_then(http),
            hook.tcp_socket.as_ref().and_then(tcp),
        ]
    });
    of_probes.chain(of_hooks).flatten()
}

/// `None` where another host is named: that one is dialled, not this pod.
fn http(action: &core::HTTPGetAction) -> Option<IntOrString> {
    own_host(action.host.as_deref()).then(|| action.port.clone())
}

fn tcp(action: &core::TCPSocketAction) -> Option<IntOrString> {
    own_host(action.host.as_deref()).then(|| action.port.clone())
}

fn own_host(host: Option<&str>) -> bool {
    host.unwrap_or_default().is_empty()
}

fn resolve(container: &core::Container, port: &IntOrString) -> Option<u16> {
    match port {
        IntOrString::Int(port) => number(*port),
        IntOrString::String(name) => container
            .ports
            .iter()
            .flatten()
            .find(|port| port.name.as_deref() == Some(name))
            .and_then(|port| number(port.container_port)),
    }
}

pub(crate) fn is_tcp(protocol: Option<&str>) -> bool {
    matches!(protocol, None | Some("TCP"))
}

/// A port, which is never 0.
pub(crate) fn number(port: i32) -> Option<u16> {
    u16::try_from(port).ok().filter(|port| *port != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;

    #[test]
    fn a_pod_from_a_file_has_the_uid_that_its_own_kubelet_gave_it() {
        let hash = "3f0b4a399b1c2f6f0c8d51aa7c7a6d9e";
        let other = "7c7a6d9e-3f0b-4a39-9b1c-2f6f0c8d51aa";
        for (config_hash, mirror, kind, owner, found) in [
            (hash, hash, "Node", "node-1", true),
            (hash, hash, "Node", "node-2", false),
            (hash, hash, "ReplicaSet", "node-1", false),
            (hash, "", "Node", "node-1", false),
            ("", hash, "Node", "node-1", false),
            // That of a pod made through the API.
            (other, other, "Node", "node-1", false),
        ] {
            let annotations = [(CONFIG_HASH, config_hash), (CONFIG_MIRROR, mirror)];
            let metadata = ObjectMeta {
                annotations: Some(
                    annotations
                        .map(|(a, b)| (a.to_owned(), b.to_owned()))
                        .into(),
                ),
                owner_references: Some(vec![OwnerReference {
                    kind: kind.to_owned(),
                    name: owner.to_owned(),
                    ..OwnerReference::default()
                }]),
                ..ObjectMeta::default()
            };
            let uid = node_uid(&metadata, "node-1");
            assert_eq!(
                uid,
                found.then(|| hash.into()),
                "{config_hash} {mirror} {kind} {owner}"
            );
        }
    }
}
