// SPDX-License-Identifier: Apache-2.0
use crate::Publisher;
use crate::body::ResponseBody;
use crate::published::Published;
use crate::requests::Requests;
use crate::response::Response;
use crate::subscriber::{Heard, Subscriber, Unacceptable};
use podveil_proto::envoy::service::discovery::v3::aggregated_discovery_service_server::SERVICE_NAME;
use std::convert::Infallible;
use std::fmt;
use std::future::{Ready, ready};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::server::NamedService;
use tonic::{Extensions, Status};

const METHOD: &str =
    "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
/// Responses made and not yet taken by the connection: one, so that what follows is made from the newest snapshot.
const QUEUED_RESPONSES: usize = 1;
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
#[derive(Clone)]
pub struct DiscoveryService {
    publisher: Publisher,
    authorize: Arc<Authorize>,
    beginning: Arc<Semaphore>,
    stop: CancellationToken,
}

impl DiscoveryService {
    /// For `tonic::transport::Server::add_service`. All streams end when `stop` is cancelled.
    pub fn new(
        publisher: Publisher,
        authorize: impl Fn(&Extensions) -> Result<Caller, Status> + Send + Sync + 'static,
        stop: CancellationToken,
    ) -> Self {
        Self {
            publisher,
            authorize: Arc::new(authorize),
            beginning: Arc::new(Semaphore::new(BEGINNING)),
            stop,
        }
    }

    fn begin(&self, request: http::Request<Body>) -> Result<ResponseBody, Status> {
        let caller = (self.authorize)(request.extensions())?;
        let (responses_in, responses) = mpsc::channel(QUEUED_RESPONSES);
        let stream = Stream {
            subscriber: Subscriber::new(self.publisher.instance()),
            published: self.publisher.subscribe(),
            requests: Requests::new(request.into_body()),
            responses: responses_in,
            beginning: self.beginning.clone(),
        };
        let stop = self.stop.clone();
        tokio::spawn(async move {
            tracing::info!(caller = %caller.0, "a subscriber came");
            let end = stream.run(&caller, stop).await;
            tracing::info!(caller = %caller.0, reason = %end.reason, "a subscriber left");
        });
        Ok(ResponseBody::new(responses))
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

impl NamedService for DiscoveryService {
    const NAME: &'static str = SERVICE_NAME;
}

/// In place of the generated service, whose responses are encoded anew, and whole, for each stream.
impl tower::Service<http::Request<Body>> for DiscoveryService {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let begun = match request.uri().path() {
            METHOD => self.begin(request),
            _ => Err(Status::unimplemented("only delta streams are served")),
        };
        ready(Ok(match begun {
            Ok(body) => {
                let mut response = http::Response::new(Body::new(body));
                let content_type = http::HeaderValue::from_static("application/grpc");
                (response.headers_mut()).insert(http::header::CONTENT_TYPE, content_type);
                response
            }
            Err(status) => status.into_http(),
        }))
    }
}

/// One subscriber's stream, as its task holds it.
struct Stream {
    subscriber: Subscriber,
    published: watch::Receiver<Option<Arc<Published>>>,
    requests: Requests,
    responses: mpsc::Sender<Result<Response, Status>>,
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
                request = self.requests.next() => match request {
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
                    Err(status) => {
                        return End { reason: "its requests cannot be read", status: Some(status) };
                    }
                }
            }
        }
    }
}
