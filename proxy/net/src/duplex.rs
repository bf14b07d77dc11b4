// SPDX-License-Identifier: Apache-2.0
use crate::Chunks;
use bytes::Bytes;
use std::io;
use std::task::{Context, Poll};

/// Why an end is no longer usable. Whatever the cause, the other end is reset: a lost connection is never a clean end.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq, thiserror::Error)]
pub enum Broken {
    /// The peer, or the application behind it, reset the connection.
    #[error("reset by peer")]
    Reset,
    /// The peer no longer answers (TCP keepalive or retransmission gave up).
    #[error("timed out")]
    TimedOut,
    /// The tunnel under the stream was lost.
    #[error("tunnel lost")]
    TunnelLost,
    /// Any other failure of the socket.
    #[error("socket failed: {0}")]
    Other(io::ErrorKind),
}

impl From<io::Error> for Broken {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::NotConnected => Self::Reset,
            io::ErrorKind::TimedOut => Self::TimedOut,
            kind => Self::Other(kind),
        }
    }
}

/// One end of a relayed connection: two independent directions, each of which ends cleanly, or both broken at once.
///
/// All methods are poll functions of one task, so that both directions need neither a lock nor a second task.
/// Dropping an end that has not ended cleanly in both directions resets it.
pub trait Duplex: Send + Unpin {
    /// How many bytes the relay may read ahead of what it has written onward. A TCP end stops at the first byte and
    /// leaves the rest to the kernel; an HBONE stream is bounded by its own window, and is emptied so that small frames
    /// are joined instead of queued.
    const READ_AHEAD: usize;

    /// The next bytes (never empty), or `None` at the clean end of this direction. Bytes received before a reset are
    /// given before it is reported.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>>;

    /// Says that so many bytes which [`Duplex::poll_read`] gave were written onward: only now may the peer send more.
    fn consumed(&mut self, bytes: usize);

    /// Writes what fits from the front of `chunks` (never empty), takes it from there, and says how much it was.
    fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        chunks: &mut Chunks,
    ) -> Poll<Result<usize, Broken>>;

    /// Ends the written direction cleanly. The other one goes on.
    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>>;

    /// Ready when the peer broke the connection, also while nothing is read or written. May stay pending for a peer that
    /// only stopped reading after its own clean end: a write finds that.
    fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<Broken>;

    /// Both directions ended cleanly: dropping it is no reset any more.
    fn end(&mut self);
}
