// SPDX-License-Identifier: Apache-2.0
use crate::{
    Acknowledge, Batch, Config, Counts, Lost, Received, Servers, Session, Status, Termination,
};
use podveil_model::Lookup;
use podveil_proto::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse,
    aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
};
use prost::Message;
use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::mpsc::{self, OwnedPermit};
use tokio::sync::watch;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::metadata::{AsciiMetadataKey, AsciiMetadataValue};
use tonic::transport::Channel;
use tonic::{Request, Streaming};

/// Batches that may wait for the consumer before the stream is no longer read.
const QUEUED_BATCHES: usize = 4;
/// Batches handed out and not yet answered.
const UNANSWERED_BATCHES: usize = 8;
/// Wishes that may wait for the client's task.
const QUEUED_WISHES: usize = 1024;
/// Requests that wait for the connection; the session keeps the rest.
const QUEUED_REQUESTS: usize = 1;
/// What peers allow: the first response holds the whole cluster.
const MAX_MESSAGE_BYTES: usize = 200 << 20;

type Answer = (u64, Result<(), String>);

/// The running client, as its channels.
#[derive(Debug)]
pub struct Client {
    pub batches: mpsc::Receiver<Batch>,
    pub demand: Demand,
    pub status: watch::Receiver<Status>,
    pub counts: Arc<Counts>,
}

/// Asks the control plane. The answer comes as an update of a later batch: the resource itself, or
/// [`Update::NotFound`](crate::Update::NotFound).
#[derive(Clone, Debug)]
pub struct Demand(mpsc::Sender<Wish>);

/// What a consumer wants of its client.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Wish {
    Ask(Lookup),
    /// On demand: these need not be kept up to date any more. From when they are not comes as
    /// [`Update::Forgotten`](crate::Update::Forgotten), and what only they meant as
    /// [`Update::Unasked`](crate::Update::Unasked).
    Forget(Vec<Lookup>),
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum AskError {
    #[error("too many questions wait")]
    Full,
    #[error("the client has stopped")]
    Stopped,
}

impl Demand {
    /// A question asked twice is sent once. One that the control plane does not answer may be asked again after
    /// [`Config::ask_timeout`].
    ///
    /// # Errors
    /// Never waits: [`AskError::Full`] when too many questions wait.
    pub fn ask(&self, lookup: Lookup) -> Result<(), AskError> {
        self.0
            .try_send(Wish::Ask(lookup))
            .map_err(|error| match error {
                mpsc::error::TrySendError::Full(_) => AskError::Full,
                mpsc::error::TrySendError::Closed(_) => AskError::Stopped,
            })
    }

    /// Waits for room for one wish.
    ///
    /// # Errors
    /// [`AskError::Stopped`].
    pub async fn room(&self) -> Result<mpsc::Permit<'_, Wish>, AskError> {
        self.0.reserve().await.map_err(|_| AskError::Stopped)
    }

    /// For consumers' own tests: the wishes come out of the receiver.
    pub fn unanswered(capacity: usize) -> (Self, mpsc::Receiver<Wish>) {
        let (wishes_in, wishes) = mpsc::channel(capacity);
        (Self(wishes_in), wishes)
    }
}

impl Client {
    /// Starts the client's task. It runs until `stop`, or until the consumer drops [`Client::batches`].
    pub fn start(servers: impl Servers, config: Config, stop: CancellationToken) -> Self {
        let (batches_in, batches) = mpsc::channel(QUEUED_BATCHES);
        let (demand, wishes) = Demand::unanswered(QUEUED_WISHES);
        let (answers_in, answers) = mpsc::channel(UNANSWERED_BATCHES);
        let (status_in, status) = watch::channel(Status::default());
        let counts = Arc::new(Counts::default());
        let task = Task {
            servers,
            credentials: Credentials::new(&config),
            session: Session::new(config, now(), rand::random()),
            batches: batches_in,
            wishes,
            answers_in,
            answers,
            status: status_in,
            counts: counts.clone(),
        };
        tokio::spawn(async move {
            // CANCEL: stopping may drop the stream at any await; nothing outlives the task.
            tokio::select! {
                () = stop.cancelled() => {}
                () = task.run() => {}
            }
        });
        Self {
            batches,
            demand,
            status,
            counts,
        }
    }
}

