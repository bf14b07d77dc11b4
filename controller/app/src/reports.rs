// SPDX-License-Identifier: Apache-2.0
//! The nodes' reports: one stream from each program of a node, each message its full state.

use crate::caller;
use crate::keeper::Event;
use podveil_identity::KubernetesName;
use podveil_index::{Awaited, AwaitedWorkload, Condition, Held, Module, Report, WorkloadReport};
use podveil_model::{Epoch, Stage, Uid};
use podveil_proto::MAX_AWAITED;
use podveil_proto::podveil::node::v1 as wire;
use podveil_proto::podveil::node::v1::reports_server::{Reports, ReportsServer};
use podveil_source::Cluster;
use podveil_xds_server::Publisher;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

/// A node holds a few hundred pods; this many is far above.
const MAX_WORKLOADS: usize = 4096;
/// A reason is one sentence; the rest of a longer one is cut off.
const MAX_REASON_CHARS: usize = 256;
const MAX_MESSAGE_BYTES: usize = 8 << 20;
/// Between two questions to one program.
const QUESTION_PAUSE: Duration = Duration::from_millis(100);

/// Hands what nodes say to the keeper.
#[derive(Debug)]
pub(crate) struct ReportService {
    publisher: Publisher,
    events: mpsc::Sender<Event>,
    awaited: watch::Receiver<Arc<Awaited>>,
    cluster: ClusterState,
    stop: CancellationToken,
}

/// `None` until the source has told everything once.
type ClusterState = watch::Receiver<Option<Arc<Cluster>>>;

