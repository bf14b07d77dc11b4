// SPDX-License-Identifier: Apache-2.0
//! What a person is told: where each workload and each program stands, and what it waits for.

use crate::entry::Entry;
use crate::nodes::{Condition, Nodes, WorkloadReport};
use crate::{Module, NotBegun};
use podveil_identity::KubernetesName;
use podveil_model::{Stage, Workload};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// At most so many programs are named in one sentence.
const MAX_NAMED: usize = 5;

#[derive(Clone, Debug)]
pub struct Status {
    /// The newest snapshot in which a workload's enrolment has changed: a program that has it in use, or a newer one, lacks
    /// nothing that anybody waits for.
    pub enrolment_changed: u64,
    /// The number of the newest snapshot.
    pub published: u64,
    /// The version of the cluster state that is in use.
    pub version: u64,
    pub nodes: Vec<NodeStatus>,
    pub workloads: Vec<WorkloadStatus>,
    /// What could not be taken as it was written, by namespace.
    pub namespaces: BTreeMap<KubernetesName, Vec<String>>,
    /// Labelled namespaces in which nothing is begun, and why.
    pub not_begun: Option<(NotBegun, Vec<KubernetesName>)>,
    /// What could not be taken as it was written of services.
    pub conditions: Vec<String>,
}

#[derive(Clone, Debug)]
pub struct NodeStatus {
    pub name: KubernetesName,
    /// One that is silent makes the node silent.
    pub modules: Vec<ModuleStatus>,
}

#[derive(Clone, Debug)]
pub struct ModuleStatus {
    pub module: Module,
    pub connected: bool,
    /// Not heard for [`SILENCE`](crate::SILENCE): nobody waits for it.
    pub silent: bool,
    pub heard_ago: Duration,
    pub applied: u64,
    pub bundle_sequence: u64,
    pub certificate_generation: u64,
}

#[derive(Clone, Debug)]
pub struct WorkloadStatus {
    /// As it is published.
    pub workload: Arc<Workload>,
    /// What the next stage waits for, or why it is not enrolled; empty where all is as it should be.
    pub reason: String,
    /// What could not be taken as it was written.
    pub conditions: Vec<String>,
    pub connections_older: u32,
    pub connections_captured: u32,
    /// Its containers may have run before it was captured.
    pub started_uncaptured: bool,
}

impl NodeStatus {
    pub fn is_silent(&self) -> bool {
        self.modules.iter().any(|module| module.silent)
    }
}

pub(crate) fn nodes(nodes: &Nodes, now: Instant) -> Vec<NodeStatus> {
    let mut statuses: Vec<NodeStatus> = Vec::new();
    for ((node, module), program) in nodes.iter() {
        let report = program.report.as_ref();
        let status = ModuleStatus {
            module: *module,
            connected: program.streams > 0,
            silent: program.is_silent(now),
            heard_ago: now.saturating_duration_since(program.heard),
            applied: program.applied(),
            bundle_sequence: report.map_or(0, |report| report.bundle_sequence),
            certificate_generation: report.map_or(0, |report| report.certificate_generation),
        };
        match statuses.last_mut() {
            Some(last) if last.name == *node => last.modules.push(status),
            _ => statuses.push(NodeStatus {
                name: node.clone(),
                modules: vec![status],
            }),
        }
    }
    statuses
}

pub(crate) fn workload(entry: &Entry, nodes: &Nodes, now: Instant) -> WorkloadStatus {
    let said = Module::ALL.map(|module| (module, Said::of(entry, nodes, module)));
    let mut status = WorkloadStatus {
        workload: entry.workload.clone(),
        reason: reason(entry, &said, nodes, now),
        conditions: entry.conditions().cloned().collect(),
        connections_older: 0,
        connections_captured: 0,
        started_uncaptured: false,
    };
    for (module, said) in said {
        match (module, said.and_then(|said| said.workload)) {
            (_, None) => {}
            (Module::Proxy, Some(report)) => {
                status.connections_captured = report.connections_captured;
            }
            (Module::Redirect, Some(report)) => {
                status.connections_older = report.connections_older;
                status.started_uncaptured = report.started_uncaptured;
            }
        }
    }
    status
}

/// What a module of a workload's own node has said last.
#[derive(Clone, Copy, Debug)]
struct Said<'a> {
    applied: u64,
    /// Of the workload.
    workload: Option<&'a WorkloadReport>,
}

