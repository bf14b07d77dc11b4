// SPDX-License-Identifier: Apache-2.0
//! A state of the cluster taken into the index.

use super::Index;
use crate::Module;
use crate::NotBegun;
use crate::difference::Difference;
use crate::entry::{Entry, Parts};
use crate::letting_go;
use crate::mesh::mesh;
use crate::resolve::{self, Derived, Resolved, resolve};
use crate::settings::{self, NamespaceSettings};
use foldhash::{HashMap, HashSet};
use podveil_identity::KubernetesName;
use podveil_model::{EndpointPorts, Uid};
use podveil_source::{Cluster, Namespace, Pod};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

impl Index {
    /// Takes a new state of the cluster, whole. A pod that is gone is gone at once.
    ///
    /// Costs as much as differs from the last one where nobody's addresses do, else as much as the cluster is large.
    pub fn apply(&mut self, now: Instant, cluster: &Arc<Cluster>) {
        let version = cluster.version.max(self.version);
        self.version = version;
        let last = self.applied.replace(cluster.clone());
        let difference = last
            .as_deref()
            .and_then(|last| Difference::between(last, cluster));
        match difference {
            Some(difference) => self.take_difference(cluster, version, &difference),
            None => self.take_all(now, cluster, version),
        }
    }

    fn take_difference(&mut self, cluster: &Cluster, version: u64, difference: &Difference<'_>) {
        // Those that are finished have none.
        let entry = |uid: &Uid| self.entries.get(uid);
        let mut touched: BTreeMap<&Uid, (Arc<Pod>, Derived)> = BTreeMap::new();
        for pod in &difference.pods {
            if let Some(entry) = entry(&pod.uid) {
                let now = (Arc::clone(pod), entry.derived().clone());
                touched.insert(&pod.uid, now);
            }
        }
        for moved in &difference.services {
            let key = resolve::key(moved.service);
            for (uid, ports) in &moved.pods {
                let Some(entry) = entry(uid) else {
                    continue;
                };
                let (_, derived) = (touched.entry(uid))
                    .or_insert_with(|| (entry.pod().clone(), entry.derived().clone()));
                let services = Arc::make_mut(&mut derived.services);
                match ports {
                    Some(ports) => services.insert(key.clone(), EndpointPorts::clone(ports)),
                    None => services.remove(&key),
                };
            }
        }
        for (_, derived) in touched.values_mut() {
            // Nearly all endpoints of a service stand behind it alone, and share that.
            let others = (difference.services.iter())
                .flat_map(|moved| moved.pods_behind().take(2))
                .filter_map(entry);
            let like = others
                .map(|other| &other.derived().services)
                .find(|services| **services == derived.services);
            if let Some(services) = like {
                derived.services = services.clone();
            }
        }
        let nothing = Arc::new(Namespace::default());
        for (pod, derived) in touched.into_values() {
            let parts = Parts {
                cluster,
                pod: &pod,
                node: cluster.nodes.get(&pod.node),
                namespace: cluster.namespaces.get(&pod.namespace).unwrap_or(&nothing),
                namespace_settings: (self.namespaces.get(&pod.namespace).copied())
                    .unwrap_or_default(),
                derived,
                lift: version.saturating_sub(cluster.version),
            };
            self.take_pod(parts, version);
        }
    }

    fn take_all(&mut self, now: Instant, cluster: &Cluster, version: u64) {
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
            self.take_pod(parts, version);
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

    fn take_pod(&mut self, parts: Parts<'_>, version: u64) {
        let pod = parts.pod;
        if (self.entries.get(&pod.uid)).is_some_and(|last| last.is_made_of(&parts)) {
            return;
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
