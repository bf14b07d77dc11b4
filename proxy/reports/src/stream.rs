// SPDX-License-Identifier: Apache-2.0
use podveil_model::{Epoch, Uid};
use podveil_proto::MAX_AWAITED;
use podveil_proto::podveil::node::v1::reports_client::ReportsClient;
use podveil_proto::podveil::node::v1::{Awaited, NodeReport, ReportReceived};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::transport::Channel;

/// The controller takes a node for silent after 10 s.
pub(crate) const INTERVAL: Duration = Duration::from_secs(3);
/// The controller answers each report; where that takes longer the stream is taken for dead.
const ANSWER_BOUND: Duration = Duration::from_secs(10);

/// The state that is reported. A clone of its own for each stream.
pub trait Source: Clone + Send + Sync + 'static {
    /// All of it, now. `sequence`, `awaited` and `uninstalling` are filled in by the stream.
    fn report(&self) -> NodeReport;

    /// Is this workload in use here as of `epoch` or of a newer one? If not, it may be asked for.
    fn holds(&self, uid: &Uid, epoch: Epoch) -> bool;

    /// Is a workload in use here [at a stage that waits for nodes](podveil_model::Stage::waits_for_nodes)? Then the
    /// controller waits for `applied_version`, else nobody does.
    fn is_awaited(&self) -> bool;

    /// Waits for something new to tell since the last call.
    /// CANCEL: nothing is missed.
    fn changed(&mut self) -> impl Future<Output = ()> + Send;
}

/// A report without what is only counted: where nobody waits for it, it goes with the next one. Or each change of any pod
/// would be followed by a report from every module of every node, while the controller still tells the others of it.
fn news(report: &NodeReport) -> NodeReport {
    let mut news = NodeReport {
        applied_version: String::new(),
        ..report.clone()
    };
    for workload in &mut news.workloads {
        workload.connections_captured = 0;
    }
    news
}

/// A question of the replica's and how far it is answered.
#[derive(Debug, Default)]
struct Question {
    open: Option<Awaited>,
    answered: u64,
}

impl Question {
    fn ask(&mut self, awaited: Awaited) -> Result<(), Status> {
        match awaited.workloads.len() {
            0..=MAX_AWAITED => {
                self.open = Some(awaited);
                Ok(())
            }
            count => Err(Status::invalid_argument(format!(
                "{count} workloads in one question, at most {MAX_AWAITED} may be"
            ))),
        }
    }

    /// Looks whether the answer is yes by now. True when that is news.
    fn look(&mut self, source: &impl Source) -> bool {
        let held = self.open.as_ref().is_some_and(|awaited| {
            // All are looked at: what is not held may be asked for by that.
            awaited.workloads.iter().fold(true, |held, workload| {
                let epoch = workload.epoch.unwrap_or_default();
                let epoch = Epoch {
                    resource_version: epoch.resource_version,
                    stage: epoch.stage,
                };
                source.holds(&Uid::from(&*workload.uid), epoch) && held
            })
        });
        if held && let Some(awaited) = self.open.take() {
            self.answered = awaited.number;
        }
        held
    }
}

/// One stream, until it ends; the reason why, and how many reports went.
pub async fn stream(
    source: &mut impl Source,
    channel: Channel,
    opened: impl Fn(),
    uninstalling: &watch::Sender<bool>,
) -> (Status, u64) {
    let mut sequence = 0;
    let ended = conversation(source, channel, opened, uninstalling, &mut sequence).await;
    (ended, sequence)
}

async fn conversation(
    source: &mut impl Source,
    channel: Channel,
    opened: impl Fn(),
    uninstalling: &watch::Sender<bool>,
    sequence: &mut u64,
) -> Status {
    let (reports, outgoing) = mpsc::channel(1);
    let mut question = Question::default();
    let mut next = |report, answered| {
        *sequence += 1;
        NodeReport {
            sequence: *sequence,
            awaited: answered,
            uninstalling: Some(*uninstalling.borrow()),
            ..report
        }
    };
    let first = source.report();
    let mut told = news(&first);
    // Before the answer's headers are waited for: the controller wants it first.
    if reports.try_send(next(first, 0)).is_err() {
        return Status::internal("the report stream was closed before it began");
    }
    let mut client = ReportsClient::new(channel);
    let opening = client.report(ReceiverStream::new(outgoing));
    let mut answers = match tokio::time::timeout(ANSWER_BOUND, opening).await {
        Ok(Ok(response)) => response.into_inner(),
        Ok(Err(status)) => return status,
        Err(_) => return Status::deadline_exceeded("the controller did not answer"),
    };
    opened();
    let mut due = Instant::now() + INTERVAL;
    // Until when the controller may be silent: it answers each report, and the first one is on its way.
    let mut dead_at = Instant::now() + INTERVAL + ANSWER_BOUND;
    loop {
        let is_waited_for = tokio::select! {
            () = source.changed() => question.look(source) || source.is_awaited(),
            () = tokio::time::sleep_until(dead_at) => {
                return Status::deadline_exceeded("the controller does not answer");
            }
            () = tokio::time::sleep_until(due) => true,
            answer = answers.message() => {
                dead_at = Instant::now() + INTERVAL + ANSWER_BOUND;
                let answer = match answer {
                    Ok(Some(answer)) => answer,
                    Ok(None) => return Status::unavailable("the controller ended the stream"),
                    Err(status) => return status,
                };
                let ReportReceived { awaited, uninstalling: is_uninstalling, .. } = answer;
                if let Some(Err(refused)) = awaited.map(|awaited| question.ask(awaited)) {
                    return refused;
                }
                // A replica that does not know it yet says nothing.
                let is_news = is_uninstalling.is_some_and(|now| {
                    uninstalling.send_if_modified(|held| std::mem::replace(held, now) != now)
                });
                if !question.look(source) && !is_news {
                    continue;
                }
                true
            }
        };
        let report = source.report();
        let news = news(&report);
        if !is_waited_for && news == told {
            continue;
        }
        told = news;
        due = Instant::now() + INTERVAL;
        let report = next(report, question.answered);
        match tokio::time::timeout(ANSWER_BOUND, reports.send(report)).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Status::unavailable("the stream was closed"),
            Err(_) => return Status::deadline_exceeded("the controller takes no reports"),
        }
    }
}
