// SPDX-License-Identifier: Apache-2.0
use crate::enrolment::Facts;
use crate::entry::{Entry, Parts};
use crate::letting_go::{self, LettingGo};
use crate::mesh::mesh;
use crate::nodes::Nodes;
use crate::resolve::{Resolved, resolve};
use crate::settings::{self, NamespaceSettings};
use crate::status::{self, Status};
use crate::{Module, NotBegun, Report, Saved, SavedWorkload, Snapshot};
use foldhash::{HashMap, HashSet};
use podveil_identity::KubernetesName;
use podveil_model::{Epoch, MeshConfig, Stage, Uid, Workload};
use podveil_source::{Cluster, Namespace};
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

    /// Takes a new state of the cluster, whole. A pod that is gone is gone at once.
    pub fn apply(&mut self, now: Instant, cluster: &Cluster) {
        let version = cluster.version.max(self.version);
        self.version = version;
        self.nodes.expect(now, &cluster.nodes);
        self.nodes.running = letting_go::running(cluster);
        let mut resolved = resolve(cluster, |uid| {
            self.entries.get(uid).map_or(version, |entry| entry.seen)
        });
        self.take_namespaces(cluster);
        self.take_pods(cluster, version, &mut resolved);
        let without_pods = resolved.without_pods().into_iter().map(Arc::new).collect();
        self.changed |= replace(&mut self.without_pods, without_pods);
        self.changed |= replace(&mut self.services, resolved.services);
        self.changed |= replace(&mut self.policies, resolved.policies);
        self.conditions = resolved.conditions;
        self.take_mesh(cluster, version);
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

    fn take_pods(&mut self, cluster: &Cluster, version: u64, resolved: &mut Resolved<'_>) {
        let nothing = Arc::new(Namespace::default());
        let live = || cluster.pods.iter().filter(|pod| !pod.phase.is_finished());
        // Asked for each pod: a tree of names costs ten comparisons, each a miss of the cache.
        let namespaces: HashMap<_, _> = (cluster.namespaces.iter())
            .map(|(name, namespace)| {
                let settings = self.namespaces.get(name).copied().unwrap_or_default();
                (name, (namespace, settings))
            })
            .collect();
        let nodes: HashMap<_, _> = cluster.nodes.iter().collect();
        let mut changed_pods = Vec::new();
        // Both are in the order of UIDs, so that a step of one is mostly one of the other. A pod that is missed is looked at
        // below.
        let mut entries = self.entries.values().peekable();
        for pod in live() {
            let (namespace, namespace_settings) = (namespaces.get(&pod.namespace).copied())
                .unwrap_or_else(|| (&nothing, NamespaceSettings::default()));
            let parts = Parts {
                cluster,
                pod,
                node: nodes.get(&pod.node).copied(),
                namespace,
                namespace_settings,
                derived: resolved.derived(pod),
                lift: version.saturating_sub(cluster.version),
            };
            while entries.next_if(|entry| *entry.uid() < pod.uid).is_some() {}
            let last = entries.next_if(|entry| *entry.uid() == pod.uid);
            // Nearly all, nearly always.
            if !last.is_some_and(|last| last.is_made_of(&parts)) {
                changed_pods.push(parts);
            }
        }
        for parts in changed_pods {
            let pod = parts.pod;
            if (self.entries.get(&pod.uid)).is_some_and(|last| last.is_made_of(&parts)) {
                continue;
            }
            let last = self.entries.remove(&pod.uid);
            let restored = match last {
                Some(_) => None,
                None => self.saved.remove(&pod.uid),
            };
            let is_new = last.is_none();
            let saved = last.as_ref().map_or(restored, Entry::saved);
            let (mut entry, changed) = Entry::next(parts, last, restored, version);
            self.changed |= changed;
            if is_new {
                self.version = self.version.max(entry.enrolment.epoch().resource_version);
            }
            if changed {
                // Reports may have come before the object they tell of.
                for module in Module::ALL {
                    let held = self
                        .nodes
                        .last_report(&pod.node, module)
                        .and_then(|report| report.workloads.get(&pod.uid)?.held);
                    if let Some(held) = held {
                        entry.adopt(held, self.published == 0);
                    }
                }
                self.moving.insert(pod.uid.clone());
                self.unsaved |= entry.saved() != saved;
            }
            self.entries.insert(pod.uid.clone(), entry);
        }
        // All of these have an entry; if there are more, they are of pods that are gone.
        if live().count() < self.entries.len() {
            let uids: HashSet<&Uid> = live().map(|pod| &pod.uid).collect();
            self.changed = true;
            self.unsaved = true;
            self.entries.retain(|uid, _| uids.contains(uid));
        }
        self.saved.clear();
    }

    fn take_namespaces(&mut self, cluster: &Cluster) {
        let mut namespaces = BTreeMap::new();
        self.namespace_conditions.clear();
        for (name, namespace) in &cluster.namespaces {
            let mut bad = Vec::new();
            // Before a restart the mode was that of the pods.
            let last = self.namespaces.get(name).copied().or_else(|| {
                if self.saved.is_empty() {
                    return None;
                }
                let mode = cluster
                    .pods
                    .iter()
                    .filter(|pod| pod.namespace == *name)
                    .find_map(|pod| self.saved.get(&pod.uid))?
                    .mode;
                Some(NamespaceSettings::restored(mode))
            });
            namespaces.insert(
                name.clone(),
                settings::of_namespace(namespace, cluster.defaults, last, &mut bad),
            );
            if !bad.is_empty() {
                self.namespace_conditions.insert(name.clone(), bad);
            }
        }
        self.namespaces = namespaces;
        self.not_begun = cluster.cilium_encrypts.then(|| {
            let labelled = |(name, namespace): (&KubernetesName, &Arc<Namespace>)| {
                namespace.enrols().then(|| name.clone())
            };
            let labelled = cluster.namespaces.iter().filter_map(labelled).collect();
            (NotBegun::CiliumEncrypts, labelled)
        });
    }

    fn take_mesh(&mut self, cluster: &Cluster, version: u64) {
        let workloads = self.entries.values().map(|entry| &entry.workload);
        let own = workloads.filter(|workload| !workload.host_network);
        let addresses = (own.flat_map(|workload| &workload.addresses))
            .chain(self.services.iter().flat_map(|service| &service.addresses));
        let mut mesh = mesh(cluster, addresses.copied());
        mesh.epoch.resource_version = version;
        if let Some(last) = &self.mesh {
            let new = std::mem::replace(&mut mesh.epoch, last.epoch);
            if mesh == **last {
                return;
            }
            mesh.epoch = new;
        }
        self.changed = true;
        self.mesh = Some(Arc::new(mesh));
    }
}

/// Puts `new` in the place of `old`, keeping the `Arc`s of values that are the same; whether anything differs.
fn replace<T: PartialEq>(old: &mut Vec<Arc<T>>, new: Vec<Arc<T>>) -> bool {
    let mut changed = old.len() != new.len();
    let new = new
        .into_iter()
        .enumerate()
        .map(|(index, new)| match old.get(index) {
            Some(old) if *old == new => old.clone(),
            _ => {
                changed = true;
                new
            }
        })
        .collect();
    *old = new;
    changed
}
