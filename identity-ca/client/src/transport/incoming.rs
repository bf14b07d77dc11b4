// SPDX-License-Identifier: Apache-2.0
use super::sources::{Place, Places, Sources};
use crate::{authority, verify};
use podveil_identity::SpiffeId;
use rustls::ServerConfig;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, Sleep};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Handshakes at once; above it new connections wait in the kernel's accept queue.
const MAX_HANDSHAKES: usize = 1024;
/// Of these from one address, so that one silent machine or pod does not take all; above it a new one is closed.
const MAX_HANDSHAKES_PER_SOURCE: usize = 64;
/// Connections of one identity: a node's programs need some four each, twice while one takes over, and those of before a
/// reboot are noticed late. Above it a new one is closed, so that a stolen key takes no more than a node's share.
const MAX_CONNECTIONS_PER_IDENTITY: usize = 32;
/// After a failed `accept` (no descriptors left), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Who is at the other end of a connection; in `request.extensions()` of each request on it.
#[derive(Clone, Debug)]
pub struct Peer {
    /// What its certificate proved; `None` where a client may come without one.
    pub id: Option<SpiffeId>,
    pub address: SocketAddr,
}

/// A connection whose handshake is done. It ends with the validity of the certificate that the client showed.
pub struct TlsConnection {
    stream: TlsStream<TcpStream>,
    peer: Peer,
    expired: Option<Pin<Box<Sleep>>>,
    /// Of its identity.
    _place: Option<Place<SpiffeId>>,
}

/// Connections that did not come about, since the start.
#[derive(Debug, Default)]
pub struct Refusals {
    failed: AtomicU64,
    identity: AtomicU64,
    source: AtomicU64,
}

impl Refusals {
    /// By reason, for a metric's label.
    pub fn read(&self) -> [(&'static str, u64); 3] {
        [
            ("handshake_failed", &self.failed),
            ("too_many_of_identity", &self.identity),
            ("too_many_handshakes_of_source", &self.source),
        ]
        .map(|(reason, count)| (reason, count.load(Ordering::Relaxed)))
    }
}

/// Accepts connections on `listener` and does their handshakes side by side, each within 5 s. `config` is asked for each
/// connection; while it answers `None` connections are closed. A handshake that fails is counted in `refusals`, logged and is
/// no item, like one above the bound of its identity; an item is never an error. The task behind it ends when the stream is
/// dropped.
pub fn incoming(
    listener: TcpListener,
    config: impl Fn() -> Option<Arc<ServerConfig>> + Send + 'static,
    refusals: Arc<Refusals>,
) -> impl Stream<Item = io::Result<TlsConnection>> + Send {
    let (done, connections) = mpsc::channel(1);
    tokio::spawn(accept(listener, config, refusals, done));
    ReceiverStream::new(connections)
}

async fn accept(
    listener: TcpListener,
    config: impl Fn() -> Option<Arc<ServerConfig>> + Send + 'static,
    refusals: Arc<Refusals>,
    done: mpsc::Sender<io::Result<TlsConnection>>,
) {
    let mut handshakes: JoinSet<Result<(), Refused>> = JoinSet::new();
    let identities = Places::new(MAX_CONNECTIONS_PER_IDENTITY);
    let sources = Sources::new(MAX_HANDSHAKES_PER_SOURCE);
    let mut log = RefusalLog::default();
    loop {
        tokio::select! {
            () = done.closed() => return,
            Some(ended) = handshakes.join_next() => if let Ok(Err(refused)) = ended {
                refusals.count(&refused.why);
                log.refused(&refused);
            },
            accepted = listener.accept(), if handshakes.len() < MAX_HANDSHAKES => match accepted {
                Ok((stream, address)) => {
                    let Some(config) = config() else { continue };
                    let Some(place) = sources.place(address.ip()) else {
                        let refused = Refused { address, why: Why::TooManyOfSource };
                        refusals.count(&refused.why);
                        log.refused(&refused);
                        continue;
                    };
                    let (done, identities) = (done.clone(), identities.clone());
                    handshakes.spawn(async move {
                        let _place = place;
                        match handshake(stream, address, config, &identities).await {
                            // The receiver is gone only when the server is.
                            Ok(connection) => drop(done.send(Ok(connection)).await),
                            Err(why) => return Err(Refused { address, why }),
                        }
                        Ok(())
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "could not accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
}

struct Refused {
    address: SocketAddr,
    why: Why,
}

#[derive(Debug, thiserror::Error)]
enum Why {
    #[error("TLS handshake failed")]
    Failed(#[from] io::Error),
    #[error("{0} has {MAX_CONNECTIONS_PER_IDENTITY} connections already")]
    TooManyOfIdentity(SpiffeId),
    #[error("too many handshakes from this address")]
    TooManyOfSource,
}

impl Refusals {
    fn count(&self, why: &Why) {
        let counter = match why {
            Why::Failed(_) => &self.failed,
            Why::TooManyOfIdentity(_) => &self.identity,
            Why::TooManyOfSource => &self.source,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// Anyone can make a handshake fail, so one line a second says so, with the number of those not written.
#[derive(Default)]
struct RefusalLog {
    last: Option<Instant>,
    unwritten: u64,
}

impl RefusalLog {
    fn refused(&mut self, refused: &Refused) {
        if self
            .last
            .is_some_and(|last| last.elapsed() < Duration::from_secs(1))
        {
            self.unwritten += 1;
            return;
        }
        tracing::warn!(
            address = %refused.address,
            error = authority::chain(&refused.why),
            others = self.unwritten,
            "a connection was refused"
        );
        *self = Self {
            last: Some(Instant::now()),
            unwritten: 0,
        };
    }
}

async fn handshake(
    stream: TcpStream,
    address: SocketAddr,
    config: Arc<ServerConfig>,
    identities: &Places<SpiffeId>,
) -> Result<TlsConnection, Why> {
    stream.set_nodelay(true)?;
    let accepted = TlsAcceptor::from(config).accept(stream);
    let stream = tokio::time::timeout(HANDSHAKE_TIMEOUT, accepted)
        .await
        .map_err(io::Error::from)??;
    let leaf = match stream.get_ref().1.peer_certificates() {
        Some(certificates) => Some(verify::leaf(certificates).map_err(io::Error::other)?),
        None => None,
    };
    let expired = leaf.as_ref().map(|leaf| {
        let left = leaf
            .not_after
            .duration_since(SystemTime::now())
            .unwrap_or_default();
        Box::pin(tokio::time::sleep(left))
    });
    let id = leaf.map(|leaf| leaf.id);
    let place = match &id {
        Some(id) => {
            let place = identities.place(id.clone());
            Some(place.ok_or_else(|| Why::TooManyOfIdentity(id.clone()))?)
        }
        // Whoever lets clients come without a certificate bounds them by their address.
        None => None,
    };
    Ok(TlsConnection {
        stream,
        peer: Peer { id, address },
        expired,
        _place: place,
    })
}

impl Connected for TlsConnection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for TlsConnection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Some(expired) = &mut self.expired
            && expired.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "the client's certificate has expired",
            )));
        }
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for TlsConnection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buffer)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl std::fmt::Debug for TlsConnection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsConnection")
            .field("peer", &self.peer)
            .finish_non_exhaustive()
    }
}
