// SPDX-License-Identifier: Apache-2.0
//! `/config_dump` and `/status`: the peers' keys, so that their tools read it, and ours beside them. Never a private key.

use super::Facts;
use crate::metrics::Shown;
use podveil_ca_client::{CertificateState, CertificateStatus, Svid, TrustBundle};
use podveil_flow::Direction;
use podveil_model::{External, Mode, Service, Workload};
use podveil_state::View;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::time::SystemTime;

/// Open connections shown of one pod: enough for a person, and no more memory than the rest of the dump.
const MAX_CONNECTIONS: usize = 1000;

pub(super) fn dump(facts: &Facts) -> Value {
    let view = facts.state.view();
    // The view keeps no order of its own; two dumps of one state are the same text.
    let mut workloads: Vec<&Workload> = view.workloads().map(|one| &**one).collect();
    workloads.sort_unstable_by_key(|workload| &workload.uid);
    let mut services: Vec<&Service> = view.services().map(|one| &**one).collect();
    services.sort_unstable_by_key(|service| &service.key);
    let mut dump = status(facts);
    dump["config"] = json!(&*facts.config);
    dump["staticConfig"] = json!({});
    dump["stagedServices"] = json!({});
    dump["workloads"] = workloads.into_iter().map(workload).collect();
    dump["services"] = (services.into_iter())
        .map(|one| service(one, &view))
        .collect();
    dump["policies"] = policies(&view).into();
    // Here the connections themselves instead of their number.
    for pod in facts.pods.states() {
        let open = facts.pods.connections(&pod.uid, MAX_CONNECTIONS);
        dump["workloadState"][pod.uid.to_string()]["connections"] = connections(&open);
    }
    dump
}

/// The dump without what grows with the cluster: this node's own pods, certificates and trust.
pub(super) fn status(facts: &Facts) -> Value {
    let view = facts.state.view();
    let bundle = facts.credentials.bundle().borrow().clone();
    let certificates = facts.certificates.snapshot();
    json!({
        "version": { "version": env!("CARGO_PKG_VERSION"), "program": "podveil-node" },
        "certificates": certificates
            .iter()
            .map(|status| certificate(status, &bundle))
            .collect::<Vec<_>>(),
        "workloadState": workload_state(facts),
        "podveil": {
            "mesh": view.mesh().map(|mesh| json!({
                "trustDomain": mesh.trust_domain.to_string(),
                "podRanges": texts(&mesh.pod_ranges),
                "serviceRanges": texts(&mesh.service_ranges),
                "rangesKnown": mesh.ranges_known,
                "plainOutboundRanges": texts(&mesh.plain_outbound_ranges),
                "plainOutboundNamespaces": texts(&mesh.plain_outbound_namespaces),
                "nodes": mesh.nodes.len(),
                "notEnrolledNamespaces": mesh.not_enrolled.len(),
                "epoch": mesh.epoch.to_string(),
            })),
            "bundle": { "sequence": bundle.sequence, "roots": bundle.roots.len(), "certificateGeneration": bundle.certificate_generation },
            // What has been asked for and is kept up to date; null where everything is held.
            "onDemand": view.is_on_demand().then(|| json!({ "lookups": view.told() })),
            "program": facts.credentials.current().map(|held| svid(&held.svid)),
            "waitingFor": facts.pending(),
        },
    })
}

fn workload(workload: &Workload) -> Value {
    let mode = match workload.mode {
        Mode::Permissive => "permissive",
        Mode::Strict => "strict",
    };
    json!({
        "uid": workload.uid.to_string(),
        "name": &*workload.name,
        "namespace": workload.namespace().as_str(),
        "serviceAccount": workload.identity.service_account.as_str(),
        "trustDomain": workload.identity.trust_domain.to_string(),
        "workloadIps": texts(&workload.addresses),
        "protocol": if workload.stage.is_announced() { "HBONE" } else { "TCP" },
        "node": workload.node.as_str(),
        "status": format!("{:?}", workload.health),
        "workloadName": &*workload.workload_name,
        "workloadType": "pod",
        "canonicalName": &*workload.canonical_name,
        "canonicalRevision": &*workload.canonical_revision,
        "clusterId": &*workload.cluster,
        "network": "",
        "authorizationPolicies": texts(&workload.policies),
        "services": texts(workload.services.keys()),
        "capacity": workload.capacity,
        "podveil": {
            "stage": workload.stage.to_string(),
            "epoch": workload.epoch.to_string(),
            "mode": mode,
            "excludeOutboundPorts": &workload.exclude_outbound_ports,
            "excludeInboundPorts": &workload.exclude_inbound_ports,
            "plainInboundPorts": &workload.plain_inbound_ports,
            "probePorts": &workload.probe_ports,
            "hostPorts": &workload.host_ports,
            "hostNetwork": workload.host_network,
            "external": match workload.external {
                External::Allow => "allow",
                External::Refuse => "refuse",
            },
        },
    })
}

