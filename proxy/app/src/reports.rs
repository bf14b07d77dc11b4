// SPDX-License-Identifier: Apache-2.0
//! What this proxy tells the controller: its whole state, on each change and at least every [`INTERVAL`].
//!
//! A stream that ends is opened again with a growing wait; nothing is queued meanwhile, since each report replaces the
//! one before it.

use crate::backoff::Backoff;
use crate::pods::{PodState, Pods};
use podveil_ca_client::{ProgramCredentials, WorkloadCertificates};
use podveil_identity::KubernetesName;
use podveil_model::Uid;
use podveil_proto::podveil::node::v1::reports_client::ReportsClient;
use podveil_proto::podveil::node::v1::{
    Epoch, Module, NodeReport, ReportReceived, WorkloadCondition, WorkloadReport,
};
use podveil_state::{StateHandle, Version};
use std::collections::BTreeSet;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

/// The controller takes a node for silent after 10 s.
const INTERVAL: Duration = Duration::from_secs(3);
const FIRST_RETRY: Duration = Duration::from_millis(50);
const LAST_RETRY: Duration = Duration::from_secs(5);
/// The controller answers each report; past this the stream is taken for dead.
const ANSWER_BOUND: Duration = Duration::from_secs(10);

/// Everything that a report is made of.
#[derive(Clone, Debug)]
pub struct Reporter {
    pub node: KubernetesName,
    pub pods: Pods,
    pub state: StateHandle,
    /// Version of the addresses in use.
    pub in_use: watch::Receiver<Version>,
    pub credentials: ProgramCredentials,
    pub certificates: WorkloadCertificates,
}

impl Reporter {
    /// Reports over `channel` until `stop`.
    pub async fn run(
        mut self,
        channel: Channel,
        connected: prometheus::IntGauge,
        stop: CancellationToken,
    ) {
        let mut backoff = Backoff::new(FIRST_RETRY, LAST_RETRY);
        let mut sequence = 0;
        let report = async {
            // Without a certificate there is no link to report over.
            self.credentials.ready().await;
            loop {
                let before = sequence;
                let ended = self
                    .stream(channel.clone(), &mut sequence, &connected)
                    .await;
                connected.set(0);
                if sequence > before + 1 {
                    backoff.reset();
                }
                let wait = backoff.next_wait();
                let retry_ms = wait.as_millis() as u64;
                let (code, reason) = (ended.code(), ended.message());
                tracing::warn!(
                    ?code,
                    reason,
                    retry_ms,
                    "no report stream to the controller"
                );
                tokio::time::sleep(wait).await;
            }
        };
        let _stopped: Option<()> = stop.run_until_cancelled(report).await;
    }

    /// One stream, until it ends; the reason why.
    async fn stream(
        &mut self,
        channel: Channel,
        sequence: &mut u64,
        connected: &prometheus::IntGauge,
    ) -> Status {
        let (reports, outgoing) = mpsc::channel(1);
        let mut changes = Changes::of(self);
        *sequence += 1;
        // The first report goes before the answer's headers are waited for: the controller may want it first.
        if reports.try_send(self.report(*sequence)).is_err() {
            return Status::internal("the report stream was closed before it began");
        }
        let mut client = ReportsClient::new(channel);
        let opening = client.report(ReceiverStream::new(outgoing));
        let mut answers = match tokio::time::timeout(ANSWER_BOUND, opening).await {
            Ok(Ok(response)) => response.into_inner(),
            Ok(Err(status)) => return status,
            Err(_) => return Status::deadline_exceeded("the controller did not answer"),
        };
        connected.set(1);
        loop {
            // Change or interval, whatever comes first; or the end of the stream.
            let deadline = tokio::time::Instant::now() + INTERVAL;
            let wait = tokio::time::timeout_at(deadline, changes.next());
            tokio::select! {
                _changed_or_due = wait => {}
                status = ended(&mut answers) => return status,
            }
            *sequence += 1;
            let report = self.report(*sequence);
            match tokio::time::timeout(ANSWER_BOUND, reports.send(report)).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return Status::unavailable("the stream was closed"),
                Err(_) => return Status::deadline_exceeded("the controller takes no reports"),
            }
        }
    }

    fn report(&self, sequence: u64) -> NodeReport {
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
        let workloads = pods
            .iter()
            .map(workload_report)
            .chain(awaited.map(|workload| WorkloadReport {
                uid: workload.uid.to_string(),
                condition: WorkloadCondition::Pending.into(),
                reason: "it has not been handed over to the proxy yet".to_owned(),
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
            sequence,
            workloads,
            applied: view.mesh().map(|mesh| Epoch {
                resource_version: mesh.epoch.resource_version,
                stage: mesh.epoch.stage,
            }),
            applied_version: self
                .in_use
                .borrow()
                .as_deref()
                .unwrap_or_default()
                .to_owned(),
            bundle_sequence: self.credentials.bundle().borrow().sequence,
            certificate_generation: lowest.unwrap_or_default(),
        }
    }
}

fn workload_report(pod: &PodState) -> WorkloadReport {
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
    }
}

/// Why the controller ended the stream. CANCEL: no answer is lost that anyone reads.
async fn ended(answers: &mut Streaming<ReportReceived>) -> Status {
    loop {
        match answers.message().await {
            Ok(Some(ReportReceived { .. })) => {}
            Ok(None) => return Status::unavailable("the controller ended the stream"),
            Err(status) => return status,
        }
    }
}

/// What a new report is due after. Taken before the report that it follows, so that no change falls in between.
struct Changes {
    pods: watch::Receiver<u64>,
    state: watch::Receiver<u64>,
    in_use: watch::Receiver<Version>,
    bundle: watch::Receiver<std::sync::Arc<podveil_ca_client::TrustBundle>>,
}

impl Changes {
    fn of(reporter: &Reporter) -> Self {
        let mut changes = Self {
            pods: reporter.pods.changes(),
            state: reporter.state.changed(),
            in_use: reporter.in_use.clone(),
            bundle: reporter.credentials.bundle(),
        };
        changes.in_use.mark_unchanged();
        changes
    }

    async fn next(&mut self) {
        // A sender that is gone tells of no more changes; the interval goes on.
        tokio::select! {
            Ok(()) = self.pods.changed() => {}
            Ok(()) = self.state.changed() => {}
            Ok(()) = self.in_use.changed() => {}
            Ok(()) = self.bundle.changed() => {}
            else => std::future::pending().await,
        }
    }
}