impl ReportService {
    pub(crate) fn server(
        publisher: Publisher,
        events: mpsc::Sender<Event>,
        awaited: watch::Receiver<Arc<Awaited>>,
        cluster: ClusterState,
        stop: CancellationToken,
    ) -> ReportsServer<Self> {
        ReportsServer::new(Self {
            publisher,
            events,
            awaited,
            cluster,
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
            awaited: self.awaited.clone(),
            cluster: self.cluster.clone(),
            told: None,
            questions: Questions::default(),
            last: None,
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
    awaited: watch::Receiver<Arc<Awaited>>,
    cluster: ClusterState,
    /// Whether Podveil is being uninstalled, as this program was told.
    told: Option<bool>,
    questions: Questions,
    last: Option<(Report, u64)>,
}

type Answers = mpsc::Sender<Result<wire::ReportReceived, Status>>;

impl Stream {
    async fn serve(&mut self, received: &Answers) -> Result<(), Status> {
        loop {
            let ask_at = self.questions.next;
            tokio::select! {
                // CANCEL: a message that has not come whole stays in the stream.
                report = self.reports.message() => match report? {
                    Some(report) => self.take(report, received).await?,
                    None => return Ok(()),
                },
                Ok(()) = self.awaited.changed() => {
                    self.questions.due();
                }
                Ok(()) = self.cluster.changed() => self.tell_of_uninstallation(received).await,
                () = tokio::time::sleep_until(ask_at.unwrap_or_else(Instant::now)), if ask_at.is_some() => {
                    self.ask(received).await?;
                }
            }
        }
    }

    async fn take(&mut self, report: wire::NodeReport, received: &Answers) -> Result<(), Status> {
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
        self.questions.answered(report.awaited);
        let (mut report, ours) = parse(report, &self.publisher);
        self.questions.asked_elsewhere = !ours;
        if !ours {
            report.applied = self.questions.confirmed();
            self.questions.due();
        }
        self.last = Some((report.clone(), sequence));
        self.report(module, report).await?;
        self.answer(received, sequence, None).await;
        Ok(())
    }

    /// Every answer says as well whether Podveil is being uninstalled.
    async fn answer(&mut self, received: &Answers, sequence: u64, awaited: Option<wire::Awaited>) {
        self.told = is_uninstalling(&self.cluster);
        let answer = wire::ReportReceived {
            sequence,
            awaited,
            uninstalling: self.told,
        };
        // A program that no longer listens ends the stream by itself.
        let _ = received.send(Ok(answer)).await;
    }

    /// At once, since it may be asked to end any moment; before its first report it is not asked anything.
    async fn tell_of_uninstallation(&mut self, received: &Answers) {
        self.cluster.mark_unchanged();
        if let Some((_, sequence)) = self.last
            && is_uninstalling(&self.cluster) != self.told
        {
            self.answer(received, sequence, None).await;
        }
    }

    /// Asks for what is awaited, of a program that takes its configuration from another replica.
    async fn ask(&mut self, received: &Answers) -> Result<(), Status> {
        self.questions.next = None;
        let awaited = self.awaited.borrow_and_update().clone();
        let Some((mut report, sequence)) = self.last.clone() else {
            return Ok(());
        };
        match self.questions.next_question(&awaited) {
            Some(question) => {
                self.answer(received, sequence, Some(question)).await;
                Ok(())
            }
            // There is nothing to ask for: it counts as having it.
            None if self.questions.asked_elsewhere
                && report.applied < self.questions.confirmed() =>
            {
                report.applied = self.questions.confirmed();
                self.last = Some((report.clone(), sequence));
                match self.module {
                    Some(module) => self.report(module, report).await,
                    None => Ok(()),
                }
            }
            None => Ok(()),
        }
    }

    async fn report(&self, module: Module, report: Report) -> Result<(), Status> {
        self.tell(Event::Reported {
            node: self.node.clone(),
            module,
            report,
        })
        .await
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

fn is_uninstalling(cluster: &ClusterState) -> Option<bool> {
    let cluster = cluster.borrow();
    cluster.as_ref().map(|cluster| cluster.released.is_some())
}

/// What a program that takes its configuration from another replica is asked, and has answered: piece by piece, since one
/// question holds [`MAX_AWAITED`] at most and one snapshot may bring more.
#[derive(Debug, Default)]
struct Questions {
    asked_elsewhere: bool,
    /// When the next one may be asked, if there is one.
    next: Option<Instant>,
    asked_at: Option<Instant>,
    /// Of the newest question; no snapshot's, since several may ask for one snapshot.
    number: u64,
    open: Option<Open>,
    /// All that is awaited before this place is in use there.
    reached: Place,
}

/// The newest question, not answered yet.
#[derive(Debug)]
struct Open {
    workloads: Vec<AwaitedWorkload>,
    /// What an answer leads to: where the rest begins.
    then: Place,
}

/// In [`Awaited::workloads`]: `since` and `uid`; without a UID, before all of that snapshot.
type Place = (u64, Option<Uid>);

fn place(one: &AwaitedWorkload) -> Place {
    (one.since, Some(one.uid.clone()))
}

impl Questions {
    fn due(&mut self) {
        if self.asked_elsewhere {
            let now = Instant::now();
            let soonest = self
                .asked_at
                .map_or(now, |at| (at + QUESTION_PAUSE).max(now));
            self.next.get_or_insert(soonest);
        }
    }

    /// What is awaited up to this snapshot is in use there.
    fn confirmed(&self) -> u64 {
        self.reached.0.saturating_sub(1)
    }

    /// Only the newest question can be answered: each replaces the one before.
    fn answered(&mut self, number: u64) {
        if number == self.number
            && let Some(open) = self.open.take()
        {
            self.reached = open.then;
        }
    }

    fn next_question(&mut self, awaited: &Awaited) -> Option<wire::Awaited> {
        if !self.asked_elsewhere {
            return None;
        }
        let from = (awaited.workloads).partition_point(|one| place(one) < self.reached);
        let rest = awaited.workloads.get(from..).unwrap_or_default();
        let after = |count| rest.get(count).map_or((awaited.number + 1, None), place);
        // What is awaited since comes after it, and waits for the answer. A question for what is gone may have none, and
        // is replaced.
        if let Some(open) = &mut self.open
            && rest.starts_with(&open.workloads)
        {
            open.then = after(open.workloads.len());
            return None;
        }
        self.open = None;
        let workloads: Vec<_> = rest.iter().take(MAX_AWAITED).cloned().collect();
        let then = after(workloads.len());
        if workloads.is_empty() {
            self.reached = then;
            return None;
        }
        self.number += 1;
        self.asked_at = Some(Instant::now());
        let question = wire::Awaited {
            number: self.number,
            workloads: workloads.iter().map(wire_awaited).collect(),
        };
        self.open = Some(Open { workloads, then });
        Some(question)
    }
}

fn wire_awaited(one: &AwaitedWorkload) -> wire::AwaitedWorkload {
    wire::AwaitedWorkload {
        uid: one.uid.to_string(),
        epoch: Some(wire::Epoch {
            resource_version: one.epoch.resource_version,
            stage: one.epoch.stage,
        }),
    }
}

/// The only place where a report becomes one of the index's. Whether the program takes its configuration from us: what
/// another controller published, or this one before a restart, says nothing about ours.
fn parse(report: wire::NodeReport, publisher: &Publisher) -> (Report, bool) {
    let published = publisher.version();
    let applied = report
        .applied_version
        .parse::<podveil_xds_server::Version>()
        .ok()
        .filter(|version| version.instance == published.instance)
        .map(|version| version.number.min(published.number));
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
                held: held(&workload),
                reason: workload.reason.chars().take(MAX_REASON_CHARS).collect(),
                connections_older: workload.connections_older,
                connections_captured: workload.connections_captured,
                started_uncaptured: workload.started_uncaptured,
            };
            (Uid::from(workload.uid.as_str()), report)
        })
        .collect();
    let report = Report {
        applied: applied.unwrap_or_default(),
        workloads,
        bundle_sequence: report.bundle_sequence,
        certificate_generation: report.certificate_generation,
        uninstalling: report.uninstalling,
    };
    (report, applied.is_some())
}

fn held(workload: &wire::WorkloadReport) -> Option<Held> {
    let epoch = workload.epoch?;
    let stage = match workload.stage() {
        wire::EnrolmentStage::None => Stage::None,
        wire::EnrolmentStage::Wanted => Stage::Wanted,
        wire::EnrolmentStage::Capturable => Stage::Capturable,
        wire::EnrolmentStage::Announced => Stage::Announced,
        wire::EnrolmentStage::Mandatory => Stage::Mandatory,
        wire::EnrolmentStage::Draining => Stage::Draining,
    };
    Some(Held {
        stage,
        epoch: Epoch {
            resource_version: epoch.resource_version,
            stage: epoch.stage,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn awaited(number: u64, workloads: impl IntoIterator<Item = (u64, String)>) -> Awaited {
        let workloads = workloads.into_iter().map(|(since, uid)| AwaitedWorkload {
            since,
            uid: Uid::from(&*uid),
            epoch: Epoch::default(),
        });
        Awaited {
            number,
            workloads: workloads.collect(),
        }
    }

    fn uids(question: &wire::Awaited) -> Vec<&str> {
        let uids = question.workloads.iter().map(|one| one.uid.as_str());
        uids.collect()
    }

    fn elsewhere() -> Questions {
        Questions {
            asked_elsewhere: true,
            ..Questions::default()
        }
    }

    #[test]
    fn a_snapshot_is_confirmed_when_every_piece_of_what_is_awaited_is_answered() {
        let names = (0..2500).map(|number| format!("w{number:04}"));
        let early = [(5, "early".to_owned())].into_iter();
        let awaited = awaited(9, early.chain(names.map(|name| (7, name))));
        let mut questions = elsewhere();
        let mut asked = Vec::new();
        for (count, confirmed) in [(1000, 6), (1000, 6), (501, 9)] {
            let question = questions.next_question(&awaited).unwrap();
            assert_eq!(question.workloads.len(), count);
            asked.extend(question.workloads.iter().map(|one| one.uid.clone()));
            assert_eq!(questions.next_question(&awaited), None, "one at a time");
            // Programs repeat their last answer in each report.
            let before = questions.confirmed();
            questions.answered(question.number - 1);
            assert_eq!(questions.confirmed(), before);
            questions.answered(question.number);
            assert_eq!(questions.confirmed(), confirmed);
        }
        let all = awaited.workloads.iter().map(|one| one.uid.to_string());
        assert_eq!(asked, all.collect::<Vec<_>>());
        assert_eq!(questions.next_question(&awaited), None);
    }

    #[test]
    fn a_question_for_what_is_awaited_no_more_is_replaced() {
        let [a, b] = ["a", "b"].map(|uid| (3, uid.to_owned()));
        let mut questions = elsewhere();
        let first = questions.next_question(&awaited(3, [a, b.clone()]));
        let first = first.unwrap();
        assert_eq!(uids(&first), ["a", "b"]);
        let second = questions.next_question(&awaited(3, [b])).unwrap();
        assert_eq!(uids(&second), ["b"]);
        questions.answered(first.number);
        assert_eq!(questions.confirmed(), 0);
        questions.answered(second.number);
        assert_eq!(questions.confirmed(), 3);
        // Or nothing is left to ask.
        let last = awaited(4, [(4, "c".to_owned())]);
        assert!(questions.next_question(&last).is_some());
        assert_eq!(questions.next_question(&awaited(5, [])), None);
        assert_eq!(questions.confirmed(), 5);
    }

    #[test]
    fn what_comes_to_be_awaited_meanwhile_takes_no_question_back() {
        let [a, b] = [(3, "a".to_owned()), (4, "b".to_owned())];
        let mut questions = elsewhere();
        let first = questions.next_question(&awaited(3, [a.clone()])).unwrap();
        let both = awaited(4, [a, b]);
        assert_eq!(questions.next_question(&both), None);
        questions.answered(first.number);
        assert_eq!(questions.confirmed(), 3);
        let second = questions.next_question(&both).unwrap();
        assert_eq!(uids(&second), ["b"]);
        questions.answered(second.number);
        assert_eq!(questions.confirmed(), 4);
    }
}
