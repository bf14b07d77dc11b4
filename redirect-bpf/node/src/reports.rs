// SPDX-License-Identifier: Apache-2.0
//! What this module tells the controller.

use crate::{PodCondition, PodStatus, Status};
use podveil_ca_client::{ProgramCredentials, TrustBundle};
use podveil_identity::KubernetesName;
use podveil_model::{Epoch, Stage, Uid};
use podveil_proto::podveil::node::v1::{Module, NodeReport, WorkloadCondition, WorkloadReport};
use podveil_reports::{Source, wire_epoch, wire_stage};
use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};
use tokio::sync::watch;

/// Where each workload stands in the configuration that every fence here has in use.
#[derive(Clone, Debug, Default)]
pub struct InUse(Arc<RwLock<Table>>);

#[derive(Debug, Default)]
struct Table {
    workloads: HashMap<Uid, (Stage, Epoch)>,
    /// How many of them are at a stage that waits for nodes.
    waiting: usize,
}

/// A workload as it is from now on; `None`: it is gone.
pub type Change = (Uid, Option<(Stage, Epoch)>);

impl InUse {
    pub fn change(&self, changes: Vec<Change>) {
        let mut table = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let waits =
            |state: Option<(Stage, Epoch)>| state.is_some_and(|(stage, _)| stage.waits_for_nodes());
        for (uid, state) in changes {
            let before = match state {
                Some(state) => table.workloads.insert(uid, state),
                None => table.workloads.remove(&uid),
            };
            table.waiting += usize::from(waits(state));
            table.waiting -= usize::from(waits(before));
        }
    }

    fn waits_for_nodes(&self) -> bool {
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .waiting
            > 0
    }

    fn of(&self, uid: &Uid) -> Option<(Stage, Epoch)> {
        let table = self.0.read().unwrap_or_else(PoisonError::into_inner);
        table.workloads.get(uid).copied()
    }
}

/// Everything that a report is made of.
#[derive(Clone)]
pub struct Reporter {
    pub node: KubernetesName,
    pub credentials: ProgramCredentials,
    pub bundle: watch::Receiver<Arc<TrustBundle>>,
    pub status: watch::Receiver<Status>,
    pub in_use: InUse,
}

impl Source for Reporter {
    fn report(&self) -> NodeReport {
        let status = self.status.borrow();
        NodeReport {
            node: self.node.to_string(),
            module: Module::Redirect.into(),
            workloads: (status.pods.iter())
                .map(|pod| workload_report(pod, self.in_use.of(&pod.uid)))
                .collect(),
            applied_version: status.applied_version.to_string(),
            bundle_sequence: self.bundle.borrow().sequence,
            certificate_generation: self.credentials.lowest_generation(),
            ..NodeReport::default()
        }
    }

    fn holds(&self, uid: &Uid, epoch: Epoch) -> bool {
        self.in_use.of(uid).is_some_and(|(_, held)| held >= epoch)
    }

    fn is_awaited(&self) -> bool {
        self.in_use.waits_for_nodes()
    }

    async fn changed(&mut self) {
        // A sender that is gone tells of no more changes.
        tokio::select! {
            Ok(()) = self.status.changed() => {}
            Ok(()) = self.bundle.changed() => {}
            else => std::future::pending().await,
        }
    }
}

fn workload_report(pod: &PodStatus, in_use: Option<(Stage, Epoch)>) -> WorkloadReport {
    let condition = match pod.condition {
        PodCondition::Pending => WorkloadCondition::Pending,
        PodCondition::Ready => WorkloadCondition::Ready,
        PodCondition::Releasing => WorkloadCondition::Releasing,
        PodCondition::Released => WorkloadCondition::Released,
    };
    let stage = in_use.map_or(Stage::None, |(stage, _)| stage);
    WorkloadReport {
        uid: pod.uid.to_string(),
        condition: condition.into(),
        reason: pod.reason.to_string(),
        connections_older: pod.older.try_into().unwrap_or(u32::MAX),
        connections_captured: pod.captured.try_into().unwrap_or(u32::MAX),
        started_uncaptured: pod.started_uncaptured,
        stage: wire_stage(stage).into(),
        epoch: in_use.map(|(_, epoch)| wire_epoch(epoch)),
    }
}
