// SPDX-License-Identifier: Apache-2.0
use crate::enrolment::{Enrolment, Facts};
use crate::nodes::Nodes;
use crate::resolve::{Resolved, resolve};
use crate::settings::{self, Settings};
use crate::status::{self, Status};
use crate::{Module, Report, Saved, SavedWorkload, Snapshot};
use podveil_identity::KubernetesName;
use podveil_model::{Epoch, MeshConfig, Mode, Stage, Uid, Workload};
use podveil_source::{Cluster, Namespace, Phase, Pod};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

/// The one place where the state of the cluster and the reports of the nodes meet.
#[derive(Debug)]
pub struct Index {
    /// Restored from before the restart, until the first cluster state says who is still there.
    saved: BTreeMap<Uid, SavedWorkload>,
    /// No epoch so far is newer.
    version: u64,
    modes: BTreeMap<KubernetesName, Mode>,
    entries: BTreeMap<Uid, Entry>,
    /// Those whose next step waits for a report or a publication.
    moving: BTreeSet<Uid>,
    nodes: Nodes,
    services: Vec<Arc<podveil_model::Service>>,
    policies: Vec<Arc<podveil_policy::Policy>>,
    /// `None` before the first cluster state: then there is nothing to publish.
    mesh: Option<Arc<MeshConfig>>,
    conditions: Vec<String>,
    /// The number of the newest snapshot.
    published: u64,
    /// Something differs from that snapshot.
    changed: bool,
}

/// One pod that is not finished.
#[derive(Debug)]
pub(crate) struct Entry {
    /// As it is published.
    pub workload: Arc<Workload>,
    pub enrolment: Enrolment,
    pub conditions: Vec<String>,
    wanted: bool,
    settings: Settings,
    /// The version at which it first appeared.
    seen: u64,
}

impl Index {
    pub fn new(saved: Saved) -> Self {
        Self {
            saved: saved.workloads,
            version: saved.version,
            modes: BTreeMap::new(),
            entries: BTreeMap::new(),
            moving: BTreeSet::new(),
            nodes: Nodes::default(),
            services: Vec::new(),
            policies: Vec::new(),
            mesh: None,
            conditions: Vec::new(),
            published: 0,
            changed: false,
        }
    }

    /// Takes a new state of the cluster, whole. A pod that is gone is gone at once.
    pub fn apply(&mut self, now: Instant, cluster: &Cluster) {
        let version = cluster.version.max(self.version);
        self.version = version;
        self.nodes.expect(now, &cluster.nodes);
        let Resolved {
            mut workloads,
            services,
            policies,
            mut refused,
            mut conditions,
        } = resolve(cluster, |uid| {
            self.entries.get(uid).map_or(version, |entry| entry.seen)
        });
        self.take_modes(cluster, &mut conditions);

        let mut before = std::mem::take(&mut self.entries);
        let nothing = Namespace::default();
        for pod in &cluster.pods {
            let Some(workload) = workloads.remove(&pod.uid) else {
                continue;
            };
            let namespace = cluster.namespace(&pod.namespace).unwrap_or(&nothing);
            let mode = self.modes.get(&pod.namespace).copied().unwrap_or_default();
            let last = before.remove(&pod.uid);
            let restored = match last {
                Some(_) => None,
                None => self.saved.remove(&pod.uid),
            };
            let mut entry = Entry::new(version, pod, namespace, mode, workload, last, restored);
            entry
                .conditions
                .extend(refused.remove(&pod.uid).unwrap_or_default());
            self.version = self.version.max(entry.enrolment.epoch().resource_version);
            self.entries.insert(pod.uid.clone(), entry);
        }
        self.saved.clear();
        self.moving = self.entries.keys().cloned().collect();
        self.services = reuse(&self.services, services);
        self.policies = reuse(&self.policies, policies);
        self.take_mesh(cluster, version);
        self.conditions = conditions;
        self.changed = true;
    }

    /// A program of a node has opened its stream of reports.
    pub fn connected(&mut self, now: Instant, node: &KubernetesName, module: Module) {
        self.nodes.connected(now, node, module);
    }

    /// That stream has ended.
    pub fn disconnected(&mut self, now: Instant, node: &KubernetesName, module: Module) {
        self.nodes.disconnected(now, node, module);
    }

    /// Takes a report. Workloads that are not on this node are left out of it.
    pub fn report(
        &mut self,
        now: Instant,
        node: &KubernetesName,
        module: Module,
        mut report: Report,
    ) {
        report.workloads.retain(|uid, _| {
            self.entries
                .get(uid)
                .is_some_and(|entry| entry.workload.node == *node)
        });
        self.nodes.report(now, node, module, report);
    }

