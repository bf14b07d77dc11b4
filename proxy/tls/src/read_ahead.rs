// SPDX-License-Identifier: Apache-2.0
use std::cell::Cell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Four full TLS records.
const READ: usize = 64 * 1024;

thread_local! {
    /// Taken while in use, so that one connection inside another does no harm.
    static SCRATCH: Cell<Box<[u8]>> = Cell::default();
}

/// Reads up to 64 KiB at a time from a socket for rustls, which asks for 4 KiB at a time.
///
/// While the connection is idle or carries small messages nothing is allocated: the first read of a burst goes through
/// a buffer of the thread, and what rustls did not take is kept; the rest of the burst is read into that memory, which is
/// given back when the socket has nothing more.
#[derive(Debug)]
pub struct ReadAhead<IO> {
    io: IO,
    /// Empty or [`READ`] bytes long.
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl<IO> ReadAhead<IO> {
    pub fn new(io: IO) -> Self {
        Self {
            io,
            buffer: Box::default(),
            start: 0,
            end: 0,
        }
    }

    pub fn get_ref(&self) -> &IO {
        &self.io
    }

    fn take(&mut self, target: &mut ReadBuf<'_>) {
        let count = target.remaining().min(self.end - self.start);
        target.put_slice(&self.buffer[self.start..self.start + count]);
        self.start += count;
    }
}

impl<IO: AsyncRead + Unpin> ReadAhead<IO> {
    /// Reads into `scratch`: what `target` has no room for is kept.
    fn poll_burst_begin(
        &mut self,
        cx: &mut Context<'_>,
        target: &mut ReadBuf<'_>,
        scratch: &mut [u8],
    ) -> Poll<io::Result<()>> {
        let mut read = ReadBuf::new(scratch);
        ready!(Pin::new(&mut self.io).poll_read(cx, &mut read))?;
        let (now, later) = read
            .filled()
            .split_at(target.remaining().min(read.filled().len()));
        target.put_slice(now);
        if !later.is_empty() {
            self.buffer = zeroed();
            self.buffer[..later.len()].copy_from_slice(later);
            (self.start, self.end) = (0, later.len());
        }
        Poll::Ready(Ok(()))
    }
}

fn zeroed() -> Box<[u8]> {
    vec![0; READ].into_boxed_slice()
}

impl<IO: AsyncRead + Unpin> AsyncRead for ReadAhead<IO> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        target: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.start < this.end {
            this.take(target);
            return Poll::Ready(Ok(()));
        }
        if target.remaining() >= READ {
            return Pin::new(&mut this.io).poll_read(cx, target);
        }
        if this.buffer.is_empty() {
            let mut scratch = SCRATCH.take();
            if scratch.is_empty() {
                scratch = zeroed();
            }
            let outcome = this.poll_burst_begin(cx, target, &mut scratch);
            SCRATCH.set(scratch);
            return outcome;
        }
        let mut read = ReadBuf::new(&mut this.buffer);
        match Pin::new(&mut this.io).poll_read(cx, &mut read) {
            Poll::Pending => {
                this.buffer = Box::default();
                Poll::Pending
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Ready(Ok(())) => {
                (this.start, this.end) = (0, read.filled().len());
                this.take(target);
                Poll::Ready(Ok(()))
            }
        }
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for ReadAhead<IO> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
