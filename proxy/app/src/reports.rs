// SPDX-License-Identifier: Apache-2.0
//! What this proxy tells the controller.

use crate::pods::{PodState, Pods};
use podveil_ca_client::{ProgramCredentials, TrustBundle, WorkloadCertificates};
use podveil_identity::KubernetesName;
use podveil_model::{Epoch, Lookup, Stage, Uid};
use podveil_proto::podveil::node::v1::{Module, NodeReport, WorkloadCondition, WorkloadReport};
use podveil_reports::{Source, wire_epoch, wire_stage};
use podveil_state::{Need, StateHandle, Version};
use std::collections::BTreeSet;
use std::sync::Arc;
use tokio::sync::watch;

/// Everything that a report is made of.
#[derive(Clone, Debug)]
pub struct Reporter {
    node: KubernetesName,
    pods: Pods,
    state: StateHandle,
    credentials: ProgramCredentials,
    certificates: WorkloadCertificates,
    changes: Changes,
}

/// What a new report is due after.
#[derive(Clone, Debug)]
struct Changes {
    pods: watch::Receiver<u64>,
    state: watch::Receiver<u64>,
    /// Version of the addresses in use.
    in_use: watch::Receiver<Version>,
    bundle: watch::Receiver<Arc<TrustBundle>>,
}

impl Reporter {
    pub fn new(
        node: KubernetesName,
        pods: Pods,
        state: StateHandle,
        in_use: watch::Receiver<Version>,
        credentials: ProgramCredentials,
        certificates: WorkloadCertificates,
    ) -> Self {
        let changes = Changes {
            pods: pods.changes(),
            state: state.changed(),
            in_use,
            bundle: credentials.bundle(),
        };
        Self {
            node,
            pods,
            state,
            credentials,
            certificates,
            changes,
        }
    }
}

impl Source for Reporter {
    fn report(&self) -> NodeReport {
        let view = self.state.view();
        let pods = self.pods.states();
        let told: BTreeSet<&Uid> = pods.iter().map(|pod| &pod.uid).collect();
        // Wanted here, but not handed over: the controller should know why it waits.
        let awaited = view.workloads().filter(|workload| {
            workload.node == self.node
                && workload.stage.wants_capture()
                && !workload.host_network
                && !told.contains(&workload.uid)
        });
        let in_use = |uid: &Uid| view.by_uid(uid).map(|held| (held.stage, held.epoch));
        let workloads = pods
            .iter()
            .map(|pod| workload_report(pod, in_use(&pod.uid)))
            .chain(awaited.map(|workload| WorkloadReport {
                uid: workload.uid.to_string(),
                condition: WorkloadCondition::Pending.into(),
                reason: "it has not been handed over to the proxy yet".to_owned(),
                stage: wire_stage(workload.stage).into(),
                epoch: Some(wire_epoch(workload.epoch)),
                ..WorkloadReport::default()
            }))
            .collect();
        let credentials = self.credentials.current();
        let own = credentials.as_ref().map(|held| held.svid.generation());
        let lowest = [own, self.certificates.lowest_generation()]
            .into_iter()
            .flatten()
            .min();
        NodeReport {
            node: self.node.to_string(),
            module: Module::Proxy.into(),
            workloads,
            applied: view.mesh().map(|mesh| wire_epoch(mesh.epoch)),
            applied_version: match view.is_on_demand() {
                // It says nothing of what is not held here, so each workload is asked about.
                true => String::new(),
                false => (self.changes.in_use.borrow().as_deref())
                    .unwrap_or_default()
                    .to_owned(),
            },
            bundle_sequence: self.changes.bundle.borrow().sequence,
            certificate_generation: lowest.unwrap_or_default(),
            ..NodeReport::default()
        }
    }

    fn holds(&self, uid: &Uid, epoch: Epoch) -> bool {
        let view = self.state.view();
        let decided = view.is_decided(uid, epoch);
        if !decided && view.is_on_demand() {
            // Then no older decision about it is believed here, though it may soon be held no more.
            self.state.want(Lookup::Workload(uid.clone()), Need::Once);
        }
        decided
    }

    fn is_awaited(&self) -> bool {
        self.state.view().waits_for_nodes()
    }

    async fn changed(&mut self) {
        let changes = &mut self.changes;
        // A sender that is gone tells of no more changes; the interval goes on.
        tokio::select! {
            Ok(()) = changes.pods.changed() => {}
            Ok(()) = changes.state.changed() => {}
            Ok(()) = changes.in_use.changed() => {}
            Ok(()) = changes.bundle.changed() => {}
            else => std::future::pending().await,
        }
    }
}

fn workload_report(pod: &PodState, in_use: Option<(Stage, Epoch)>) -> WorkloadReport {
    let stage = in_use.map_or(Stage::None, |(stage, _)| stage);
    let (condition, reason) = match &pod.ready {
        Ok(()) => (WorkloadCondition::Ready, String::new()),
        Err(reason) => (WorkloadCondition::Pending, reason.to_string()),
    };
    WorkloadReport {
        uid: pod.uid.to_string(),
        condition: condition.into(),
        reason,
        connections_older: 0,
        connections_captured: pod.carried,
        started_uncaptured: false,
        stage: wire_stage(stage).into(),
        epoch: in_use.map(|(_, epoch)| wire_epoch(epoch)),
    }
}
