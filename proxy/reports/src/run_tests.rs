// SPDX-License-Identifier: Apache-2.0
use super::*;
use crate::stream::INTERVAL;
use podveil_model::{Epoch, Uid};
use podveil_proto::podveil::node::v1::reports_server::{Reports, ReportsServer};
use podveil_proto::podveil::node::v1::{
    self as wire, Awaited, AwaitedWorkload, NodeReport, ReportReceived,
};
use std::time::Instant;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::{Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};

/// A state that is one epoch, and whether the controller waits for it.
#[derive(Clone)]
struct State(watch::Receiver<(u64, bool)>);

impl Source for State {
    fn report(&self) -> NodeReport {
        NodeReport {
            applied_version: self.0.borrow().0.to_string(),
            ..NodeReport::default()
        }
    }

    fn holds(&self, uid: &Uid, epoch: Epoch) -> bool {
        *uid == Uid::from("u") && self.0.borrow().0 >= epoch.resource_version
    }

    fn is_awaited(&self) -> bool {
        self.0.borrow().1
    }

    async fn changed(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending().await
        }
    }
}

/// A replica that shows what it gets and asks what it is told to.
struct Replica {
    reports: mpsc::Receiver<NodeReport>,
    words: mpsc::Sender<ReportReceived>,
    channel: Channel,
}

struct Service {
    reports: mpsc::Sender<NodeReport>,
    words: tokio::sync::Mutex<Option<mpsc::Receiver<ReportReceived>>>,
}

#[tonic::async_trait]
impl Reports for Service {
    type ReportStream = ReceiverStream<Result<ReportReceived, Status>>;

