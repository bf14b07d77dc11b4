// SPDX-License-Identifier: Apache-2.0
//! How far an uninstallation is: whoever removes the programs before the last node has let go leaves pods behind whose
//! connections lead nowhere.

use crate::nodes::{Nodes, Program, Report};
use crate::{Condition, Module};
use podveil_identity::KubernetesName;
use podveil_source::Cluster;
use std::collections::BTreeSet;
use std::fmt;
use std::time::Instant;

/// The ServiceAccount of both programs of a node, in the namespace of the installation.
const NODE_ACCOUNT: &str = "podveil-node";
/// At most so many programs are named.
const MAX_NAMED: usize = 20;

/// What an uninstallation still waits for; shown as one line for a person.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct LettingGo {
    /// The cluster has been read, and nodes were told.
    pub begun: bool,
    /// Pods that are enrolled, or on their way out.
    pub workloads: usize,
    pub programs: Vec<Holding>,
}

/// A node's program that has not let go.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Holding {
    pub node: KubernetesName,
    pub module: Module,
    /// Not heard for [`SILENCE`](crate::SILENCE): it may be long until it lets go, or never.
    pub silent: bool,
    pub why: Why,
}

/// Why a program counts as one that has not let go.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Why {
    Captures {
        pods: usize,
    },
    /// Its folders would stay behind.
    NotKnown,
    NotReported,
}

/// Who has let go, where nothing else is waited for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Done {
    All,
    /// Everybody who can be heard.
    ExceptSilent,
}

impl LettingGo {
    /// `None`: not yet.
    pub fn done(&self) -> Option<Done> {
        if !self.begun || self.workloads > 0 || self.programs.iter().any(|one| !one.silent) {
            None
        } else if self.programs.is_empty() {
            Some(Done::All)
        } else {
            Some(Done::ExceptSilent)
        }
    }
}

/// Where a kubelet has taken up a pod of our node programs.
pub(crate) fn running(cluster: &Cluster) -> BTreeSet<KubernetesName> {
    cluster
        .pods
        .iter()
        .filter(|pod| {
            pod.service_account.as_str() == NODE_ACCOUNT
                && !pod.phase.is_finished()
                && !pod.addresses.is_empty()
                && (cluster.namespace(&pod.namespace)).is_some_and(|namespace| namespace.own)
        })
        .map(|pod| pod.node.clone())
        .collect()
}

pub(crate) fn programs(nodes: &Nodes, now: Instant) -> Vec<Holding> {
    let holding = |((node, module), program): (&(KubernetesName, Module), &Program)| {
        let silent = program.is_silent(now);
        let runs = nodes.running.contains(node);
        let why = match &program.report {
            // One that was just expected may only be about to report.
            None if silent && !runs => return None,
            None => Why::NotReported,
            Some(report) => holds(*module, report)?,
        };
        // One without a pod in which nothing was captured has ended, and nothing of it works on.
        let matters = !silent || runs || matches!(why, Why::Captures { .. });
        matters.then(|| Holding {
            node: node.clone(),
            module: *module,
            silent,
            why,
        })
    };
    nodes.iter().filter_map(holding).collect()
}

fn holds(module: Module, report: &Report) -> Option<Why> {
    let pods = match module {
        Module::Proxy => 0,
        Module::Redirect => report
            .workloads
            .values()
            .filter(|workload| workload.condition != Condition::Released)
            .count(),
    };
    match (pods, report.uninstalling) {
        (0, Some(false)) => Some(Why::NotKnown),
        (0, _) => None,
        _ => Some(Why::Captures { pods }),
    }
}

impl fmt::Display for LettingGo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.begun {
            return f.write_str("the controller has not told the nodes yet");
        }
        let mut parts = Vec::new();
        if self.workloads > 0 {
            parts.push(format!("{} still enrolled", Pods(self.workloads)));
        }
        parts.extend(
            self.programs
                .iter()
                .take(MAX_NAMED)
                .map(ToString::to_string),
        );
        if let Some(more @ 1..) = self.programs.len().checked_sub(MAX_NAMED) {
            parts.push(format!("{more} more programs"));
        }
        f.write_str(&parts.join("; "))
    }
}

impl fmt::Display for Holding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { node, module, .. } = self;
        write!(f, "{module} on {node}")?;
        if self.silent {
            f.write_str(", silent")?;
        }
        match self.why {
            Why::Captures { pods } => write!(f, ": {} still captured", Pods(pods)),
            Why::NotKnown => f.write_str(": does not know of the uninstallation"),
            Why::NotReported => f.write_str(": has not reported"),
        }
    }
}

struct Pods(usize);

impl fmt::Display for Pods {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pod{}", self.0, if self.0 == 1 { "" } else { "s" })
    }
}
