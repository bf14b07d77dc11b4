// SPDX-License-Identifier: Apache-2.0
use crate::keepalive::Keepalive;
use crate::{HboneStream, Settings};
use bytes::Bytes;
use h2::client::{Connection, SendRequest};
use h2::{Reason, SendStream};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Uri, Version, header};
use std::fmt;
use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Notify, watch};

/// Stands for "the peer has not said": no SETTINGS can carry it.
const NOT_SAID: usize = usize::MAX - 1;

/// The client's side of one tunnel. A handle: clones are the same tunnel.
///
/// ```text
/// settling --SETTINGS--> open --GOAWAY, every handle dropped--> closing --last stream--> ended
///     `------ lost, silent, terminated: from anywhere ------------------------------------^
/// ```
#[derive(Clone)]
pub struct Tunnel {
    requests: SendRequest<Bytes>,
    shared: Arc<Shared>,
    phase: watch::Receiver<Phase>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Phase {
    /// The peer's SETTINGS have not arrived: one stream at a time.
    Settling,
    /// So many streams at a time.
    Open(usize),
    Ended,
}

struct Shared {
    streams: AtomicUsize,
    max_streams: usize,
    terminate: Notify,
}

/// The right to open one stream. Dropping it, or the stream made of it, gives the place back.
pub struct Slot {
    shared: Arc<Shared>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.shared.streams.fetch_sub(1, Ordering::Release);
    }
}

/// Why a tunnel takes no further stream.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq, thiserror::Error)]
pub enum NoSlot {
    /// The peer said GOAWAY, the tunnel was lost, or its stream ids are used up. It will never take one again.
    #[error("the tunnel takes no new streams")]
    Closing,
    /// As many streams as the peer or we allow.
    #[error("the tunnel is full")]
    Full,
    /// One stream is under way and the peer has not yet said how many it takes: [`Tunnel::reserve`] waits for that.
    #[error("the peer's settings are not known yet")]
    Settling,
}

/// What a CONNECT says.
#[derive(Clone, Debug)]
pub struct ConnectRequest {
    /// The workload's own address and port.
    pub authority: SocketAddr,
    pub baggage: Option<HeaderValue>,
    pub forwarded: Option<HeaderValue>,
    pub traceparent: Option<HeaderValue>,
}

