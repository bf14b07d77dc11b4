// SPDX-License-Identifier: Apache-2.0
mod apply;

use crate::enrolment::Facts;
use crate::entry::Entry;
use crate::letting_go::{self, LettingGo};
use crate::nodes::Nodes;
use crate::settings::NamespaceSettings;
use crate::status::{self, Status};
use crate::{Module, NotBegun, Report, Saved, SavedWorkload, Snapshot};
use podveil_identity::KubernetesName;
use podveil_model::{Epoch, MeshConfig, Stage, Uid, Workload};
use podveil_source::Cluster;
use std::cell::LazyCell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

/// The one place where the state of the cluster and the reports of the nodes meet.
#[derive(Debug)]
pub struct Index {
    /// Restored from before the restart, until the first cluster state says who is still there.
    saved: BTreeMap<Uid, SavedWorkload>,
    start: Start,
    /// The newest version of the cluster so far, also before a restart.
    version: u64,
    namespaces: BTreeMap<KubernetesName, NamespaceSettings>,
    entries: BTreeMap<Uid, Entry>,
    /// The state that all of this was made of.
    applied: Option<Arc<Cluster>>,
    /// Endpoints that are no pods.
    without_pods: Vec<Arc<Workload>>,
    /// Those whose next step waits for a report or a publication.
    moving: BTreeSet<Uid>,
    nodes: Nodes,
    services: Vec<Arc<podveil_model::Service>>,
    policies: Vec<Arc<podveil_policy::Policy>>,
    /// `None` before the first cluster state: then there is nothing to publish.
    mesh: Option<Arc<MeshConfig>>,
    conditions: Vec<String>,
    namespace_conditions: BTreeMap<KubernetesName, Vec<String>>,
    /// Labelled namespaces in which nothing is begun.
    not_begun: Option<(NotBegun, Vec<KubernetesName>)>,
    /// The number of the newest snapshot.
    published: u64,
    /// Something differs from that snapshot.
    changed: bool,
    /// Something differs from what [`Index::take_unsaved`] gave last.
    unsaved: bool,
}

/// A program that has every one of these in use, at its epoch or a newer one, counts as having the snapshot of this number
/// in use: nobody waits for anything else in it.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Awaited {
    pub number: u64,
    /// All of them, in the order of `since` and `uid`.
    pub workloads: Vec<AwaitedWorkload>,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub struct AwaitedWorkload {
    /// The snapshot that first held it so.
    pub since: u64,
    pub uid: Uid,
    pub epoch: Epoch,
}

/// When the first snapshot may be published.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Start {
    /// When every program of a node has reported, so that what they hold already is gone on from, or has been waited for
    /// for [`SILENCE`]: a controller that knows nothing of before must not take enrolled workloads back to plain.
    AfterReports,
    /// With the first state of the cluster.
    AtOnce,
}

impl Index {
    pub fn new(saved: Saved, start: Start) -> Self {
        Self {
            saved: saved.workloads,
            start,
            version: saved.version,
            namespaces: BTreeMap::new(),
            entries: BTreeMap::new(),
            applied: None,
            without_pods: Vec::new(),
            moving: BTreeSet::new(),
            nodes: Nodes::default(),
            services: Vec::new(),
            policies: Vec::new(),
            mesh: None,
            conditions: Vec::new(),
            namespace_conditions: BTreeMap::new(),
            not_begun: None,
            published: 0,
            changed: false,
            unsaved: false,
        }
    }

    /// A program of a node has opened its stream of reports.
    pub fn connected(&mut self, now: Instant, node: &KubernetesName, module: Module) {
        self.nodes.connected(now, node, module);
    }

    /// That stream has ended.
    pub fn disconnected(&mut self, now: Instant, node: &KubernetesName, module: Module) {
        self.nodes.disconnected(now, node, module);
    }

    /// Takes a report. Workloads that are not on this node are left out of it, once it is known where they are.
    pub fn report(
        &mut self,
        now: Instant,
        node: &KubernetesName,
        module: Module,
        mut report: Report,
    ) {
        if self.mesh.is_some() {
            report.workloads.retain(|uid, _| {
                self.entries
                    .get(uid)
                    .is_some_and(|entry| entry.workload.node == *node)
            });
        }
        self.nodes.report(now, node, module, report);
        let Some(report) = self.nodes.last_report(node, module) else {
            return;
        };
        for (uid, workload) in &report.workloads {
            let (Some(entry), Some(held)) = (self.entries.get_mut(uid), workload.held) else {
                continue;
            };
            if entry.workload.node == *node && entry.adopt(held, self.published == 0) {
                self.moving.insert(uid.clone());
                self.changed = true;
                self.unsaved = true;
            }
        }
    }

