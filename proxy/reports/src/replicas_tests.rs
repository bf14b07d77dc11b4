// SPDX-License-Identifier: Apache-2.0
use super::*;
use podveil_model::{Epoch, Uid};
use podveil_proto::podveil::node::v1::reports_server::{Reports, ReportsServer};
use podveil_proto::podveil::node::v1::{
    self as wire, Awaited, AwaitedWorkload, NodeReport, ReportReceived,
};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::{Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};

/// A state that is one epoch.
#[derive(Clone)]
struct State(watch::Receiver<u64>);

impl Source for State {
    fn report(&self) -> NodeReport {
        NodeReport {
            applied_version: self.0.borrow().to_string(),
            ..NodeReport::default()
        }
    }

    fn holds(&self, uid: &Uid, epoch: Epoch) -> bool {
        *uid == Uid::from("u") && *self.0.borrow() >= epoch.resource_version
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
    questions: mpsc::Sender<Awaited>,
    channel: Channel,
}

struct Service {
    reports: mpsc::Sender<NodeReport>,
    questions: tokio::sync::Mutex<Option<mpsc::Receiver<Awaited>>>,
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
        let mut questions = self.questions.lock().await.take().unwrap();
        let (answers, outgoing) = mpsc::channel(8);
        tokio::spawn(async move {
            loop {
                let received = tokio::select! {
                    Ok(Some(report)) = incoming.message() => {
                        let sequence = report.sequence;
                        reports.send(report).await.unwrap();
                        ReportReceived { sequence, awaited: None }
                    }
                    Some(awaited) = questions.recv() => ReportReceived {
                        awaited: Some(awaited),
                        ..ReportReceived::default()
                    },
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

impl Replica {
    async fn start() -> Self {
        let (reported, reports) = mpsc::channel(64);
        let (questions, asked) = mpsc::channel(8);
        let service = Service {
            reports: reported,
            questions: Some(asked).into(),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(
            Server::builder()
                .add_service(ReportsServer::new(service))
                .serve_with_incoming(TcpListenerStream::new(listener)),
        );
        let channel = Endpoint::from_shared(format!("http://{address}"))
            .unwrap()
            .connect_lazy();
        Self {
            reports,
            questions,
            channel,
        }
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
        let awaited = Awaited { number, workloads };
        self.questions.send(awaited).await.unwrap();
    }
}

#[tokio::test]
async fn every_replica_gets_every_state() {
    let (mut one, mut two) = (Replica::start().await, Replica::start().await);
    let (state, seen) = watch::channel(1);
    let (connected, mut count) = watch::channel(0);
    let replicas = Replicas::Fixed(vec![one.channel.clone(), two.channel.clone()]);
    let stop = CancellationToken::new();
    let task = tokio::spawn(run(replicas, State(seen), connected, stop.clone()));
    for replica in [&mut one, &mut two] {
        replica.report(|report| report.applied_version == "1").await;
    }
    count.wait_for(|count| *count == 2).await.unwrap();
    state.send_replace(2);
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
    let (state, seen) = watch::channel(1);
    let stop = CancellationToken::new();
    let replicas = Replicas::Fixed(vec![replica.channel.clone()]);
    tokio::spawn(run(
        replicas,
        State(seen),
        watch::Sender::new(0),
        stop.clone(),
    ));
    replica.report(|report| report.awaited == 0).await;
    // What is held already is answered at once.
    replica.ask(4, "u", 1).await;
    replica.report(|report| report.awaited == 4).await;
    replica.ask(5, "u", 2).await;
    state.send_replace(2);
    replica.report(|report| report.awaited == 5).await;
    // What is not held is never said to be.
    replica.ask(6, "other", 1).await;
    state.send_replace(3);
    replica
        .report(|report| report.applied_version == "3" && report.awaited == 5)
        .await;
    stop.cancel();
}

#[test]
fn a_replica_with_two_addresses_is_one_replica() {
    let parse = |text: &str| text.parse::<SocketAddr>().unwrap();
    let both = ["[fd00::1]:1", "10.0.0.1:1", "10.0.0.2:1", "10.0.0.1:1"].map(parse);
    let expected = ["10.0.0.1:1", "10.0.0.2:1"].map(parse);
    assert!(one_family(both.into_iter()).into_iter().eq(expected));
    let six = one_family(both.into_iter().take(1));
    assert!(six.into_iter().eq([both[0]]));
}
