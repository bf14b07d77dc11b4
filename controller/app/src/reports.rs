// SPDX-License-Identifier: Apache-2.0
//! The nodes' reports: one stream from each program of a node, each message its full state.

use crate::caller;
use crate::keeper::Event;
use podveil_identity::KubernetesName;
use podveil_index::{Condition, Module, Report, WorkloadReport};
use podveil_model::Uid;
use podveil_proto::podveil::node::v1 as wire;
use podveil_proto::podveil::node::v1::reports_server::{Reports, ReportsServer};
use podveil_xds_server::Publisher;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

/// A node holds a few hundred pods; this many is far above.
const MAX_WORKLOADS: usize = 4096;
/// A reason is one sentence; the rest of a longer one is cut off.
const MAX_REASON_CHARS: usize = 256;
const MAX_MESSAGE_BYTES: usize = 8 << 20;

/// Hands what nodes say to the keeper.
#[derive(Debug)]
pub(crate) struct ReportService {
    publisher: Publisher,
    events: mpsc::Sender<Event>,
    stop: CancellationToken,
}

impl ReportService {
    pub(crate) fn server(
        publisher: Publisher,
        events: mpsc::Sender<Event>,
        stop: CancellationToken,
    ) -> ReportsServer<Self> {
        ReportsServer::new(Self {
            publisher,
            events,
            stop,
        })
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
    }
}

#[tonic::async_trait]
impl Reports for ReportService {
    type ReportStream = ReceiverStream<Result<wire::ReportReceived, Status>>;

    async fn report(
        &self,
        request: Request<Streaming<wire::NodeReport>>,
    ) -> Result<Response<Self::ReportStream>, Status> {
        let node = caller::node(request.extensions())?;
        let (received, answers) = mpsc::channel(1);
        let mut stream = Stream {
            node,
            module: None,
            reports: request.into_inner(),
            publisher: self.publisher.clone(),
            events: self.events.clone(),
        };
        let stop = self.stop.clone();
        tokio::spawn(async move {
            // CANCEL: `serve` may be dropped at any await; the keeper then still learns of the end, below.
            let end = tokio::select! {
                () = stop.cancelled() => Err(Status::unavailable("the controller is stopping")),
                () = received.closed() => Ok(()),
                end = stream.serve(&received) => end,
            };
            stream.end().await;
            if let Err(status) = end {
                // A full queue means that the node does not listen; the stream's end tells it as well.
                let _ = received.try_send(Err(status));
            }
        });
        Ok(Response::new(ReceiverStream::new(answers)))
    }
}

/// One stream, as its task holds it.
struct Stream {
    node: KubernetesName,
    /// From the first report on.
    module: Option<Module>,
    reports: Streaming<wire::NodeReport>,
    publisher: Publisher,
    events: mpsc::Sender<Event>,
}

impl Stream {
    async fn serve(
        &mut self,
        received: &mpsc::Sender<Result<wire::ReportReceived, Status>>,
    ) -> Result<(), Status> {
        while let Some(report) = self.reports.message().await? {
            let sequence = report.sequence;
            let module = self.check(&report)?;
            if self.module.is_none() {
                self.tell(Event::Connected {
                    node: self.node.clone(),
                    module,
                })
                .await?;
                self.module = Some(module);
                tracing::info!(node = %self.node, %module, "reports begin");
            }
            let report = parse(report, &self.publisher);
            self.tell(Event::Reported {
                node: self.node.clone(),
                module,
                report,
            })
            .await?;
            if received
                .send(Ok(wire::ReportReceived { sequence }))
                .await
                .is_err()
            {
                return Ok(());
            }
        }
        Ok(())
    }

    /// A node speaks for itself only, and one stream for one of its programs.
    fn check(&self, report: &wire::NodeReport) -> Result<Module, Status> {
        if report.node != self.node.as_str() {
            return Err(Status::permission_denied(format!(
                "{} reports for itself only",
                self.node
            )));
        }
        if report.workloads.len() > MAX_WORKLOADS {
            return Err(Status::resource_exhausted("more workloads than a node has"));
        }
        let module = match report.module() {
            wire::Module::Proxy => Module::Proxy,
            wire::Module::Redirect => Module::Redirect,
            wire::Module::Unspecified => {
                return Err(Status::invalid_argument("no module is named"));
            }
        };
        match self.module {
            Some(first) if first != module => Err(Status::invalid_argument(
                "a stream is of one module from its first report on",
            )),
            _ => Ok(module),
        }
    }

    /// Waits while the keeper is behind: then the node's reports wait, each of which replaces the one before.
    async fn tell(&self, event: Event) -> Result<(), Status> {
        self.events
            .send(event)
            .await
            .map_err(|_| Status::unavailable("the controller is stopping"))
    }

    async fn end(&self) {
        let Some(module) = self.module else { return };
        let node = self.node.clone();
        tracing::info!(%node, %module, "reports end");
        // Without a keeper nobody counts streams any more.
        let _ = self.events.send(Event::Disconnected { node, module }).await;
    }
}

/// The only place where a report becomes one of the index's.
fn parse(report: wire::NodeReport, publisher: &Publisher) -> Report {
    let published = publisher.version();
    // What another controller published, or this one before a restart, says nothing about ours.
    let applied = report
        .applied_version
        .parse::<podveil_xds_server::Version>()
        .ok()
        .filter(|version| version.instance == published.instance)
        .map_or(0, |version| version.number.min(published.number));
    let workloads = report
        .workloads
        .into_iter()
        .map(|workload| {
            let condition = match workload.condition() {
                wire::WorkloadCondition::Ready => Condition::Ready,
                wire::WorkloadCondition::Releasing => Condition::Releasing,
                wire::WorkloadCondition::Released => Condition::Released,
                wire::WorkloadCondition::Pending | wire::WorkloadCondition::Unspecified => {
                    Condition::Pending
                }
            };
            let report = WorkloadReport {
                condition,
                reason: workload.reason.chars().take(MAX_REASON_CHARS).collect(),
                connections_older: workload.connections_older,
                connections_captured: workload.connections_captured,
            };
            (Uid::from(workload.uid.as_str()), report)
        })
        .collect();
    Report {
        applied,
        workloads,
        bundle_sequence: report.bundle_sequence,
        certificate_generation: report.certificate_generation,
    }
}