/// The one clock, which tests may pause.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

struct Task<S> {
    servers: S,
    credentials: Credentials,
    session: Session,
    batches: mpsc::Sender<Batch>,
    wishes: mpsc::Receiver<Wish>,
    answers_in: mpsc::Sender<Answer>,
    answers: mpsc::Receiver<Answer>,
    status: watch::Sender<Status>,
    counts: Arc<Counts>,
}

/// What one turn of a stream brought.
enum Event {
    Answered(Answer),
    Wished(Wish),
    CanDeliver(Slot),
    CanSend(OwnedPermit<DeltaDiscoveryRequest>),
    Lost(Termination, Lost),
    Opened(Streaming<DeltaDiscoveryResponse>),
    Received(DeltaDiscoveryResponse),
    Unwanted,
}

/// Room for one more batch, taken before it is read from the stream.
struct Slot {
    batch: OwnedPermit<Batch>,
    answer: OwnedPermit<Answer>,
}

impl<S: Servers> Task<S> {
    async fn run(mut self) {
        while let Some(at) = self.session.connect_at() {
            let Some(channel) = self.turn(at).await else {
                return;
            };
            let Some(lost) = self.stream(channel).await else {
                return;
            };
            tracing::info!(reason = %lost.reason, "lost the discovery stream");
            self.session.lost(now(), lost);
            self.tell();
        }
    }

    /// Waits until it is time for the next stream, and for whom it goes to. `None`: nobody wants the batches any more.
    async fn turn(&mut self, at: Instant) -> Option<Channel> {
        let Self {
            servers, session, ..
        } = self;
        let turn = async {
            tokio::time::sleep_until(at.into()).await;
            servers.next().await
        };
        tokio::pin!(turn);
        loop {
            tokio::select! {
                channel = &mut turn => return Some(channel),
                Some((id, answer)) = self.answers.recv() => session.answer(id, answer),
                Some(wish) = self.wishes.recv() => take_wish(session, wish),
                room = room(&self.batches, &self.answers_in), if session.has_let_go() => {
                    room?.fill(session.take_let_go());
                }
                () = self.batches.closed() => return None,
            }
        }
    }

    /// One stream from its first request to its end. `None`: nobody wants the batches any more.
    async fn stream(&mut self, channel: Channel) -> Option<Lost> {
        self.session.opening();
        let (requests_in, requests) = mpsc::channel(QUEUED_REQUESTS);
        let mut request = Request::new(ReceiverStream::new(requests));
        if let Err(reason) = self.credentials.put_into(request.metadata_mut()).await {
            return Some(Lost { reason });
        }
        let mut service = AggregatedDiscoveryServiceClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE_BYTES);
        let call = service.delta_aggregated_resources(request);
        tokio::pin!(call);
        let mut responses: Option<Streaming<DeltaDiscoveryResponse>> = None;
        let mut slot: Option<Slot> = None;
        loop {
            if self.session.has_let_go()
                && let Some(slot) = slot.take()
            {
                slot.fill(self.session.take_let_go());
            }
            let event = tokio::select! {
                opened = &mut call, if responses.is_none() => match opened {
                    Ok(response) => Event::Opened(response.into_inner()),
                    Err(status) => Event::Lost(Termination::ConnectionError, lost(&status)),
                },
                Ok(permit) = requests_in.clone().reserve_owned(), if self.session.wants_to_send() => {
                    Event::CanSend(permit)
                }
                Some(answer) = self.answers.recv() => Event::Answered(answer),
                Some(wish) = self.wishes.recv() => Event::Wished(wish),
                room = room(&self.batches, &self.answers_in), if slot.is_none() => match room {
                    Some(slot) => Event::CanDeliver(slot),
                    None => Event::Unwanted,
                },
                message = next(&mut responses), if responses.is_some() && slot.is_some() => match message {
                    Ok(response) => Event::Received(response),
                    Err((how, lost)) => Event::Lost(how, lost),
                },
                () = self.batches.closed() => Event::Unwanted,
            };
            match event {
                Event::Opened(streaming) => responses = Some(streaming),
                Event::CanSend(permit) => {
                    if let Some(request) = self.session.poll_send() {
                        permit.send(request);
                    }
                }
                Event::Answered((id, answer)) => {
                    self.session.answer(id, answer);
                    self.tell();
                }
                Event::Wished(wish) => take_wish(&mut self.session, wish),
                Event::CanDeliver(room) => slot = Some(room),
                Event::Received(response) => {
                    let bytes = response.encoded_len();
                    self.counts.received(&response.type_url, bytes);
                    if let Some(received) = self.session.response(now(), response)
                        && let Some(slot) = slot.take()
                    {
                        slot.fill(received);
                    }
                    self.tell();
                }
                Event::Lost(how, lost) => {
                    self.counts.terminated(how);
                    return Some(lost);
                }
                Event::Unwanted => return None,
            }
        }
    }

    fn tell(&self) {
        let status = self.session.status();
        self.status.send_if_modified(|old| {
            let changed = *old != status;
            *old = status;
            changed
        });
    }
}