    /// Takes every step that is due; the snapshot to publish if that or anything else made a new one. After
    /// [`Self::published`] ask again: the next step may only have waited for it.
    pub fn poll(&mut self, now: Instant) -> Option<Snapshot> {
        self.nodes.forget(now);
        let mesh = self.mesh.clone()?;
        let applied_by_all = self.nodes.applied_by_all(now);
        let mut at_rest = Vec::new();
        for uid in &self.moving {
            let Some(entry) = self.entries.get_mut(uid) else {
                continue;
            };
            let facts = Facts {
                wanted: entry.wanted,
                ready: Module::ALL
                    .iter()
                    .all(|module| status::not_ready(entry, &self.nodes, *module).is_none()),
                applied: entry
                    .enrolment
                    .since()
                    .is_some_and(|since| applied_by_all >= since),
            };
            if entry.enrolment.step(facts) {
                entry.show_stage();
                self.changed = true;
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
                .map(|entry| entry.workload.clone())
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

    /// When to poll again although nothing was told: a program may have fallen silent that others wait for.
    pub fn next_wakeup(&self, now: Instant) -> Option<Instant> {
        if self.moving.is_empty() {
            return None;
        }
        self.nodes.next_silence(now)
    }

    /// What must outlive a restart.
    pub fn saved(&self) -> Saved {
        let saved = |entry: &Entry| SavedWorkload {
            stage: entry.enrolment.stage(),
            mode: entry.settings.mode,
            resource_version: entry.enrolment.epoch().resource_version,
        };
        Saved {
            version: self.version,
            workloads: self
                .entries
                .iter()
                .filter(|(_, entry)| entry.enrolment.stage() != Stage::None)
                .map(|(uid, entry)| (uid.clone(), saved(entry)))
                .collect(),
        }
    }

    pub fn status(&self, now: Instant) -> Status {
        Status {
            published: self.published,
            version: self.version,
            nodes: status::nodes(&self.nodes, now),
            workloads: self
                .entries
                .values()
                .map(|entry| status::workload(entry, &self.nodes, now))
                .collect(),
            conditions: self.conditions.clone(),
        }
    }

    fn take_modes(&mut self, cluster: &Cluster, conditions: &mut Vec<String>) {
        let mut modes = BTreeMap::new();
        for (name, namespace) in &cluster.namespaces {
            let mut bad = Vec::new();
            // Before a restart the mode was that of the pods.
            let last = self.modes.get(name).copied().or_else(|| {
                cluster
                    .pods
                    .iter()
                    .filter(|pod| pod.namespace == *name)
                    .find_map(|pod| self.saved.get(&pod.uid))
                    .map(|saved| saved.mode)
            });
            modes.insert(name.clone(), settings::mode(namespace, last, &mut bad));
            conditions.extend(
                bad.into_iter()
                    .map(|condition| format!("namespace {name}: {condition}")),
            );
        }
        self.modes = modes;
    }

    fn take_mesh(&mut self, cluster: &Cluster, version: u64) {
        let ranges = cluster.ranges.clone();
        let mut mesh = MeshConfig {
            trust_domain: cluster.trust_domain.clone(),
            ranges_known: ranges.is_some(),
            pod_ranges: ranges.clone().unwrap_or_default().pods,
            service_ranges: ranges.unwrap_or_default().services,
            plain_outbound_ranges: cluster.plain_outbound.clone(),
            plain_outbound_namespaces: BTreeSet::new(),
            nodes: BTreeMap::new(),
            epoch: Epoch {
                resource_version: version,
                stage: 0,
            },
        };
        if let Some(last) = &self.mesh {
            let new = std::mem::replace(&mut mesh.epoch, last.epoch);
            if mesh == **last {
                return;
            }
            mesh.epoch = new;
        }
        self.mesh = Some(Arc::new(mesh));
    }
}

impl Entry {
    fn new(
        version: u64,
        pod: &Pod,
        namespace: &Namespace,
        mode: Mode,
        workload: Workload,
        last: Option<Self>,
        restored: Option<SavedWorkload>,
    ) -> Self {
        let mut conditions = Vec::new();
        let settings = settings::settings(
            pod,
            mode,
            last.as_ref().map(|last| &last.settings),
            &mut conditions,
        );
        let mut enrolment = match (&last, restored) {
            (Some(last), _) => last.enrolment.clone(),
            (None, Some(saved)) => Enrolment::restored(saved.stage, saved.resource_version),
            (None, None) => Enrolment::new(version),
        };
        // A pod that is told to end is not begun with; one that is under way stays.
        let begins = pod.phase == Phase::Running;
        let wanted =
            pod.wants_enrolment(namespace, mode) && (begins || enrolment.stage() != Stage::None);
        let decided = match (&last, restored) {
            (Some(last), _) => last.wanted != wanted || last.settings != settings,
            (None, Some(saved)) => saved.stage.wants_capture() != wanted || saved.mode != mode,
            (None, None) => false,
        };
        if decided {
            enrolment.decided(version);
        }
        let mut entry = Self {
            enrolment,
            conditions,
            wanted,
            seen: last.as_ref().map_or(version, |last| last.seen),
            workload: Arc::new(Workload {
                mode,
                exclude_outbound_ports: settings.exclude_outbound_ports.clone(),
                exclude_inbound_ports: settings.exclude_inbound_ports.clone(),
                plain_inbound_ports: settings.plain_inbound_ports.clone(),
                ..workload
            }),
            settings,
        };
        entry.show_stage();
        if let Some(last) = last
            && last.workload == entry.workload
        {
            entry.workload = last.workload;
        }
        entry
    }

    /// Makes the published form say the stage.
    fn show_stage(&mut self) {
        let workload = Arc::make_mut(&mut self.workload);
        workload.stage = self.enrolment.stage();
        workload.epoch = self.enrolment.epoch();
    }
}

/// `new`, with the `Arc`s of `old` where the values are the same.
fn reuse<T: PartialEq>(old: &[Arc<T>], new: Vec<Arc<T>>) -> Vec<Arc<T>> {
    new.into_iter()
        .enumerate()
        .map(|(index, new)| match old.get(index) {
            Some(old) if *old == new => old.clone(),
            _ => new,
        })
        .collect()
}
