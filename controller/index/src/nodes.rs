// SPDX-License-Identifier: Apache-2.0
use crate::Held;
use podveil_identity::KubernetesName;
use podveil_model::Uid;
use podveil_source::Node;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::{Duration, Instant};

/// A program that has said nothing for so long blocks nobody; it is named in the status instead.
pub const SILENCE: Duration = Duration::from_secs(10);

/// A program of a node, by its role.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Module {
    Proxy,
    Redirect,
}

impl Module {
    pub const ALL: [Self; 2] = [Self::Proxy, Self::Redirect];
}

impl fmt::Display for Module {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Proxy => "proxy",
            Self::Redirect => "redirect",
        })
    }
}

/// The full state of one program of a node; replaces the one before it.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Report {
    /// The newest snapshot of this controller that is in use there; 0: none.
    pub applied: u64,
    pub workloads: BTreeMap<Uid, WorkloadReport>,
    pub bundle_sequence: u64,
    pub certificate_generation: u64,
    /// It will leave nothing on its node when it ends. `None`: it does not know of such a thing.
    pub uninstalling: Option<bool>,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub struct WorkloadReport {
    pub condition: Condition,
    /// What the program has in use of it; `None`: nothing.
    pub held: Option<Held>,
    /// Why it is not ready; empty when it is.
    pub reason: String,
    pub connections_older: u32,
    pub connections_captured: u32,
    /// Its containers may have run before it was captured.
    pub started_uncaptured: bool,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Condition {
    Pending,
    Ready,
    Released,
    Releasing,
}

/// All programs that are expected to report, and those that do.
#[derive(Debug, Default)]
pub(crate) struct Nodes {
    expected: BTreeSet<KubernetesName>,
    /// Where a pod of our programs is, as the cluster says.
    pub running: BTreeSet<KubernetesName>,
    programs: BTreeMap<(KubernetesName, Module), Program>,
    /// Until then nobody turns silent: so that a report costs nothing for all the others. `None`: nobody is heard.
    next_silence: Option<Instant>,
}

#[derive(Debug)]
pub(crate) struct Program {
    pub streams: u32,
    /// When it was last heard, or first expected.
    pub heard: Instant,
    pub report: Option<Report>,
}

impl Program {
    pub(crate) fn is_silent(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.heard) > SILENCE
    }

    pub(crate) fn applied(&self) -> u64 {
        self.report.as_ref().map_or(0, |report| report.applied)
    }
}

impl Nodes {
    /// The nodes that the cluster has: each is expected to report with every module.
    pub(crate) fn expect(&mut self, now: Instant, nodes: &BTreeMap<KubernetesName, Node>) {
        if nodes.keys().eq(&self.expected) {
            return;
        }
        self.expected = nodes.keys().cloned().collect();
        for node in nodes.keys() {
            for module in Module::ALL {
                self.program(now, node, module);
            }
        }
        self.next_silence = Some(now);
        self.forget(now);
    }

    pub(crate) fn connected(&mut self, now: Instant, node: &KubernetesName, module: Module) {
        let program = self.program(now, node, module);
        program.streams += 1;
        program.heard = now;
    }

    pub(crate) fn disconnected(&mut self, now: Instant, node: &KubernetesName, module: Module) {
        let program = self.program(now, node, module);
        program.streams = program.streams.saturating_sub(1);
        // It may be silent already, and unexpected.
        self.next_silence = Some(now);
    }

    pub(crate) fn report(
        &mut self,
        now: Instant,
        node: &KubernetesName,
        module: Module,
        report: Report,
    ) {
        let program = self.program(now, node, module);
        program.heard = now;
        program.report = Some(report);
    }

    /// The newest snapshot that every program which can be heard has in use.
    pub(crate) fn applied_by_all(&self, now: Instant) -> u64 {
        self.heard(now)
            .map(|(_, program)| program.applied())
            .min()
            .unwrap_or(u64::MAX)
    }

    pub(crate) fn heard(
        &self,
        now: Instant,
    ) -> impl Iterator<Item = (&(KubernetesName, Module), &Program)> {
        self.programs
            .iter()
            .filter(move |(_, program)| !program.is_silent(now))
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&(KubernetesName, Module), &Program)> {
        self.programs.iter()
    }

    pub(crate) fn last_report(&self, node: &KubernetesName, module: Module) -> Option<&Report> {
        self.programs.get(&(node.clone(), module))?.report.as_ref()
    }

    /// Until when no program turns silent.
    pub(crate) fn next_silence(&self) -> Option<Instant> {
        self.next_silence
    }

    /// Programs of nodes that the cluster no longer has, once they have gone.
    pub(crate) fn forget(&mut self, now: Instant) {
        if self.next_silence.is_some_and(|at| now < at) {
            return;
        }
        let expected = &self.expected;
        self.programs.retain(|(node, _), program| {
            expected.contains(node) || program.streams > 0 || !program.is_silent(now)
        });
        self.next_silence = self.heard(now).map(|(_, one)| silence_of(one)).min();
    }

    fn program(&mut self, now: Instant, node: &KubernetesName, module: Module) -> &mut Program {
        let program = self
            .programs
            .entry((node.clone(), module))
            .or_insert(Program {
                streams: 0,
                heard: now,
                report: None,
            });
        self.next_silence.get_or_insert(silence_of(program));
        program
    }
}

/// One more: a program is silent after the bound, not at it.
fn silence_of(program: &Program) -> Instant {
    program.heard + SILENCE + Duration::from_millis(1)
}
