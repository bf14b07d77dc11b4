// SPDX-License-Identifier: Apache-2.0
use crate::keepalive::Keepalive;
use crate::settings::MAX_RESET_UNSEEN;
use crate::{Authority, AuthorityError, Baggage, Forwarded, HboneStream, Settings, TunnelEnd};
use bytes::Bytes;
use h2::server::{Connection, SendResponse};
use h2::{Reason, RecvStream};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header, request};
use std::fmt;
use std::future::poll_fn;
use std::task::Poll;
use tokio::io::{AsyncRead, AsyncWrite};

/// The server's side of one tunnel.
pub struct Server<IO> {
    // Boxed: HTTP/2's state is several KiB.
    connection: Box<Connection<IO, Bytes>>,
    keepalive: Option<Keepalive>,
}

/// A request of the client, not yet answered. Dropping it resets the stream (CONNECT_ERROR).
pub struct Incoming {
    head: Box<request::Parts>,
    /// `None` once answered.
    open: Option<(SendResponse<Bytes>, RecvStream)>,
}

impl<IO> Server<IO>
where
    IO: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    /// Reads the preface and sends our settings. The caller has the deadline.
    ///
    /// # Errors
    /// [`TunnelEnd::Failed`].
    pub async fn handshake(io: IO, settings: &Settings) -> Result<Self, TunnelEnd> {
        let mut connection = h2::server::Builder::new()
            .initial_window_size(settings.stream_window)
            .initial_connection_window_size(settings.connection_window())
            .max_concurrent_streams(settings.max_streams)
            .max_frame_size(settings.max_frame_size)
            .max_header_list_size(settings.max_header_list_size)
            .max_send_buffer_size(settings.send_buffer)
            .max_pending_accept_reset_streams(MAX_RESET_UNSEEN)
            .handshake(io)
            .await
            .map_err(TunnelEnd::Failed)?;
        let keepalive = connection
            .ping_pong()
            .map(|pings| Keepalive::new(pings, settings));
        Ok(Self {
            connection: Box::new(connection),
            keepalive,
        })
    }

    /// The next request, or why the tunnel ended. Everything moves only while this is awaited: call it in a loop, and
    /// work on the requests elsewhere.
    ///
    /// # Errors
    /// [`TunnelEnd`]; not to be called again.
    ///
    /// CANCEL: nothing is lost, await it again.
    pub async fn accept(&mut self) -> Result<Incoming, TunnelEnd> {
        poll_fn(|cx| {
            if let Some(keepalive) = &mut self.keepalive
                && keepalive.poll(cx).is_ready()
            {
                return Poll::Ready(Err(TunnelEnd::PingTimeout));
            }
            self.connection
                .poll_accept(cx)
                .map(|request| match request {
                    Some(Ok((request, respond))) => {
                        let (head, body) = request.into_parts();
                        Ok(Incoming {
                            head: Box::new(head),
                            open: Some((respond, body)),
                        })
                    }
                    Some(Err(error)) => Err(TunnelEnd::Failed(error)),
                    None => Err(TunnelEnd::Closed),
                })
        })
        .await
    }

    /// Says GOAWAY: no new streams, those that run go on. [`Server::accept`] returns [`TunnelEnd::Closed`] when the
    /// last has ended.
    pub fn drain(&mut self) {
        self.connection.graceful_shutdown();
    }
}

impl Incoming {
    pub fn method(&self) -> &Method {
        &self.head.method
    }

    /// The target of the CONNECT.
    ///
    /// # Errors
    /// [`AuthorityError`].
    pub fn authority(&self) -> Result<Authority, AuthorityError> {
        self.head
            .uri
            .authority()
            .ok_or(AuthorityError::BadHost)?
            .as_str()
            .parse()
    }

    /// What the peer says about the source. `None` if it says nothing or nothing that can be read.
    pub fn baggage(&self) -> Option<Baggage> {
        self.hint("baggage")
    }

    /// What the peer says about the application's connection.
    pub fn forwarded(&self) -> Option<Forwarded> {
        self.hint(header::FORWARDED.as_str())
    }

    fn hint<T: std::str::FromStr>(&self, name: &str) -> Option<T> {
        self.head.headers.get(name)?.to_str().ok()?.parse().ok()
    }

    pub fn headers(&self) -> &HeaderMap {
        &self.head.headers
    }

    /// Resolves when the client gave up or the tunnel is lost, for use beside the connect to the application.
    pub async fn abandoned(&mut self) {
        if let Some((respond, _)) = &mut self.open {
            // Either way the stream is over.
            let _ = poll_fn(|cx| respond.poll_reset(cx)).await;
        }
    }

    /// Answers 200; `None` if the client is gone.
    pub fn accept(mut self, baggage: Option<HeaderValue>) -> Option<HboneStream> {
        let (mut respond, body) = self.open.take()?;
        let mut response = Response::new(());
        if let Some(baggage) = baggage {
            response.headers_mut().insert("baggage", baggage);
        }
        let send = respond.send_response(response, false).ok()?;
        Some(HboneStream::new(send, body, None))
    }

    /// Answers with an error status and ends the stream.
    pub fn refuse(mut self, status: StatusCode) {
        if let Some((mut respond, _body)) = self.open.take() {
            let mut response = Response::new(());
            *response.status_mut() = status;
            if let Err(error) = respond.send_response(response, true) {
                tracing::debug!(%error, "the client was gone before it was refused");
            }
        }
    }

    /// Resets the stream without an answer: [`Reason::REFUSED_STREAM`] lets the client try another tunnel.
    pub fn reset(mut self, reason: Reason) {
        if let Some((mut respond, _body)) = self.open.take() {
            respond.send_reset(reason);
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if let Some((respond, _)) = &mut self.open {
            respond.send_reset(Reason::CONNECT_ERROR);
        }
    }
}

impl<IO> fmt::Debug for Server<IO> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").finish_non_exhaustive()
    }
}

impl fmt::Debug for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Incoming")
            .field("method", &self.head.method)
            .field("uri", &self.head.uri)
            .field("answered", &self.open.is_none())
            .finish_non_exhaustive()
    }
}