fn take_wish(session: &mut Session, wish: Wish) {
    match wish {
        Wish::Ask(lookup) => {
            if let Err(error) = session.ask(now(), lookup) {
                // The asker's hold bound ends its wait; a log line each would let a scanning pod fill the log.
                tracing::debug!(%error, "a question was refused");
            }
        }
        Wish::Forget(lookups) => session.forget(lookups),
    }
}

impl Slot {
    fn fill(self, received: Received) {
        self.batch.send(Batch {
            resource_type: received.resource_type,
            version: received.version,
            updates: received.updates,
            rejected: received.rejected,
            acknowledge: Acknowledge::new(received.id, self.answer),
        });
    }
}

/// Waits for room for one more batch; `None` when nobody takes them.
async fn room(batches: &mpsc::Sender<Batch>, answers: &mpsc::Sender<Answer>) -> Option<Slot> {
    Some(Slot {
        answer: answers.clone().reserve_owned().await.ok()?,
        batch: batches.clone().reserve_owned().await.ok()?,
    })
}

/// CANCEL: nothing is lost, `Streaming::message` keeps what it has read.
async fn next(
    responses: &mut Option<Streaming<DeltaDiscoveryResponse>>,
) -> Result<DeltaDiscoveryResponse, (Termination, Lost)> {
    let Some(responses) = responses else {
        return std::future::pending().await;
    };
    match responses.message().await {
        Ok(Some(response)) => Ok(response),
        Ok(None) => {
            let reason = "the server ended the stream".to_owned();
            Err((Termination::Complete, Lost { reason }))
        }
        Err(status) => Err((Termination::Error, lost(&status))),
    }
}

fn lost(status: &tonic::Status) -> Lost {
    let mut reason = format!("{:?}: {}", status.code(), status.message());
    let mut source = status.source();
    while let Some(cause) = source {
        reason = format!("{reason}: {cause}");
        source = cause.source();
    }
    Lost { reason }
}

/// What goes into the metadata of each stream.
struct Credentials {
    headers: Vec<(String, String)>,
    token_path: Option<PathBuf>,
}

impl Credentials {
    fn new(config: &Config) -> Self {
        Self {
            headers: (config.headers.iter())
                .map(|(name, value)| (name.to_ascii_lowercase(), value.clone()))
                .collect(),
            token_path: config.token_path.clone(),
        }
    }

    /// The token is read each time: the kubelet replaces it.
    async fn put_into(&self, metadata: &mut tonic::metadata::MetadataMap) -> Result<(), String> {
        for (name, value) in &self.headers {
            let key = AsciiMetadataKey::from_bytes(name.as_bytes())
                .map_err(|error| format!("header {name:?}: {error}"))?;
            let value = AsciiMetadataValue::try_from(value.as_str())
                .map_err(|error| format!("header {name:?}: {error}"))?;
            metadata.insert(key, value);
        }
        if let Some(path) = &self.token_path {
            let token = tokio::fs::read_to_string(path)
                .await
                .map_err(|error| format!("token {}: {error}", path.display()))?;
            let mut value = AsciiMetadataValue::try_from(format!("Bearer {}", token.trim()))
                .map_err(|_| format!("token {}: not a header value", path.display()))?;
            value.set_sensitive(true);
            metadata.insert("authorization", value);
        }
        Ok(())
    }
}
