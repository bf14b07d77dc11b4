// SPDX-License-Identifier: Apache-2.0
use super::sources::Sources;
use crate::{authority, verify};
use podveil_identity::SpiffeId;
use rustls::ServerConfig;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
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
}

/// Accepts connections on `listener` and does their handshakes side by side, each within 5 s. `config` is asked for each
/// connection; while it answers `None` connections are closed. A handshake that fails is logged and is no item; an item
/// is never an error. The task behind it ends when the stream is dropped.
pub fn incoming(
    listener: TcpListener,
    config: impl Fn() -> Option<Arc<ServerConfig>> + Send + 'static,
) -> impl Stream<Item = io::Result<TlsConnection>> + Send {
    let (done, connections) = mpsc::channel(1);
    tokio::spawn(accept(listener, config, done));
    ReceiverStream::new(connections)
}

async fn accept(
    listener: TcpListener,
    config: impl Fn() -> Option<Arc<ServerConfig>> + Send + 'static,
    done: mpsc::Sender<io::Result<TlsConnection>>,
) {
    let mut handshakes: JoinSet<Result<(), Refused>> = JoinSet::new();
    let sources = Sources::new(MAX_HANDSHAKES_PER_SOURCE);
    let mut log = RefusalLog::default();
    loop {
        tokio::select! {
            () = done.closed() => return,
            Some(ended) = handshakes.join_next() => if let Ok(Err(refused)) = ended {
                log.refused(&refused);
            },
            accepted = listener.accept(), if handshakes.len() < MAX_HANDSHAKES => match accepted {
                Ok((stream, address)) => {
                    let Some(config) = config() else { continue };
                    let Some(place) = sources.place(address.ip()) else {
                        let error = io::Error::other("too many handshakes from this address");
                        log.refused(&Refused { address, error });
                        continue;
                    };
                    let done = done.clone();
                    handshakes.spawn(async move {
                        let _place = place;
                        match handshake(stream, address, config).await {
                            // The receiver is gone only when the server is.
                            Ok(connection) => drop(done.send(Ok(connection)).await),
                            Err(error) => return Err(Refused { address, error }),
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
    error: io::Error,
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
            error = authority::chain(&refused.error),
            others = self.unwritten,
            "TLS handshake failed"
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
) -> io::Result<TlsConnection> {
    stream.set_nodelay(true)?;
    let stream =
        tokio::time::timeout(HANDSHAKE_TIMEOUT, TlsAcceptor::from(config).accept(stream)).await??;
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
    Ok(TlsConnection {
        stream,
        peer: Peer {
            id: leaf.map(|leaf| leaf.id),
            address,
        },
        expired,
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