fn service(service: &Service, view: &View) -> Value {
    let ports: BTreeMap<String, u16> = service
        .ports
        .iter()
        .map(|port| (port.port.to_string(), port.target))
        .collect();
    let endpoints: Map<String, Value> = view
        .workloads()
        .filter_map(|workload| {
            let ports = workload.services.get(&service.key)?;
            let ports: BTreeMap<String, u16> = ports
                .iter()
                .map(|(port, target)| (port.to_string(), *target))
                .collect();
            let endpoint = json!({
                "workloadUid": workload.uid.to_string(),
                "port": ports,
                "status": format!("{:?}", workload.health),
            });
            Some((workload.uid.to_string(), endpoint))
        })
        .collect();
    json!({
        "name": &*service.name,
        "namespace": service.key.namespace.as_str(),
        "hostname": &*service.key.hostname,
        "vips": service.addresses.iter().map(|ip| format!("/{ip}")).collect::<Vec<_>>(),
        "ports": ports,
        "endpoints": endpoints,
        "subjectAltNames": [],
    })
}

fn policies(view: &View) -> Vec<Value> {
    view.policies()
        .iter()
        .map(|(resource, policy)| {
            json!({
                "resource": &**resource,
                "name": &*policy.key.name,
                "namespace": policy.key.namespace.as_ref().map(|namespace| namespace.as_str()),
                "scope": format!("{:?}", policy.scope),
                "action": format!("{:?}", policy.action),
                "dryRun": policy.dry_run,
                "rules": policy.rules.iter().map(|rule| format!("{rule:?}")).collect::<Vec<_>>(),
            })
        })
        .collect()
}

fn certificate(status: &CertificateStatus, bundle: &TrustBundle) -> Value {
    let state = match status.state {
        CertificateState::Missing => "Unavailable",
        CertificateState::Valid => "Available",
    };
    json!({
        "identity": status.identity.to_string(),
        "state": state,
        "certChain": status.svid.as_deref().map(chain).unwrap_or_default(),
        "rootCerts": [{ "pem": bundle.to_pem() }],
        "lastError": status.last_error,
        "nextAttempt": status.next_attempt.map(timestamp),
    })
}

/// The leaf with its facts, then the intermediates: certificates, which are public.
fn chain(held: &Svid) -> Vec<Value> {
    let mut chain: Vec<Value> = (held.chain_pem().into_iter())
        .map(|pem| json!({ "pem": pem }))
        .collect();
    if let (Some(Value::Object(leaf)), Value::Object(facts)) = (chain.first_mut(), svid(held)) {
        leaf.extend(facts);
    }
    chain
}

fn svid(svid: &Svid) -> Value {
    json!({
        "identity": svid.id().to_string(),
        "serialNumber": svid.serial(),
        "validFrom": timestamp(svid.not_before()),
        "expirationTime": timestamp(svid.not_after()),
        "generation": svid.generation(),
    })
}

fn workload_state(facts: &Facts) -> Map<String, Value> {
    facts
        .pods
        .states()
        .into_iter()
        .map(|pod| {
            let state = json!({
                "state": if pod.ready.is_ok() { "Up" } else { "Pending" },
                "reason": pod.ready.err().map(|reason| reason.to_string()),
                "info": {
                    "name": pod.info.name,
                    "namespace": pod.info.namespace,
                    "serviceAccount": pod.info.service_account,
                    "trustDomain": pod.identity.trust_domain.to_string(),
                },
                "connections": pod.carried,
            });
            (pod.uid.to_string(), state)
        })
        .collect()
}

/// The peers' form: what was dialled by whom, and where it really goes.
fn connections(open: &[Shown]) -> Value {
    let list = |direction: Direction| -> Vec<Value> {
        let mut list: Vec<&Shown> = open
            .iter()
            .filter(|shown| shown.direction == direction)
            .collect();
        list.sort_unstable_by_key(|shown| (shown.source, shown.destination));
        list.into_iter()
            .map(|shown| {
                json!({
                    "src": shown.source,
                    "originalDst": shown.destination,
                    "actualDst": shown.hbone.or(shown.destination),
                    "protocol": if shown.hbone.is_some() { "HBONE" } else { "TCP" },
                    "receivedBytes": shown.received_bytes,
                    "sentBytes": shown.sent_bytes,
                })
            })
            .collect()
    };
    json!({ "inbound": list(Direction::Inbound), "outbound": list(Direction::Outbound) })
}

fn texts<T: ToString>(values: impl IntoIterator<Item = T>) -> Vec<String> {
    values.into_iter().map(|value| value.to_string()).collect()
}

/// RFC 3339.
fn timestamp(time: SystemTime) -> String {
    prost_types::Timestamp::from(time).to_string()
}
