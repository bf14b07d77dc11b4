// SPDX-License-Identifier: Apache-2.0
//! A node: the programs' own xDS client, state and reports, without pods.

use crate::authorities::Authorities;
use anyhow::Context;
use podveil_ca_client::transport::channel;
use podveil_identity::ProgramIdentity;
use podveil_model::{Epoch, OriginalDst, Stage, Uid};
use podveil_proto::podveil::node::v1 as wire;
use podveil_reports::{Controllers, Replicas, Source, wire_epoch, wire_stage};
use podveil_state::{StateHandle, StateTask, Version, View};
use podveil_testing::answer_line;
use podveil_xds_client::{Batch, Client, Config, NodeInfo};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

/// Far above what any step takes; reached only when a state never comes.
const DEADLINE: Duration = Duration::from_secs(60);

pub struct Node {
    pub state: StateHandle,
    /// Resources that its control plane has sent so far.
    pub updates: Arc<AtomicUsize>,
    broken: watch::Sender<Option<(String, String)>>,
    _stop: DropGuard,
}

impl Node {
    /// Takes its configuration from `from`, reports to all of `to`, and captures every pod of its own at once.
    pub fn start(
        authorities: &Authorities,
        name: &str,
        from: SocketAddr,
        to: &[SocketAddr],
    ) -> Self {
        let identity = ProgramIdentity::Node(name.parse().expect("a name"));
        let credentials = authorities.credentials(&identity.spiffe_id(&authorities.trust_domain));
        let to_controller = |address: &SocketAddr| {
            channel(
                &address.to_string(),
                &credentials,
                ProgramIdentity::Controller,
            )
        };
        let stop = CancellationToken::new();
        let info = NodeInfo {
            node: name.to_owned(),
            ..NodeInfo::default()
        };
        let client = Client::start(to_controller(&from), Config::new(info), stop.clone());
        let (writer, state, words) = podveil_state::channel(false);
        let (in_use_tx, in_use) = watch::channel(None);
        let (counted, batches) = mpsc::channel(1);
        let updates = Arc::new(AtomicUsize::new(0));
        tokio::spawn(count(client.batches, counted, updates.clone()));
        let task = StateTask {
            writer,
            batches,
            demand: client.demand,
            words,
            on_demand: None,
            in_use: in_use_tx,
        };
        tokio::spawn(task.run(stop.clone()));
        let (broken, is_broken) = watch::channel(None);
        for module in [wire::Module::Proxy, wire::Module::Redirect] {
            let reporter = Reporter {
                node: name.to_owned(),
                module,
                state: state.clone(),
                changed: state.changed(),
                in_use: in_use.clone(),
                broken: is_broken.clone(),
            };
            let replicas = Replicas::fixed(to.iter().map(to_controller).collect());
            tokio::spawn(podveil_reports::run(
                replicas,
                reporter,
                Controllers::default(),
                stop.clone(),
            ));
        }
        Self {
            state,
            updates,
            broken,
            _stop: stop.drop_guard(),
        }
    }

    /// From now on redirect cannot capture this pod, and says why.
    pub fn breaks(&self, uid: &str, reason: &str) {
        self.broken
            .send_replace(Some((uid.to_owned(), reason.to_owned())));
    }

    pub fn mend(&self) {
        self.broken.send_replace(None);
    }

    pub fn updates(&self) -> usize {
        self.updates.load(Ordering::Relaxed)
    }

    /// Waits until all of these are so far.
    pub async fn reaches(&self, stage: Stage, uids: &[&str]) -> anyhow::Result<()> {
        let all = |view: &View| {
            let reached = uids.iter().all(|uid| {
                view.by_uid(&Uid::from(*uid))
                    .is_some_and(|one| one.stage == stage)
            });
            reached.then_some(())
        };
        let reached = self.state.wait(Instant::now() + DEADLINE, all).await;
        reached.with_context(|| {
            let view = self.state.view();
            let stages: Vec<_> = uids
                .iter()
                .map(|uid| view.by_uid(&Uid::from(*uid)).map(|one| one.stage))
                .collect();
            format!("{stage} is not reached: {stages:?}")
        })
    }

    /// Waits until a connection of this pod's would become `expected`, in the words of [`line`].
    pub async fn answers(&self, from: &str, to: &str, expected: &str) -> anyhow::Result<()> {
        let answered = Mutex::new(String::new());
        let from = Uid::from(from);
        let destination = OriginalDst(to.parse().with_context(|| to.to_owned())?);
        let look = |view: &View| {
            let source = view.by_uid(&from)?;
            let found = answer_line(view.resolve(source, destination));
            let same = found == expected;
            *answered.lock().expect("no panic") = found;
            same.then_some(())
        };
        let reached = self.state.wait(Instant::now() + DEADLINE, look).await;
        reached.with_context(|| {
            let answered = answered.lock().expect("no panic");
            format!("{to}: expected {expected:?}, last {answered:?}")
        })
    }
}

async fn count(
    mut batches: mpsc::Receiver<Batch>,
    counted: mpsc::Sender<Batch>,
    updates: Arc<AtomicUsize>,
) {
    while let Some(batch) = batches.recv().await {
        updates.fetch_add(batch.updates.len(), Ordering::Relaxed);
        if counted.send(batch).await.is_err() {
            return;
        }
    }
}

#[derive(Clone)]
struct Reporter {
    node: String,
    module: wire::Module,
    state: StateHandle,
    changed: watch::Receiver<u64>,
    in_use: watch::Receiver<Version>,
    broken: watch::Receiver<Option<(String, String)>>,
}

impl Source for Reporter {
    fn report(&self) -> wire::NodeReport {
        // What is in use is at least what this version says.
        let version = self
            .in_use
            .borrow()
            .as_deref()
            .unwrap_or_default()
            .to_owned();
        let view = self.state.view();
        let broken = self.broken.borrow().clone();
        let ours = view
            .workloads()
            .filter(|one| one.node.as_str() == self.node && one.stage != Stage::None);
        let workload = |one: &Arc<podveil_model::Workload>| {
            let uid = one.uid.to_string();
            let reason = broken
                .as_ref()
                .filter(|(broken, _)| self.module == wire::Module::Redirect && *broken == uid)
                .map(|(_, reason)| reason.clone());
            let condition = match reason {
                None => wire::WorkloadCondition::Ready,
                Some(_) => wire::WorkloadCondition::Pending,
            };
            wire::WorkloadReport {
                uid,
                condition: condition.into(),
                reason: reason.unwrap_or_default(),
                stage: wire_stage(one.stage).into(),
                epoch: Some(wire_epoch(one.epoch)),
                ..wire::WorkloadReport::default()
            }
        };
        wire::NodeReport {
            node: self.node.clone(),
            module: self.module.into(),
            workloads: ours.map(workload).collect(),
            applied_version: version,
            ..wire::NodeReport::default()
        }
    }

    fn holds(&self, uid: &Uid, epoch: Epoch) -> bool {
        let view = self.state.view();
        view.by_uid(uid).is_some_and(|held| held.epoch >= epoch)
    }

    fn is_awaited(&self) -> bool {
        self.state.view().waits_for_nodes()
    }

    async fn changed(&mut self) {
        tokio::select! {
            Ok(()) = self.changed.changed() => {}
            Ok(()) = self.in_use.changed() => {}
            Ok(()) = self.broken.changed() => {}
            else => std::future::pending().await,
        }
    }
}
