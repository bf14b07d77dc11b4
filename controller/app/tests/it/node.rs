// SPDX-License-Identifier: Apache-2.0
//! A node by script: puts everything it is sent in use at once and reports it, with both modules.

use crate::fixture::{DEADLINE, Fixture};
use podveil_identity::ProgramIdentity;
use podveil_model::{Epoch, Stage, Workload};
use podveil_proto::podveil::node::v1 as wire;
use podveil_proto::podveil::node::v1::reports_client::ReportsClient;
use podveil_xds_client::{Batch, Client, Config, NodeInfo, ResourceType, Update};
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::transport::Channel;

/// Every state of each workload, in the order it came.
type Seen = BTreeMap<String, Vec<Arc<Workload>>>;

pub struct Node {
    seen: watch::Receiver<Seen>,
    _stop: DropGuard,
}

impl Node {
    /// `ready`: workloads here that both modules hold ready from the start.
    pub fn start(fixture: &Fixture, name: &str, ready: &[&str]) -> Self {
        let channel = fixture.channel(&ProgramIdentity::Node(name.parse().unwrap()));
        let stop = CancellationToken::new();
        let info = NodeInfo {
            node: name.to_owned(),
            ..NodeInfo::default()
        };
        let client = Client::start(channel.clone(), Config::new(info), stop.clone());
        let (seen_in, seen) = watch::channel(Seen::new());
        let reports = [wire::Module::Proxy, wire::Module::Redirect]
            .map(|module| Reports::start(channel.clone(), name, module, ready));
        let task = follow(client, seen_in, reports);
        let stopped = stop.clone();
        tokio::spawn(async move { stopped.run_until_cancelled(task).await });
        Self {
            seen,
            _stop: stop.drop_guard(),
        }
    }

    /// Waits for a state of this workload.
    pub async fn until(&mut self, uid: &str, state: impl Fn(&Workload) -> bool) -> Arc<Workload> {
        let newest = |seen: &Seen| seen.get(uid)?.last().cloned();
        let reached = self
            .seen
            .wait_for(|seen| newest(seen).is_some_and(|workload| state(&workload)));
        let seen = tokio::time::timeout(DEADLINE, reached)
            .await
            .unwrap()
            .unwrap();
        newest(&seen).unwrap()
    }

    pub fn stages(&self, uid: &str) -> Vec<Stage> {
        self.all(uid)
            .iter()
            .map(|workload| workload.stage)
            .collect()
    }

    pub fn epochs(&self, uid: &str) -> Vec<Epoch> {
        self.all(uid)
            .iter()
            .map(|workload| workload.epoch)
            .collect()
    }

    fn all(&self, uid: &str) -> Vec<Arc<Workload>> {
        self.seen.borrow().get(uid).cloned().unwrap_or_default()
    }
}

async fn follow(mut client: Client, seen: watch::Sender<Seen>, reports: [Reports; 2]) {
    while let Some(batch) = client.batches.recv().await {
        let Batch {
            resource_type,
            version,
            updates,
            rejected,
            acknowledge,
        } = batch;
        assert!(rejected.is_empty(), "{rejected:?}");
        for update in updates {
            if let Update::Workload(workload) = update {
                seen.send_modify(|seen| {
                    seen.entry(workload.uid.to_string())
                        .or_default()
                        .push(workload);
                });
            }
        }
        acknowledge.in_use();
        if resource_type == ResourceType::Address {
            for reports in &reports {
                reports.send(&version).await;
            }
        }
    }
}

struct Reports {
    template: wire::NodeReport,
    stream: mpsc::Sender<wire::NodeReport>,
}

impl Reports {
    fn start(channel: Channel, node: &str, module: wire::Module, ready: &[&str]) -> Self {
        let (stream, reports) = mpsc::channel(4);
        tokio::spawn(async move {
            let mut client = ReportsClient::new(channel);
            let Ok(answers) = client.report(ReceiverStream::new(reports)).await else {
                return;
            };
            let mut answers = answers.into_inner();
            while let Ok(Some(_)) = answers.message().await {}
        });
        let workload = |uid: &&str| wire::WorkloadReport {
            uid: (*uid).to_owned(),
            condition: wire::WorkloadCondition::Ready.into(),
            ..wire::WorkloadReport::default()
        };
        Self {
            template: wire::NodeReport {
                node: node.to_owned(),
                module: module.into(),
                workloads: ready.iter().map(workload).collect(),
                ..wire::NodeReport::default()
            },
            stream,
        }
    }

    async fn send(&self, version: &str) {
        let report = wire::NodeReport {
            applied_version: version.to_owned(),
            ..self.template.clone()
        };
        let _ = self.stream.send(report).await;
    }
}