    /// Takes every step that is due; the snapshot to publish if that or anything else made a new one. After
    /// [`Self::published`] ask again: the next step may only have waited for it.
    pub fn poll(&mut self, now: Instant) -> Option<Snapshot> {
        self.nodes.forget(now);
        let mesh = self.mesh.clone()?;
        if self.published == 0 && self.waits_for_reports(now) {
            return None;
        }
        let nodes = &self.nodes;
        let applied_by_all = LazyCell::new(|| nodes.applied_by_all(now));
        let mut at_rest = Vec::new();
        for uid in &self.moving {
            let Some(entry) = self.entries.get_mut(uid) else {
                at_rest.push(uid.clone());
                continue;
            };
            let facts = Facts {
                wanted: entry.wanted(),
                ready: Module::ALL
                    .iter()
                    .all(|module| status::not_ready(entry, nodes, *module).is_none()),
                applied: entry.enrolment.awaits_all()
                    && (entry.enrolment.since()).is_some_and(|since| *applied_by_all >= since),
            };
            if entry.enrolment.step(facts) {
                entry.show_stage();
                self.changed = true;
                self.unsaved = true;
                tracing::info!(
                    %uid,
                    stage = %entry.enrolment.stage(),
                    epoch = %entry.enrolment.epoch(),
                    "enrolment stage"
                );
            }
            if !entry.enrolment.is_moving() && entry.enrolment.since().is_some() {
                at_rest.push(uid.clone());
            }
        }
        for uid in at_rest {
            self.moving.remove(&uid);
        }
        std::mem::take(&mut self.changed).then(|| Snapshot {
            workloads: self
                .entries
                .values()
                .map(|entry| &entry.workload)
                .chain(&self.without_pods)
                .cloned()
                .collect(),
            services: self.services.clone(),
            policies: self.policies.clone(),
            mesh,
        })
    }

    /// The snapshot that [`Self::poll`] gave is published under this number; numbers grow.
    pub fn published(&mut self, number: u64) {
        self.published = number;
        for uid in &self.moving {
            if let Some(entry) = self.entries.get_mut(uid) {
                entry.enrolment.published(number);
            }
        }
    }

    /// What to ask a program for that takes its configuration from another replica, and cannot name our snapshots.
    pub fn awaited(&self) -> Awaited {
        let mut workloads: Vec<_> = self
            .moving
            .iter()
            .filter_map(|uid| self.entries.get(uid))
            .filter(|entry| entry.enrolment.awaits_all())
            .filter_map(|entry| {
                Some(AwaitedWorkload {
                    since: entry.enrolment.since()?,
                    uid: entry.uid().clone(),
                    epoch: entry.enrolment.epoch(),
                })
            })
            .collect();
        workloads.sort_by(|a, b| (a.since, &a.uid).cmp(&(b.since, &b.uid)));
        Awaited {
            number: self.published,
            workloads,
        }
    }

    /// When to poll again although nothing was told: a program may have fallen silent that others wait for.
    pub fn next_wakeup(&self) -> Option<Instant> {
        if self.moving.is_empty() && self.published > 0 {
            return None;
        }
        self.nodes.next_silence()
    }

    /// What an uninstallation still waits for.
    pub fn letting_go(&self, now: Instant) -> LettingGo {
        let enrolled = |entry: &&Entry| entry.enrolment.stage() != Stage::None;
        LettingGo {
            begun: self.published > 0,
            workloads: self.entries.values().filter(enrolled).count(),
            programs: letting_go::programs(&self.nodes, now),
        }
    }

    /// What must outlive a restart.
    pub fn saved(&self) -> Saved {
        Saved {
            version: self.version,
            workloads: self
                .entries
                .iter()
                .filter_map(|(uid, entry)| Some((uid.clone(), entry.saved()?)))
                .collect(),
        }
    }

    /// The same if it is news and belongs to what has been published.
    pub fn take_unsaved(&mut self) -> Option<Saved> {
        (self.published > 0 && std::mem::take(&mut self.unsaved)).then(|| self.saved())
    }

    pub fn status(&self, now: Instant) -> Status {
        let since = self.entries.values().map(|entry| entry.enrolment.since());
        Status {
            enrolment_changed: since.flatten().max().unwrap_or_default(),
            published: self.published,
            version: self.version,
            nodes: status::nodes(&self.nodes, now),
            workloads: self
                .entries
                .values()
                .map(|entry| status::workload(entry, &self.nodes, now))
                .collect(),
            namespaces: self.namespace_conditions.clone(),
            not_begun: self.not_begun.clone(),
            conditions: self.conditions.clone(),
        }
    }

    fn waits_for_reports(&self, now: Instant) -> bool {
        self.start == Start::AfterReports
            && self
                .nodes
                .heard(now)
                .any(|(_, program)| program.report.is_none())
    }
}
