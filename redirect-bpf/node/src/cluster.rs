// SPDX-License-Identifier: Apache-2.0
use crate::reports::Change;
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
}

impl Cluster {
    pub fn new(node: KubernetesName) -> Self {
        Self {
            node,
            workloads: BTreeMap::new(),
        }
    }

    /// Takes one update; says what it changes. A decision about a workload that is older than the one held is passed over:
    /// a replica that lags cannot take anybody out.
    pub fn update(&mut self, update: &Update) -> Option<Change> {
        match update {
            Update::Workload(workload) => {
                let workload = match self.workloads.get(&workload.uid) {
                    Some(held) if held.epoch > workload.epoch => {
                        tracing::debug!(uid = %workload.uid, held = %held.epoch, got = %workload.epoch, "an older decision about a workload is passed over");
                        Arc::new(workload.decided_as(held))
                    }
                    _ => workload.clone(),
                };
                let (uid, decided) = (workload.uid.clone(), (workload.stage, workload.epoch));
                self.workloads.insert(uid.clone(), workload);
                Some((uid, Some(decided)))
            }
            Update::AddressRemoved(name) => {
                let uid = Uid(name.clone());
                self.workloads.remove(&uid).map(|_| (uid, None))
            }
            Update::Service(_)
            | Update::Policy { .. }
            | Update::PolicyRemoved(_)
            | Update::Mesh(_)
            | Update::NotFound(_) => None,
        }
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

    pub fn local_by_uid(&self, uid: &Uid) -> Option<&Arc<Workload>> {
        let workload = self.workloads.get(uid)?;
        (workload.node == self.node && !workload.host_network).then_some(workload)
    }
}