impl<'a> Said<'a> {
    fn of(entry: &Entry, nodes: &'a Nodes, module: Module) -> Option<Self> {
        let report = nodes.last_report(&entry.workload.node, module)?;
        Some(Self {
            applied: report.applied,
            workload: report.workloads.get(&entry.workload.uid),
        })
    }
}

fn reason(
    entry: &Entry,
    said: &[(Module, Option<Said<'_>>)],
    nodes: &Nodes,
    now: Instant,
) -> String {
    let node = &entry.workload.node;
    match entry.enrolment.stage() {
        // It stays so, whatever has become of it: its node refuses rather than to let plain through.
        Stage::Mandatory => broken(entry, said).unwrap_or_default(),
        Stage::None => entry
            .not_wanted
            .map_or_else(String::new, |why| why.to_string()),
        Stage::Wanted => said
            .iter()
            .find_map(|(module, said)| {
                let why = Said::not_ready(*said, entry)?;
                Some(format!("{module} on {node}: {why}"))
            })
            .unwrap_or_default(),
        Stage::Capturable | Stage::Announced | Stage::Draining => not_applied(entry, nodes, now),
    }
}

/// What a module of its node says is wrong with a workload that is captured.
fn broken(entry: &Entry, said: &[(Module, Option<Said<'_>>)]) -> Option<String> {
    let node = &entry.workload.node;
    said.iter()
        .find_map(|(module, said)| match Said::not_ready(*said, entry)? {
            NotReady::Pending { reason } if !reason.is_empty() => {
                Some(format!("{module} on {node}: {reason}"))
            }
            _ => None,
        })
}

/// Why a module of the workload's own node does not count as ready.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum NotReady<'a> {
    Leaving,
    NotApplied { applied: u64, since: u64 },
    NotKnown,
    NotPublished,
    NotReported,
    Pending { reason: &'a str },
}

/// `None`: the module is ready, and says so knowing that the workload is wanted.
pub(crate) fn not_ready<'a>(
    entry: &Entry,
    nodes: &'a Nodes,
    module: Module,
) -> Option<NotReady<'a>> {
    Said::not_ready(Said::of(entry, nodes, module), entry)
}

impl<'a> Said<'a> {
    fn not_ready(said: Option<Self>, entry: &Entry) -> Option<NotReady<'a>> {
        let Some(since) = entry.enrolment.since() else {
            return Some(NotReady::NotPublished);
        };
        let Some(Self { applied, workload }) = said else {
            return Some(NotReady::NotReported);
        };
        // What it says knowing this stage: from us, or from another replica.
        let knows = applied >= since
            || workload
                .and_then(|workload| workload.held)
                .is_some_and(|held| held.epoch >= entry.enrolment.epoch());
        if !knows {
            return Some(NotReady::NotApplied { applied, since });
        }
        match workload {
            None => Some(NotReady::NotKnown),
            Some(report) => match report.condition {
                Condition::Ready => None,
                Condition::Pending => Some(NotReady::Pending {
                    reason: &report.reason,
                }),
                Condition::Released | Condition::Releasing => Some(NotReady::Leaving),
            },
        }
    }
}

impl fmt::Display for NotReady<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Leaving => f.write_str("still letting it go"),
            Self::NotApplied { applied, since } => {
                write!(f, "has snapshot {applied} in use, not yet {since}")
            }
            Self::NotKnown => f.write_str("has not taken it up"),
            Self::NotPublished => f.write_str("not told yet"),
            Self::NotReported => f.write_str("has not reported"),
            Self::Pending { reason: "" } => f.write_str("not ready"),
            Self::Pending { reason } => f.write_str(reason),
        }
    }
}

fn not_applied(entry: &Entry, nodes: &Nodes, now: Instant) -> String {
    let Some(since) = entry.enrolment.since() else {
        return "not published yet".to_owned();
    };
    let late: Vec<_> = nodes
        .heard(now)
        .filter(|(_, program)| program.applied() < since)
        .map(|((node, module), _)| format!("{module} on {node}"))
        .collect();
    let named = late.get(..MAX_NAMED.min(late.len())).unwrap_or_default();
    let more = match late.len() - named.len() {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    if late.is_empty() {
        return String::new();
    }
    format!(
        "snapshot {since} is not yet in use by {}{more}",
        named.join(", "),
    )
}
