// SPDX-License-Identifier: Apache-2.0
//! Connections whose client showed no certificate: needed for first contact, and open to everybody who can reach the CA.
//! They are few and short, so that they cannot use up what programs with an SVID need.

use podveil_ca_client::transport::{Peer, Place, Sources, TlsConnection};
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Sleep;
use tokio_stream::{Stream, StreamExt};
use tonic::transport::server::Connected;

/// At once; one above is closed, and its program tries again.
const MAX_ANONYMOUS: usize = 512;
/// Of these from one address: a node has two or three programs.
const MAX_ANONYMOUS_PER_SOURCE: usize = 32;
/// One request for an SVID takes some milliseconds.
const LIFE: Duration = Duration::from_secs(20);

/// A connection, bounded in time if it is anonymous.
#[derive(Debug)]
pub struct Bounded<T> {
    connection: T,
    anonymous: Option<Anonymous>,
}

#[derive(Debug)]
struct Anonymous {
    end: Pin<Box<Sleep>>,
    _place: (OwnedSemaphorePermit, Place<IpAddr>),
}

/// `connections`, of which those without a certificate are bounded in number and time.
pub fn bound(
    connections: impl Stream<Item = io::Result<TlsConnection>> + Send,
) -> impl Stream<Item = io::Result<Bounded<TlsConnection>>> + Send {
    let places = Places {
        all: Arc::new(Semaphore::new(MAX_ANONYMOUS)),
        sources: Sources::new(MAX_ANONYMOUS_PER_SOURCE),
    };
    connections.filter_map(move |connection| match connection {
        Ok(connection) => {
            let peer = connection.connect_info();
            let anonymous = peer.id.is_none().then_some(peer.address.ip());
            Bounded::new(connection, anonymous, &places).map(Ok)
        }
        Err(error) => Some(Err(error)),
    })
}

/// What connections without a certificate share.
#[derive(Debug)]
struct Places {
    all: Arc<Semaphore>,
    sources: Sources,
}

impl Places {
    fn take(&self, address: IpAddr) -> Option<(OwnedSemaphorePermit, Place<IpAddr>)> {
        let place = self.sources.place(address)?;
        let one = self.all.clone().try_acquire_owned().ok()?;
        Some((one, place))
    }
}

impl<T> Bounded<T> {
    /// `anonymous`: where a connection without a certificate comes from. `None` where there is no place for another.
    fn new(connection: T, anonymous: Option<IpAddr>, places: &Places) -> Option<Self> {
        let anonymous = match anonymous {
            Some(address) => {
                let Some(place) = places.take(address) else {
                    tracing::debug!(%address, "too many connections without a certificate");
                    return None;
                };
                Some(Anonymous {
                    end: Box::pin(tokio::time::sleep(LIFE)),
                    _place: place,
                })
            }
            None => None,
        };
        Some(Self {
            connection,
            anonymous,
        })
    }
}

impl<T: Connected<ConnectInfo = Peer>> Connected for Bounded<T> {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.connection.connect_info()
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Bounded<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Some(anonymous) = &mut self.anonymous
            && anonymous.end.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Pin::new(&mut self.connection).poll_read(cx, buffer)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Bounded<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.connection).poll_write(cx, buffer)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;
    use tokio::io::AsyncReadExt;

    const ONE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));
    const OTHER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2));

    fn places(all: usize, per_source: usize) -> Places {
        Places {
            all: Arc::new(Semaphore::new(all)),
            sources: Sources::new(per_source),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_anonymous_connection_ends_and_another_does_not() {
        let places = places(1, 1);
        let (_far, near) = tokio::io::duplex(64);
        let mut anonymous = Bounded::new(near, Some(ONE), &places).unwrap();
        let (_far_too, near) = tokio::io::duplex(64);
        let mut known = Bounded::new(near, None, &places).unwrap();
        let waiting = tokio::spawn(async move { known.read_u8().await });
        let error = anonymous.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(!waiting.is_finished());
        waiting.abort();
    }

    #[tokio::test]
    async fn above_the_bound_only_anonymous_connections_are_closed() {
        let places = places(1, 1);
        let first = Bounded::new((), Some(ONE), &places);
        assert!(Bounded::new((), Some(ONE), &places).is_none());
        assert!(Bounded::new((), None, &places).is_some());
        drop(first);
        assert!(Bounded::new((), Some(ONE), &places).is_some());
    }

    #[tokio::test]
    async fn one_address_does_not_take_all_places() {
        let places = places(3, 2);
        let one = [(); 3].map(|()| Bounded::new((), Some(ONE), &places));
        assert_eq!(one.map(|place| place.is_some()), [true, true, false]);
        let held = [(); 2].map(|()| Bounded::new((), Some(ONE), &places));
        assert!(held.iter().all(Option::is_some));
        assert!(Bounded::new((), Some(OTHER), &places).is_some());
    }
}
