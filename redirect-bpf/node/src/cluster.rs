// SPDX-License-Identifier: Apache-2.0
use crate::cni::Namespaces;
use crate::reports::Change;
use podveil_cni::wire::Request;
use podveil_identity::KubernetesName;
use podveil_model::{Uid, Workload};
use podveil_plan::Fence;
use podveil_xds_client::Update;
use std::collections::BTreeMap;
use std::sync::Arc;

/// What this module needs of the cluster's state.
#[derive(Debug)]
pub struct Cluster {
    node: KubernetesName,
    workloads: BTreeMap<Uid, Arc<Workload>>,
    namespaces: Arc<Namespaces>,
}

impl Cluster {
    pub fn new(node: KubernetesName, namespaces: Arc<Namespaces>) -> Self {
        Self {
            node,
            workloads: BTreeMap::new(),
            namespaces,
        }
    }

    /// Takes one update; says what it changes, and whether fences may follow from it. A decision about a workload that is older than the one held is passed over:
    /// a replica that lags cannot take anybody out.
    pub fn update(&mut self, update: &Update) -> Option<(Change, bool)> {
        let is_fenced = |workload: &Arc<Workload>| workload.stage.is_announced();
        match update {
            Update::Workload(workload) => {
                let workload = match self.workloads.get(&workload.uid) {
                    Some(held) if held.epoch > workload.epoch => {
                        tracing::debug!(uid = %workload.uid, held = %held.epoch, got = %workload.epoch, "an older decision about a workload is passed over");
                        Arc::new(workload.decided_as(held.decision()))
                    }
                    _ => workload.clone(),
                };
                let (uid, decided) = (workload.uid.clone(), (workload.stage, workload.epoch));
                let fence = is_fenced(&workload);
                let held = self.workloads.insert(uid.clone(), workload);
                let fence = fence || held.as_ref().is_some_and(is_fenced);
                Some(((uid, Some(decided)), fence))
            }
            Update::AddressRemoved(name) => {
                let uid = Uid(name.clone());
                let held = self.workloads.remove(&uid)?;
                Some(((uid, None), is_fenced(&held)))
            }
            Update::Mesh(mesh) => {
                Arc::make_mut(&mut self.namespaces).take(mesh);
                None
            }
            // Nothing is asked for here: fences are of everybody.
            Update::Forgotten(_)
            | Update::Found(_)
            | Update::NotFound(_)
            | Update::Policy { .. }
            | Update::PolicyRemoved(_)
            | Update::Service(_)
            | Update::Unasked(_) => None,
        }
    }

    pub fn namespaces(&self) -> &Arc<Namespaces> {
        &self.namespaces
    }

    pub fn fence(&self) -> Fence {
        Fence::of(self.workloads.values().map(Arc::as_ref))
    }

    /// The pods of this node.
    pub fn local(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads
            .values()
            .filter(|workload| workload.node == self.node && !workload.host_network)
    }

    /// The pod that the CNI plugin asks about, by the UID that its kubelet has for it. A pod from a file has another one than
    /// the API server's; whoever makes a pod can claim that one, but not the name that the kubelet says with it.
    pub fn asked_about(&self, request: &Request) -> Option<&Arc<Workload>> {
        let uid = Uid::from(request.uid.as_str());
        let is_from_file = |workload: &&Arc<Workload>| {
            workload.node_uid.as_ref() == Some(&uid)
                && workload.identity.namespace.as_str() == request.namespace
                && *workload.name == *request.pod
        };
        (self.workloads.get(&uid)).or_else(|| self.local().find(is_from_file))
    }

    pub fn local_by_uid(&self, uid: &Uid) -> Option<&Arc<Workload>> {
        let workload = self.workloads.get(uid)?;
        (workload.node == self.node && !workload.host_network).then_some(workload)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use podveil_cni::wire::About;
    use podveil_model::Stage;
    use podveil_testing::workload;

    #[test]
    fn a_pod_from_a_file_is_found_by_its_kubelets_uid_and_name_for_it_on_its_own_node_only() {
        let mut cluster = Cluster::new("node-1".parse().unwrap(), Arc::default());
        // The first two say that they are the same pod of the node, as the third one is.
        for (uid, namespace, name, node, node_uid) in [
            ("1-other-name", "system", "other", "node-1", "hash"),
            ("2-other-namespace", "shop", "etched", "node-1", "hash"),
            ("3-etched", "system", "etched", "node-1", "hash"),
            ("4-elsewhere", "system", "far", "node-2", "hash-of-far"),
        ] {
            let mut workload = Workload::clone(&workload(uid).node(node).build());
            workload.identity.namespace = namespace.parse().unwrap();
            workload.name = name.into();
            workload.node_uid = Some(node_uid.into());
            cluster.update(&Update::Workload(workload.into()));
        }
        let asked = |uid: &str, pod: &str| {
            let request = Request {
                about: About::Start,
                namespace: "system".into(),
                pod: pod.into(),
                uid: uid.into(),
                sandbox: "s".into(),
                addresses: Vec::new(),
            };
            let found = cluster.asked_about(&request);
            found.map(|workload| workload.uid.to_string())
        };
        assert_eq!(asked("hash", "etched").unwrap(), "3-etched");
        assert_eq!(asked("3-etched", "etched").unwrap(), "3-etched");
        assert_eq!(asked("hash", "none-of-this-name"), None);
        assert_eq!(asked("hash-of-far", "far"), None);
    }

    #[test]
    fn fences_follow_from_those_who_are_announced_or_were() {
        let mut cluster = Cluster::new("node-1".parse().unwrap(), Arc::default());
        for (step, stage, fence) in [
            (1, Stage::Wanted, false),
            (2, Stage::Capturable, false),
            (3, Stage::Announced, true),
            (4, Stage::Mandatory, true),
            (5, Stage::Draining, true),
            (6, Stage::None, true),
            (7, Stage::Wanted, false),
        ] {
            let workload = workload("web-1").stage(stage).epoch(7, step).build();
            let decided = (stage, workload.epoch);
            let told = cluster.update(&Update::Workload(workload));
            let uid = Uid::from("web-1");
            assert_eq!(told, Some(((uid, Some(decided)), fence)), "{stage}");
        }
        let removed = Update::AddressRemoved("web-1".into());
        assert_eq!(
            cluster.update(&removed),
            Some((("web-1".into(), None), false))
        );
        assert_eq!(cluster.update(&removed), None);
    }
}