/// Why a CONNECT gave no stream. No byte of the application was sent.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The peer did not look at the CONNECT: REFUSED_STREAM, or an id above its GOAWAY. Another tunnel may take it.
    #[error("the peer did not take the stream")]
    NotTaken(#[source] h2::Error),
    /// The tunnel broke before the answer. Whether the other proxy had connected to the application is not known.
    #[error("the tunnel was lost before the answer")]
    Lost(#[source] h2::Error),
    /// The other proxy answered and refused.
    #[error("the other proxy answered {status}")]
    Refused { status: StatusCode },
    /// The other proxy reset the stream instead of answering.
    #[error("the other proxy reset the stream")]
    Reset(#[source] h2::Error),
}

impl StreamError {
    /// The tunnel is at fault and not the destination: the same CONNECT may go to another tunnel to the same workload.
    pub fn may_move(&self) -> bool {
        matches!(self, Self::NotTaken(_) | Self::Lost(_))
    }
}

/// Why a tunnel ended.
#[derive(Debug, thiserror::Error)]
pub enum TunnelEnd {
    /// Nobody held it any more, or the peer went away in order.
    #[error("closed")]
    Closed,
    #[error("HTTP/2 failed")]
    Failed(#[source] h2::Error),
    #[error("no answer to a ping")]
    PingTimeout,
    #[error("terminated")]
    Terminated,
}

impl Tunnel {
    /// Starts HTTP/2 on a connection. The caller spawns the future, which ends when the tunnel has: it must run for
    /// anything to move. Dropping the future is as [`Tunnel::terminate`].
    ///
    /// # Errors
    /// [`TunnelEnd::Failed`] if not even the preface could be written. The caller has the deadline.
    pub async fn open<IO>(
        io: IO,
        settings: &Settings,
    ) -> Result<(Self, impl Future<Output = TunnelEnd> + Send + 'static), TunnelEnd>
    where
        IO: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (requests, mut connection) = h2::client::Builder::new()
            .enable_push(false)
            .initial_window_size(settings.stream_window)
            .initial_connection_window_size(settings.connection_window())
            .max_frame_size(settings.max_frame_size)
            .max_header_list_size(settings.max_header_list_size)
            .max_send_buffer_size(settings.send_buffer)
            .initial_max_send_streams(NOT_SAID)
            .handshake(io)
            .await
            .map_err(TunnelEnd::Failed)?;
        let keepalive = connection
            .ping_pong()
            .map(|pings| Keepalive::new(pings, settings));
        let shared = Arc::new(Shared {
            streams: AtomicUsize::new(0),
            max_streams: settings.max_streams as usize,
            terminate: Notify::new(),
        });
        let (sender, phase) = watch::channel(Phase::Settling);
        let driver = drive(connection, keepalive, shared.clone(), sender);
        let tunnel = Self {
            requests,
            shared,
            phase,
        };
        Ok((tunnel, driver))
    }

    /// A place for one stream, now or not at all.
    ///
    /// # Errors
    /// [`NoSlot`].
    pub fn try_reserve(&self) -> Result<Slot, NoSlot> {
        let phase = *self.phase.borrow();
        let limit = match phase {
            Phase::Settling => 1,
            Phase::Open(limit) => limit.min(self.shared.max_streams),
            Phase::Ended => return Err(NoSlot::Closing),
        };
        if self.is_closing() {
            return Err(NoSlot::Closing);
        }
        let taken =
            self.shared
                .streams
                .fetch_update(Ordering::Acquire, Ordering::Relaxed, |streams| {
                    (streams < limit).then_some(streams + 1)
                });
        match (taken, phase) {
            (Ok(_), _) => Ok(Slot {
                shared: self.shared.clone(),
            }),
            (Err(_), Phase::Settling) => Err(NoSlot::Settling),
            (Err(_), _) => Err(NoSlot::Full),
        }
    }

    /// As [`Tunnel::try_reserve`], but waits while the peer's settings are not known. The caller has the deadline.
    ///
    /// # Errors
    /// [`NoSlot::Closing`] or [`NoSlot::Full`].
    pub async fn reserve(&self) -> Result<Slot, NoSlot> {
        match self.try_reserve() {
            Err(NoSlot::Settling) => {}
            outcome => return outcome,
        }
        // An error means that the driver is gone: the next attempt says so.
        let _ = self
            .phase
            .clone()
            .wait_for(|phase| *phase != Phase::Settling)
            .await;
        match self.try_reserve() {
            Err(NoSlot::Settling) => Err(NoSlot::Closing),
            outcome => outcome,
        }
    }

    /// Sends the CONNECT and waits for the answer; gives the stream and the answer's headers. The caller has the
    /// deadline.
    ///
    /// # Errors
    /// [`StreamError`].
    ///
    /// CANCEL: dropping the future resets the stream.
    pub async fn connect(
        &self,
        slot: Slot,
        request: ConnectRequest,
    ) -> Result<(HboneStream, HeaderMap), StreamError> {
        let (response, send) = self
            .requests
            .clone()
            .send_request(request.into_http(), false)
            .map_err(StreamError::NotTaken)?;
        let mut unanswered = Unanswered(Some(send));
        let (head, recv) = response
            .await
            .map_err(StreamError::from_response)?
            .into_parts();
        match unanswered.0.take() {
            Some(send) if head.status == StatusCode::OK => {
                Ok((HboneStream::new(send, recv, Some(slot)), head.headers))
            }
            _ => Err(StreamError::Refused {
                status: head.status,
            }),
        }
    }

    /// Streams under way, reserved places included.
    pub fn streams(&self) -> usize {
        self.shared.streams.load(Ordering::Relaxed)
    }

    /// Whether it will never take a stream again: GOAWAY, lost, terminated, or out of stream ids.
    pub fn is_closing(&self) -> bool {
        // HTTP/2 tells that a GOAWAY came only to who asks for room.
        let mut cx = Context::from_waker(Waker::noop());
        *self.phase.borrow() == Phase::Ended
            || matches!(
                self.requests.clone().poll_ready(&mut cx),
                Poll::Ready(Err(_))
            )
    }

    /// Resolves when the tunnel has ended.
    pub async fn ended(&self) {
        // An error means that the driver was dropped, which ends the tunnel as well.
        let _ = self
            .phase
            .clone()
            .wait_for(|phase| *phase == Phase::Ended)
            .await;
    }

    /// Ends the tunnel and resets its streams now.
    pub fn terminate(&self) {
        self.shared.terminate.notify_one();
    }
}

/// A CONNECT that waits for its answer. The client's giving up is a reset like any other.
struct Unanswered(Option<SendStream<Bytes>>);

impl Drop for Unanswered {
    fn drop(&mut self) {
        if let Some(mut send) = self.0.take() {
            send.send_reset(Reason::CONNECT_ERROR);
        }
    }
}

impl ConnectRequest {
    fn into_http(self) -> Request<()> {
        let uri = Uri::builder()
            .authority(self.authority.to_string())
            .build()
            .expect("an address and a port are a legal authority");
        let mut request = Request::new(());
        *request.method_mut() = Method::CONNECT;
        *request.uri_mut() = uri;
        *request.version_mut() = Version::HTTP_2;
        let headers = [
            (HeaderName::from_static("baggage"), self.baggage),
            (header::FORWARDED, self.forwarded),
            (HeaderName::from_static("traceparent"), self.traceparent),
        ];
        for (name, value) in headers {
            if let Some(value) = value {
                request.headers_mut().insert(name, value);
            }
        }
        request
    }
}

impl StreamError {
    fn from_response(error: h2::Error) -> Self {
        let refused = error.reason() == Some(Reason::REFUSED_STREAM);
        if error.is_remote() && (error.is_go_away() || error.is_reset() && refused) {
            Self::NotTaken(error)
        } else if error.is_reset() {
            Self::Reset(error)
        } else {
            Self::Lost(error)
        }
    }
}

/// Moves the tunnel's bytes until it ends.
fn drive<IO>(
    connection: Connection<IO, Bytes>,
    mut keepalive: Option<Keepalive>,
    shared: Arc<Shared>,
    phase: watch::Sender<Phase>,
) -> impl Future<Output = TunnelEnd> + Send + 'static
where
    IO: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    // Boxed: HTTP/2's state is several KiB, and a caller that holds this future should not be.
    let mut connection = Box::new(connection);
    let mut settling = true;
    async move {
        let end = {
            let mut terminate = std::pin::pin!(shared.terminate.notified());
            poll_fn(|cx| {
                if terminate.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(TunnelEnd::Terminated);
                }
                if let Some(keepalive) = &mut keepalive
                    && keepalive.poll(cx).is_ready()
                {
                    return Poll::Ready(TunnelEnd::PingTimeout);
                }
                let outcome = Pin::new(&mut *connection).poll(cx);
                // Asked once: HTTP/2 itself queues what a limit lowered later does not allow.
                if settling {
                    let limit = connection.max_concurrent_send_streams();
                    settling = limit == NOT_SAID;
                    if !settling {
                        phase.send_replace(Phase::Open(limit));
                    }
                }
                outcome.map(|outcome| match outcome {
                    Ok(()) => TunnelEnd::Closed,
                    Err(error) => TunnelEnd::Failed(error),
                })
            })
            .await
        };
        // The connection first, which breaks its streams: whoever waits for the end finds them broken.
        drop(connection);
        phase.send_replace(Phase::Ended);
        end
    }
}

impl fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tunnel")
            .field("streams", &self.streams())
            .field("phase", &*self.phase.borrow())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slot").finish_non_exhaustive()
    }
}
