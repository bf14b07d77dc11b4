// SPDX-License-Identifier: Apache-2.0
use crate::tunnel::Slot;
use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};
use podveil_net::{Broken, Chunks, Duplex};
use std::fmt;
use std::task::{Context, Poll, ready};

/// Window is given back in steps of this size: each step takes the tunnel's lock, and HTTP/2 tells the peer only about
/// half a window at once anyway.
const RELEASE: usize = 64 * 1024;

/// One application connection inside a tunnel.
///
/// Dropping it before both directions ended cleanly sends `RST_STREAM` CONNECT_ERROR.
pub struct HboneStream {
    send: SendStream<Bytes>,
    recv: RecvStream,
    /// Read and written onward, not yet given back to the peer's window.
    unreleased: usize,
    /// END_STREAM was read.
    ended: bool,
    /// END_STREAM was sent.
    finished: bool,
    /// The place in the tunnel; the server counts for itself.
    _slot: Option<Slot>,
}

impl HboneStream {
    pub(crate) fn new(send: SendStream<Bytes>, recv: RecvStream, slot: Option<Slot>) -> Self {
        Self {
            send,
            recv,
            unreleased: 0,
            ended: false,
            finished: false,
            _slot: slot,
        }
    }

    /// The peer has ended its own direction and only wants no more of ours (RFC 9113 §8.1; ztunnel says CANCEL there).
    fn is_only_deaf(&self, reason: Reason) -> bool {
        self.ended && matches!(reason, Reason::NO_ERROR | Reason::CANCEL)
    }

    /// Why nothing can be sent any more.
    fn why(&mut self, cx: &mut Context<'_>) -> Broken {
        match self.send.poll_reset(cx) {
            Poll::Ready(Err(error)) => broken(&error),
            Poll::Ready(Ok(_)) | Poll::Pending => Broken::Reset,
        }
    }
}

fn broken(error: &h2::Error) -> Broken {
    if error.is_reset() {
        Broken::Reset
    } else {
        Broken::TunnelLost
    }
}

impl Duplex for HboneStream {
    /// Bounded by the stream's window: what is read and not consumed is not granted again.
    const READ_AHEAD: usize = usize::MAX;

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>> {
        loop {
            match ready!(self.recv.poll_data(cx)) {
                // An empty frame: padding, or END_STREAM on its own.
                Some(Ok(bytes)) if bytes.is_empty() => {}
                Some(Ok(bytes)) => return Poll::Ready(Ok(Some(bytes))),
                Some(Err(error)) => return Poll::Ready(Err(broken(&error))),
                None => {
                    self.ended = true;
                    return Poll::Ready(Ok(None));
                }
            }
        }
    }

    fn consumed(&mut self, bytes: usize) {
        self.unreleased += bytes;
        // After the end nothing more comes on this stream, but the tunnel's window is everybody's.
        if self.unreleased >= RELEASE || self.ended {
            if let Err(error) = self.recv.flow_control().release_capacity(self.unreleased) {
                tracing::debug!(%error, "window not given back");
            }
            self.unreleased = 0;
        }
    }

    fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        chunks: &mut Chunks,
    ) -> Poll<Result<usize, Broken>> {
        self.send.reserve_capacity(chunks.len());
        let mut room = self.send.capacity();
        while room == 0 {
            room = match ready!(self.send.poll_capacity(cx)) {
                Some(Ok(room)) => room,
                Some(Err(_)) | None => return Poll::Ready(Err(self.why(cx))),
            };
        }
        let piece = chunks.take(room);
        let written = piece.len();
        match self.send.send_data(piece, false) {
            Ok(()) => Poll::Ready(Ok(written)),
            Err(_) => Poll::Ready(Err(self.why(cx))),
        }
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        if self.send.send_data(Bytes::new(), true).is_err() {
            // Nothing is lost if the peer stopped listening after its own end: there was nothing left to say.
            match self.send.poll_reset(cx) {
                Poll::Ready(Ok(reason)) if self.is_only_deaf(reason) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(broken(&error))),
                Poll::Ready(Ok(_)) | Poll::Pending => return Poll::Ready(Err(Broken::Reset)),
            }
        }
        self.finished = true;
        Poll::Ready(Ok(()))
    }

    fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<Broken> {
        match ready!(self.send.poll_reset(cx)) {
            Ok(reason) if self.is_only_deaf(reason) => Poll::Pending,
            Ok(_) => Poll::Ready(Broken::Reset),
            Err(error) => Poll::Ready(broken(&error)),
        }
    }

    fn end(&mut self) {}
}

impl Drop for HboneStream {
    fn drop(&mut self) {
        if !(self.ended && self.finished) {
            self.send.send_reset(Reason::CONNECT_ERROR);
        }
    }
}

impl fmt::Debug for HboneStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HboneStream")
            .field("id", &self.send.stream_id().as_u32())
            .field("ended", &self.ended)
            .field("finished", &self.finished)
            .finish_non_exhaustive()
    }
}
