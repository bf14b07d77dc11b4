// SPDX-License-Identifier: Apache-2.0
//! `/status`: what a person, and `podveilctl status`, is shown.

use podveil_index::{ModuleStatus, NodeStatus, WorkloadStatus};
use podveil_model::Mode;
use podveil_xds_server::Version;
use serde::Serialize;

#[derive(Debug, Serialize)]
struct Status {
    /// As nodes repeat it in their reports.
    version: String,
    cluster_version: u64,
    source: Source,
    nodes: Vec<Node>,
    workloads: Vec<Workload>,
    conditions: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Source {
    changes: u64,
    /// Why the newest content is not in use.
    error: Option<String>,
}

#[derive(Debug, Serialize)]
struct Node {
    name: String,
    silent: bool,
    modules: Vec<ModuleEntry>,
}

#[derive(Debug, Serialize)]
struct ModuleEntry {
    module: String,
    connected: bool,
    silent: bool,
    heard_seconds_ago: u64,
    applied_version: String,
    /// It lacks nothing that anybody waits for.
    current: bool,
    bundle_sequence: u64,
    certificate_generation: u64,
}

#[derive(Debug, Serialize)]
struct Workload {
    uid: String,
    namespace: String,
    name: String,
    identity: String,
    node: String,
    addresses: Vec<String>,
    stage: String,
    epoch: String,
    mode: &'static str,
    reason: String,
    conditions: Vec<String>,
    connections_older: u32,
    connections_captured: u32,
}

/// The body of `/status`.
pub(crate) fn json(
    index: podveil_index::Status,
    source: &podveil_source::Status,
    version: Version,
) -> String {
    let status = Status {
        version: version.to_string(),
        cluster_version: index.version,
        source: Source {
            changes: source.changes,
            error: source.error.as_ref().map(ToString::to_string),
        },
        nodes: index
            .nodes
            .iter()
            .map(|status| node(status, version.instance, index.enrolment_changed))
            .collect(),
        workloads: index.workloads.into_iter().map(workload).collect(),
        conditions: (index.namespaces.iter())
            .flat_map(|(name, conditions)| {
                conditions
                    .iter()
                    .map(move |condition| format!("namespace {name}: {condition}"))
            })
            .chain(index.not_begun.iter().flat_map(|(why, namespaces)| {
                namespaces
                    .iter()
                    .map(move |name| format!("namespace {name}: {why}"))
            }))
            .chain(index.conditions)
            .collect(),
    };
    serde_json::to_string_pretty(&status).expect("strings and numbers only")
}

fn node(status: &NodeStatus, instance: u64, enrolment_changed: u64) -> Node {
    let module = |module: &ModuleStatus| ModuleEntry {
        module: module.module.to_string(),
        connected: module.connected,
        silent: module.silent,
        heard_seconds_ago: module.heard_ago.as_secs(),
        applied_version: Version {
            instance,
            number: module.applied,
        }
        .to_string(),
        current: module.applied >= enrolment_changed,
        bundle_sequence: module.bundle_sequence,
        certificate_generation: module.certificate_generation,
    };
    Node {
        name: status.name.to_string(),
        silent: status.is_silent(),
        modules: status.modules.iter().map(module).collect(),
    }
}

fn workload(status: WorkloadStatus) -> Workload {
    let workload = &status.workload;
    Workload {
        uid: workload.uid.to_string(),
        namespace: workload.identity.namespace.to_string(),
        name: workload.name.to_string(),
        identity: workload.identity.to_string(),
        node: workload.node.to_string(),
        addresses: workload.addresses.iter().map(ToString::to_string).collect(),
        stage: workload.stage.to_string(),
        epoch: workload.epoch.to_string(),
        mode: match workload.mode {
            Mode::Permissive => "permissive",
            Mode::Strict => "strict",
        },
        reason: status.reason,
        conditions: status.conditions,
        connections_older: status.connections_older,
        connections_captured: status.connections_captured,
    }
}