    async fn report(
        &self,
        request: Request<Streaming<NodeReport>>,
    ) -> Result<Response<Self::ReportStream>, Status> {
        let mut incoming = request.into_inner();
        let reports = self.reports.clone();
        let mut words = self.words.lock().await.take().unwrap();
        let (answers, outgoing) = mpsc::channel(8);
        tokio::spawn(async move {
            loop {
                let received = tokio::select! {
                    Ok(Some(report)) = incoming.message() => {
                        let sequence = report.sequence;
                        reports.send(report).await.unwrap();
                        ReportReceived { sequence, ..ReportReceived::default() }
                    }
                    Some(word) = words.recv() => word,
                    else => return,
                };
                if answers.send(Ok(received)).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }
}

/// The way to a server of its own for this.
async fn serve(reports: impl Reports) -> Channel {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(
        Server::builder()
            .add_service(ReportsServer::new(reports))
            .serve_with_incoming(TcpListenerStream::new(listener)),
    );
    Endpoint::from_shared(format!("http://{address}"))
        .unwrap()
        .connect_lazy()
}

impl Replica {
    async fn start() -> Self {
        let (reported, reports) = mpsc::channel(64);
        let (words, told) = mpsc::channel(8);
        let service = Service {
            reports: reported,
            words: Some(told).into(),
        };
        let channel = serve(service).await;
        Self {
            reports,
            words,
            channel,
        }
    }

    /// By a program that begins with epoch 1, for which nobody waits.
    fn reported_to(&self) -> (watch::Sender<(u64, bool)>, DropGuard) {
        let (state, seen) = watch::channel((1, false));
        let stop = CancellationToken::new();
        let replicas = Replicas::fixed(vec![self.channel.clone()]);
        let controllers = Controllers::default();
        tokio::spawn(run(replicas, State(seen), controllers, stop.clone()));
        (state, stop.drop_guard())
    }

    async fn report(&mut self, holds: impl Fn(&NodeReport) -> bool) {
        let wait = async {
            while let Some(report) = self.reports.recv().await {
                if holds(&report) {
                    return;
                }
            }
            panic!("the stream ended");
        };
        tokio::time::timeout(Duration::from_secs(10), wait)
            .await
            .expect("such a report in time");
    }

    async fn ask(&self, number: u64, uid: &str, resource_version: u64) {
        let workload = AwaitedWorkload {
            uid: uid.to_owned(),
            epoch: Some(wire::Epoch {
                resource_version,
                stage: 0,
            }),
        };
        let workloads = vec![workload];
        let awaited = Some(Awaited { number, workloads });
        self.tell(ReportReceived {
            awaited,
            ..ReportReceived::default()
        })
        .await;
    }

    async fn tell(&self, word: ReportReceived) {
        self.words.send(word).await.unwrap();
    }
}

#[tokio::test]
async fn every_replica_gets_every_state() {
    let (mut one, mut two) = (Replica::start().await, Replica::start().await);
    let (state, seen) = watch::channel((1, false));
    let controllers = Controllers::default();
    let mut count = controllers.connected.subscribe();
    let replicas = Replicas::fixed(vec![one.channel.clone(), two.channel.clone()]);
    let stop = CancellationToken::new();
    let task = tokio::spawn(run(replicas, State(seen), controllers, stop.clone()));
    for replica in [&mut one, &mut two] {
        replica.report(|report| report.applied_version == "1").await;
    }
    count.wait_for(|count| *count == 2).await.unwrap();
    state.send_replace((2, true));
    for replica in [&mut one, &mut two] {
        replica.report(|report| report.applied_version == "2").await;
    }
    stop.cancel();
    task.await.unwrap();
    count.wait_for(|count| *count == 0).await.unwrap();
}

#[tokio::test]
async fn a_question_is_answered_when_the_state_is_there() {
    let mut replica = Replica::start().await;
    let (state, _stop) = replica.reported_to();
    replica.report(|report| report.awaited == 0).await;
    // What is held already is answered at once.
    replica.ask(4, "u", 1).await;
    replica.report(|report| report.awaited == 4).await;
    replica.ask(5, "u", 2).await;
    state.send_replace((2, false));
    replica.report(|report| report.awaited == 5).await;
    // What is not held is never said to be.
    replica.ask(6, "other", 1).await;
    state.send_replace((3, true));
    replica
        .report(|report| report.applied_version == "3" && report.awaited == 5)
        .await;
}

#[tokio::test]
async fn a_version_that_nobody_waits_for_goes_with_the_next_report() {
    let mut replica = Replica::start().await;
    let (state, _stop) = replica.reported_to();
    replica.report(|report| report.applied_version == "1").await;
    let first = Instant::now();
    state.send_replace((2, false));
    replica.report(|report| report.applied_version == "2").await;
    assert!(first.elapsed() > INTERVAL / 2, "{:?}", first.elapsed());
}

#[tokio::test]
async fn an_uninstallation_is_known_until_it_is_taken_back() {
    let mut replica = Replica::start().await;
    let (_state, seen) = watch::channel((1, false));
    let controllers = Controllers::default();
    let mut uninstalling = controllers.uninstalling.subscribe();
    let stop = CancellationToken::new();
    let replicas = Replicas::fixed(vec![replica.channel.clone()]);
    let task = tokio::spawn(run(replicas, State(seen), controllers, stop.clone()));
    let word = |uninstalling| ReportReceived {
        uninstalling,
        ..ReportReceived::default()
    };
    let says = |uninstalling| move |report: &NodeReport| report.uninstalling == Some(uninstalling);
    replica.report(says(false)).await;
    replica.tell(word(Some(true))).await;
    replica.report(says(true)).await;
    // A replica that has just begun does not know.
    replica.tell(word(None)).await;
    replica.report(says(true)).await;
    replica.tell(word(Some(false))).await;
    replica.report(says(false)).await;
    replica.tell(word(Some(true))).await;
    replica.report(says(true)).await;
    // What was said last stands when nobody is there to ask.
    stop.cancel();
    task.await.unwrap();
    assert!(*uninstalling.borrow_and_update());
}

/// Accepts reports and answers none: a controller that stands still.
struct Mute;

#[tonic::async_trait]
impl Reports for Mute {
    type ReportStream = ReceiverStream<Result<ReportReceived, Status>>;

    async fn report(
        &self,
        request: Request<Streaming<NodeReport>>,
    ) -> Result<Response<Self::ReportStream>, Status> {
        let mut incoming = request.into_inner();
        let (answers, outgoing) = mpsc::channel(1);
        tokio::spawn(async move {
            while let Ok(Some(_)) = incoming.message().await {}
            drop(answers);
        });
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }
}

#[tokio::test]
async fn a_replica_that_answers_nothing_is_given_up() {
    let channel = serve(Mute).await;
    let (_state, seen) = watch::channel((1, false));
    let (opened, mut open) = watch::channel(false);
    let task = tokio::spawn(async move {
        let opened = || {
            opened.send_replace(true);
        };
        let uninstalling = watch::Sender::new(false);
        crate::stream::stream(&mut State(seen), channel, opened, &uninstalling).await
    });
    open.wait_for(|open| *open).await.unwrap();
    // From here on the clock runs as fast as everything waits.
    tokio::time::pause();
    let (ended, sent) = task.await.unwrap();
    assert_eq!(ended.code(), tonic::Code::DeadlineExceeded, "{ended}");
    // It was told again and again before.
    assert!(sent > 1, "{sent}");
}
