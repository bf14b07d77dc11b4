// SPDX-License-Identifier: Apache-2.0
use crate::Publisher;
use crate::published::Published;
use crate::subscriber::{Heard, Subscriber, Unacceptable};
use podveil_proto::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse,
    aggregated_discovery_service_server::{
        AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
    },
};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Extensions, Request, Response, Status, Streaming};

/// Responses made and not yet taken by the connection: one, so that what follows is made from the newest snapshot.
const QUEUED_RESPONSES: usize = 1;
/// A reconnecting subscriber names every resource it holds in one request.
const MAX_REQUEST_BYTES: usize = 64 << 20;
/// Streams that begin at once. What one is first told, and what it says it holds, may be megabytes; all nodes come at once
/// when a controller starts.
const BEGINNING: usize = 4;
/// A stream that has not taken its first answers by then no longer keeps others from beginning.
const BEGIN_BOUND: Duration = Duration::from_secs(10);

/// Who opened a stream, for the log.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Caller(pub Arc<str>);

/// For the first snapshot. A server that has none, because it cannot read the cluster, sends subscribers away: another
/// replica may have one.
const FIRST_SNAPSHOT: Duration = Duration::from_secs(2);

type Authorize = dyn Fn(&Extensions) -> Result<Caller, Status> + Send + Sync;

/// The gRPC service. Each stream is let in by `authorize`, which sees what the transport proved about the caller.
pub struct DiscoveryService {
    publisher: Publisher,
    authorize: Box<Authorize>,
    beginning: Arc<Semaphore>,
    stop: CancellationToken,
}

impl DiscoveryService {
    /// Ready for `tonic::transport::Server::add_service`. All streams end when `stop` is cancelled.
    pub fn server(
        publisher: Publisher,
        authorize: impl Fn(&Extensions) -> Result<Caller, Status> + Send + Sync + 'static,
        stop: CancellationToken,
    ) -> AggregatedDiscoveryServiceServer<Self> {
        AggregatedDiscoveryServiceServer::new(Self {
            publisher,
            authorize: Box::new(authorize),
            beginning: Arc::new(Semaphore::new(BEGINNING)),
            stop,
        })
        .max_decoding_message_size(MAX_REQUEST_BYTES)
    }
}

impl fmt::Debug for DiscoveryService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DiscoveryService")
            .field("publisher", &self.publisher)
            .field("stop", &self.stop)
            .finish_non_exhaustive()
    }
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for DiscoveryService {
    type DeltaAggregatedResourcesStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let caller = (self.authorize)(request.extensions())?;
        let (responses_in, responses) = mpsc::channel(QUEUED_RESPONSES);
        let stream = Stream {
            subscriber: Subscriber::new(self.publisher.instance()),
            published: self.publisher.subscribe(),
            requests: request.into_inner(),
            responses: responses_in,
            beginning: self.beginning.clone(),
        };
        let stop = self.stop.clone();
        tokio::spawn(async move {
            tracing::info!(caller = %caller.0, "a subscriber came");
            let end = stream.run(&caller, stop).await;
            tracing::info!(caller = %caller.0, reason = %end.reason, "a subscriber left");
        });
        Ok(Response::new(ReceiverStream::new(responses)))
    }
}

/// One subscriber's stream, as its task holds it.
struct Stream {
    subscriber: Subscriber,
    published: watch::Receiver<Option<Arc<Published>>>,
    requests: Streaming<DeltaDiscoveryRequest>,
    responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
    beginning: Arc<Semaphore>,
}

/// Why a stream ended, and what the subscriber is told.
struct End {
    reason: &'static str,
    status: Option<Status>,
}

impl Stream {
    async fn run(mut self, caller: &Caller, stop: CancellationToken) -> End {
        let end = tokio::select! {
            () = stop.cancelled() => End {
                reason: "the server is stopping",
                status: Some(Status::unavailable("the server is stopping")),
            },
            end = self.serve(caller) => end,
        };
        if let Some(status) = &end.status {
            // A full queue means that it does not listen; the stream's end tells it as well.
            let _ = self.responses.try_send(Err(status.clone()));
        }
        end
    }

    /// Nothing is read from the stream before there is something to answer and its turn has come.
    async fn turn(&mut self) -> Result<OwnedSemaphorePermit, End> {
        let (published, beginning) = (&mut self.published, self.beginning.clone());
        let first = published.wait_for(Option::is_some);
        if tokio::time::timeout(FIRST_SNAPSHOT, first).await.is_err() {
            return Err(End {
                reason: "there is nothing to tell yet",
                status: Some(Status::unavailable("the cluster has not been read yet")),
            });
        }
        tokio::select! {
            turn = beginning.acquire_owned() => turn.map_err(|_| End {
                reason: "nothing begins any more",
                status: Some(Status::unavailable("the server is stopping")),
            }),
            () = self.responses.closed() => {
                Err(End { reason: "the subscriber is gone", status: None })
            }
        }
    }

    async fn serve(&mut self, caller: &Caller) -> End {
        let mut turn = match self.turn().await {
            Ok(turn) => Some(turn),
            Err(end) => return end,
        };
        let begin_bound = Instant::now() + BEGIN_BOUND;
        loop {
            if self.subscriber.is_settled() {
                turn = None;
            }
            let current = self.published.borrow_and_update().clone();
            let ready = current.filter(|current| self.subscriber.may_send(current));
            tokio::select! {
                permit = self.responses.reserve(), if ready.is_some() => {
                    let Ok(permit) = permit else {
                        return End { reason: "the subscriber is gone", status: None };
                    };
                    match ready.map(|current| self.subscriber.poll(&current)) {
                        Some(Ok(Some(response))) => permit.send(Ok(response)),
                        Some(Err(error)) => {
                            let status = Some(Status::unavailable(error.to_string()));
                            return End { reason: "too far behind", status };
                        }
                        Some(Ok(None)) | None => {}
                    }
                }
                () = tokio::time::sleep_until(begin_bound), if turn.is_some() => turn = None,
                () = self.responses.closed() => {
                    return End { reason: "the subscriber is gone", status: None };
                }
                changed = self.published.changed() => {
                    if changed.is_err() {
                        return End {
                            reason: "nothing is published any more",
                            status: Some(Status::unavailable("nothing is published any more")),
                        };
                    }
                }
                request = self.requests.message() => match request {
                    Ok(Some(request)) => match self.subscriber.request(request) {
                        Ok(Heard::Rejected { reason }) => {
                            tracing::warn!(caller = %caller.0, %reason, "a subscriber rejected a response");
                        }
                        Ok(Heard::Acknowledged | Heard::Nothing) => {}
                        Err(error) => {
                            let status = match &error {
                                Unacceptable::NameTooLong { .. } | Unacceptable::UnknownType { .. } => {
                                    Status::invalid_argument(error.to_string())
                                }
                                Unacceptable::TooManyNames { .. } => {
                                    Status::resource_exhausted(error.to_string())
                                }
                            };
                            return End { reason: "an unacceptable request", status: Some(status) };
                        }
                    },
                    Ok(None) => return End { reason: "the subscriber ended it", status: None },
                    Err(_) => return End { reason: "the connection was lost", status: None },
                }
            }
        }
    }
}
