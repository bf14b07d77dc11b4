// SPDX-License-Identifier: Apache-2.0
//! An index with two nodes around it, and everything it has published.

use podveil_index::{
    Condition, Held, Index, Module, Report, Saved, Snapshot, Start, WorkloadReport,
};
use podveil_model::{Epoch, Stage, Uid, Workload};
use podveil_source::Cluster;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub struct World {
    pub index: Index,
    pub now: Instant,
    /// The number of the newest snapshot.
    pub number: u64,
    pub last: Option<Snapshot>,
    history: Vec<Snapshot>,
    version: u64,
}

/// `text` in a cluster of two nodes.
fn cluster(text: &str, version: u64) -> Cluster {
    let text = format!("trustDomain: cluster.local\nnodes: [{{name: n1}}, {{name: n2}}]\n{text}");
    podveil_source::parse(version, [(Path::new("cluster.yaml"), text.as_str())])
        .unwrap_or_else(|error| panic!("{error}\n{text}"))
}

impl World {
    pub fn new() -> Self {
        Self::restored(Saved::default())
    }

    pub fn restored(saved: Saved) -> Self {
        Self::with(Index::new(saved, Start::AtOnce))
    }

    /// Without a state of before, on a cluster that may have one.
    pub fn after_reports() -> Self {
        Self::with(Index::new(Saved::default(), Start::AfterReports))
    }

    fn with(index: Index) -> Self {
        Self {
            index,
            now: Instant::now(),
            number: 0,
            last: None,
            history: Vec::new(),
            version: 100,
        }
    }

    pub fn apply(&mut self, text: &str) {
        self.apply_with(text, |_| {});
    }

    /// With what no file says.
    pub fn apply_with(&mut self, text: &str, change: impl FnOnce(&mut Cluster)) {
        self.version += 1;
        let mut cluster = cluster(text, self.version);
        change(&mut cluster);
        self.index.apply(self.now, &Arc::new(cluster));
        self.publish();
    }

    pub fn advance(&mut self, by: Duration) {
        self.now += by;
        self.publish();
    }

    /// A report with the newest snapshot in use.
    pub fn report(&mut self, node: &str, module: Module, workloads: &[(&str, Condition)]) {
        self.report_at(node, module, self.number, workloads);
    }

    pub fn report_at(
        &mut self,
        node: &str,
        module: Module,
        applied: u64,
        workloads: &[(&str, Condition)],
    ) {
        let report = |condition: &Condition| WorkloadReport {
            condition: *condition,
            held: None,
            reason: String::new(),
            connections_older: 0,
            connections_captured: 0,
            started_uncaptured: false,
        };
        let report = Report {
            applied,
            workloads: workloads
                .iter()
                .map(|(uid, condition)| (Uid::from(*uid), report(condition)))
                .collect(),
            ..Report::default()
        };
        self.index
            .report(self.now, &node.parse().unwrap(), module, report);
        self.publish();
    }

    /// One workload, ready, as another replica has told it to the node.
    pub fn report_held(&mut self, node: &str, module: Module, uid: &str, held: Held) {
        let workload = WorkloadReport {
            condition: Condition::Ready,
            held: Some(held),
            reason: String::new(),
            connections_older: 0,
            connections_captured: 0,
            started_uncaptured: false,
        };
        let report = Report {
            workloads: [(Uid::from(uid), workload)].into(),
            ..Report::default()
        };
        self.index
            .report(self.now, &node.parse().unwrap(), module, report);
        self.publish();
    }

    /// Every program of both nodes has the newest snapshot in use; these workloads are ready, wherever they are.
    pub fn report_all(&mut self, ready: &[&str]) {
        let number = self.number;
        let ready: Vec<_> = ready.iter().map(|uid| (*uid, Condition::Ready)).collect();
        for node in ["n1", "n2"] {
            for module in Module::ALL {
                self.report_at(node, module, number, &ready);
            }
        }
    }

    pub fn disconnect(&mut self, node: &str, module: Module) {
        self.index
            .disconnected(self.now, &node.parse().unwrap(), module);
        self.publish();
    }

    pub fn find(&self, uid: &str) -> Option<Arc<Workload>> {
        let snapshot = self.last.as_ref()?;
        let uid = Uid::from(uid);
        snapshot
            .workloads
            .iter()
            .find(|workload| workload.uid == uid)
            .cloned()
    }

    pub fn workload(&self, uid: &str) -> Arc<Workload> {
        self.find(uid).expect("published")
    }

    pub fn stage(&self, uid: &str) -> Stage {
        self.workload(uid).stage
    }

    pub fn addresses(&self, uid: &str) -> Vec<String> {
        self.workload(uid)
            .addresses
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    pub fn reason(&self, uid: &str) -> String {
        self.status(uid).reason
    }

    pub fn conditions(&self, uid: &str) -> String {
        self.status(uid).conditions.join("; ")
    }

    pub fn stages_published(&self, uid: &str) -> Vec<Stage> {
        self.published(uid).map(|workload| workload.stage).collect()
    }

    pub fn epochs_published(&self, uid: &str) -> Vec<Epoch> {
        let mut epochs: Vec<_> = self.published(uid).map(|workload| workload.epoch).collect();
        epochs.dedup();
        epochs
    }

    fn published(&self, uid: &str) -> impl Iterator<Item = &Arc<Workload>> {
        let uid = Uid::from(uid);
        self.history
            .iter()
            .filter_map(move |snapshot| snapshot.workloads.iter().find(|one| one.uid == uid))
    }

    fn status(&self, uid: &str) -> podveil_index::WorkloadStatus {
        let uid = Uid::from(uid);
        let status = self.index.status(self.now);
        status
            .workloads
            .into_iter()
            .find(|one| one.workload.uid == uid)
            .expect("known")
    }

    fn publish(&mut self) {
        while let Some(snapshot) = self.index.poll(self.now) {
            self.number += 1;
            self.history.push(snapshot.clone());
            self.last = Some(snapshot);
            self.index.published(self.number);
        }
    }
}
