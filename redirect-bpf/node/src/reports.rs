// SPDX-License-Identifier: Apache-2.0
//! What this module tells the controller: its whole state, on each change and at least every [`INTERVAL`].

use crate::work::chain;
use crate::{PodCondition, PodStatus, Status};
use podveil_ca_client::ProgramCredentials;
use podveil_identity::KubernetesName;
use podveil_proto::podveil::node::v1::reports_client::ReportsClient;
use podveil_proto::podveil::node::v1::{Module, NodeReport, WorkloadCondition, WorkloadReport};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

/// The controller takes a node for silent after 10 s.
const INTERVAL: Duration = Duration::from_secs(3);
const FIRST_RETRY: Duration = Duration::from_millis(50);
const LAST_RETRY: Duration = Duration::from_secs(5);
/// The controller answers each report; past this the stream is taken for dead.
const ANSWER_BOUND: Duration = Duration::from_secs(10);

pub struct Reporter {
    pub node: KubernetesName,
    pub credentials: ProgramCredentials,
    pub status: watch::Receiver<Status>,
}

impl Reporter {
    /// Reports over `channel` until `stop`.
    pub async fn run(mut self, channel: Channel, stop: CancellationToken) {
        let mut sequence = 0;
        let report = async {
            let mut pause = FIRST_RETRY;
            loop {
                let before = sequence;
                let ended = self.stream(channel.clone(), &mut sequence).await;
                if sequence > before + 1 {
                    pause = FIRST_RETRY;
                }
                let wait = pause.mul_f64(rand::random_range(0.5..=1.0));
                pause = (pause * 2).min(LAST_RETRY);
                let retry_ms = wait.as_millis() as u64;
                tracing::warn!(reason = %chain(&ended), retry_ms, "no report stream to the controller");
                tokio::time::sleep(wait).await;
            }
        };
        let _stopped: Option<()> = stop.run_until_cancelled(report).await;
    }

    /// One stream, until it ends; the reason why.
    async fn stream(&mut self, channel: Channel, sequence: &mut u64) -> tonic::Status {
        let closed = || tonic::Status::unavailable("the stream was closed");
        let (reports, outgoing) = mpsc::channel(1);
        *sequence += 1;
        // Before the answer's headers are waited for: the controller wants it first.
        if reports.try_send(self.report(*sequence)).is_err() {
            return closed();
        }
        let mut client = ReportsClient::new(channel);
        let opening = client.report(ReceiverStream::new(outgoing));
        let mut answers = match tokio::time::timeout(ANSWER_BOUND, opening).await {
            Ok(Ok(response)) => response.into_inner(),
            Ok(Err(status)) => return status,
            Err(_) => return tonic::Status::deadline_exceeded("the controller did not answer"),
        };
        loop {
            let mut bundle = self.credentials.bundle();
            bundle.borrow_and_update();
            let due = tokio::time::sleep(INTERVAL);
            tokio::pin!(due);
            loop {
                tokio::select! {
                    changed = self.status.changed() => match changed {
                        Ok(()) => break,
                        Err(_) => return tonic::Status::cancelled("the module stops"),
                    },
                    Ok(()) = bundle.changed() => break,
                    () = &mut due => break,
                    answer = answers.message() => match answer {
                        Ok(Some(_)) => {}
                        Ok(None) => return tonic::Status::unavailable("the controller ended the stream"),
                        Err(status) => return status,
                    },
                }
            }
            *sequence += 1;
            let report = self.report(*sequence);
            match tokio::time::timeout(ANSWER_BOUND, reports.send(report)).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return closed(),
                Err(_) => {
                    return tonic::Status::deadline_exceeded("the controller takes no reports");
                }
            }
        }
    }

    fn report(&mut self, sequence: u64) -> NodeReport {
        let status = self.status.borrow_and_update();
        NodeReport {
            node: self.node.to_string(),
            module: Module::Redirect.into(),
            sequence,
            workloads: status.pods.iter().map(workload_report).collect(),
            applied: None,
            applied_version: status.applied_version.to_string(),
            bundle_sequence: self.credentials.bundle().borrow().sequence,
            certificate_generation: self.credentials.lowest_generation(),
        }
    }
}

fn workload_report(pod: &PodStatus) -> WorkloadReport {
    let condition = match pod.condition {
        PodCondition::Pending => WorkloadCondition::Pending,
        PodCondition::Ready => WorkloadCondition::Ready,
        PodCondition::Releasing => WorkloadCondition::Releasing,
        PodCondition::Released => WorkloadCondition::Released,
    };
    WorkloadReport {
        uid: pod.uid.to_string(),
        condition: condition.into(),
        reason: pod.reason.to_string(),
        connections_older: pod.older.try_into().unwrap_or(u32::MAX),
        connections_captured: pod.captured.try_into().unwrap_or(u32::MAX),
    }
}
