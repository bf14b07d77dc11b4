// SPDX-License-Identifier: Apache-2.0
use crate::{Broken, Chunks, Duplex};
use bytes::{Bytes, BytesMut};
use socket2::{SockRef, TcpKeepalive};
use std::cell::Cell;
use std::future::Future;
use std::io::{self, IoSlice, Read};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::Interest;
use tokio::net::TcpStream;

/// The most that one read takes from a socket: one DATA frame, eight TLS records, one `writev`.
pub const READ_CHUNK: usize = 128 * 1024;
/// What one read takes from a socket that is not in the middle of a transfer.
const FIRST_READ: usize = 16 * 1024;
/// Pieces in one vectored write.
const SLICES: usize = 32;

const KEEPALIVE_IDLE: Duration = Duration::from_secs(180);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(9);
const KEEPALIVE_PROBES: u32 = 9;
/// Longer than a ping's timeout: HTTP/2 notices first, this is for a tunnel whose driver is stuck in a write.
const TUNNEL_UNACKNOWLEDGED: Duration = Duration::from_secs(30);

thread_local! {
    /// Taken while in use.
    static SCRATCH: Cell<Box<[u8]>> = Cell::default();
}

/// Options of every socket towards an application: no delay, keepalive, and SO_LINGER {on, 0}, so that whatever ends
/// this process or this connection before its clean end is a reset for the application.
///
/// # Errors
/// Of the kernel; the connection is to be dropped.
pub fn prepare_application(socket: &impl AsFd) -> io::Result<()> {
    let socket = SockRef::from(socket);
    prepare(&socket)?;
    socket.set_linger(Some(Duration::ZERO))
}

/// Options of a tunnel's socket: no delay, keepalive, and a bound on unacknowledged data.
///
/// # Errors
/// Of the kernel; the connection is to be dropped.
pub fn prepare_tunnel(stream: &TcpStream) -> io::Result<()> {
    let socket = SockRef::from(stream);
    prepare(&socket)?;
    socket.set_tcp_user_timeout(Some(TUNNEL_UNACKNOWLEDGED))?;
    socket.set_linger(None)
}

fn prepare(socket: &SockRef<'_>) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(KEEPALIVE_IDLE)
            .with_interval(KEEPALIVE_INTERVAL)
            .with_retries(KEEPALIVE_PROBES),
    )
}

/// A TCP connection as one end of a relay. It must have been prepared with [`prepare_application`].
///
/// An idle connection holds no buffer: small reads go through a buffer of the thread and are copied out; only in the
/// middle of a transfer reads go, ever larger, to memory of their own, which is passed on without copying.
pub struct TcpEnd {
    stream: Arc<TcpStream>,
    /// The size of the next read; [`FIRST_READ`] at rest.
    read_size: usize,
    /// Waits for an error of the socket. Made when first needed: most connections never do.
    watch: Option<Pin<Box<dyn Future<Output = Broken> + Send>>>,
    /// Found by `watch`, which takes it from the kernel: from then on a read of 0 bytes is no clean end.
    broken: Option<Broken>,
}

impl TcpEnd {
    pub fn new(stream: TcpStream) -> Self {
        Self {
            stream: Arc::new(stream),
            read_size: FIRST_READ,
            watch: None,
            broken: None,
        }
    }

    /// Reads little: through the thread's buffer, so that nothing is allocated before the size is known.
    fn try_read_small(&self) -> io::Result<Bytes> {
        let mut scratch = SCRATCH.take();
        if scratch.is_empty() {
            scratch = vec![0; FIRST_READ].into();
        }
        let mut read = None;
        let outcome = self.stream.try_io(Interest::READABLE, || {
            let count = (&*SockRef::from(&*self.stream)).read(&mut scratch)?;
            read = Some(count);
            // A short read has emptied the socket. Saying so here makes tokio wait for the next event, where it would
            // otherwise need one more system call to find out.
            if 0 < count && count < FIRST_READ {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            Ok(())
        });
        let bytes = match (read, outcome) {
            (Some(count), _) => Ok(Bytes::copy_from_slice(&scratch[..count])),
            (None, Err(error)) => Err(error),
            (None, Ok(())) => Err(io::ErrorKind::WouldBlock.into()),
        };
        SCRATCH.set(scratch);
        bytes
    }

    fn try_read(&mut self) -> io::Result<Bytes> {
        let bytes = if self.read_size == FIRST_READ {
            self.try_read_small()?
        } else {
            let mut buffer = BytesMut::with_capacity(self.read_size);
            self.stream.try_read_buf(&mut buffer)?;
            buffer.freeze()
        };
        if bytes.len() >= self.read_size {
            self.read_size = (self.read_size * 2).min(READ_CHUNK);
        } else if bytes.len() < self.read_size / 4 {
            self.read_size = (self.read_size / 2).max(FIRST_READ);
        }
        Ok(bytes)
    }
}

impl Duplex for TcpEnd {
    const READ_AHEAD: usize = 1;

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>> {
        loop {
            ready!(self.stream.poll_read_ready(cx))?;
            match self.try_read() {
                Ok(bytes) if bytes.is_empty() => {
                    return Poll::Ready(self.broken.map_or(Ok(None), Err));
                }
                Ok(bytes) => return Poll::Ready(Ok(Some(bytes))),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.read_size = FIRST_READ;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }

    fn consumed(&mut self, _bytes: usize) {}

    fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        chunks: &mut Chunks,
    ) -> Poll<Result<usize, Broken>> {
        loop {
            ready!(self.stream.poll_write_ready(cx))?;
            let mut slices = [IoSlice::new(&[]); SLICES];
            let filled = chunks.io_slices(&mut slices);
            match self.stream.try_write_vectored(&slices[..filled]) {
                Ok(written) => {
                    chunks.advance(written);
                    return Poll::Ready(Ok(written));
                }
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                    ) => {}
                Err(error) => return Poll::Ready(Err(self.broken.unwrap_or(error.into()))),
            }
        }
    }

    fn poll_finish(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        Poll::Ready(
            SockRef::from(&*self.stream)
                .shutdown(Shutdown::Write)
                .map_err(|error| self.broken.unwrap_or(error.into())),
        )
    }

    fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<Broken> {
        if let Some(broken) = self.broken {
            return Poll::Ready(broken);
        }
        let stream = &self.stream;
        let watch = self
            .watch
            .get_or_insert_with(|| Box::pin(wait_for_error(stream.clone())));
        let broken = ready!(watch.as_mut().poll(cx));
        self.broken = Some(broken);
        self.watch = None;
        Poll::Ready(broken)
    }

    /// From here on a close lets the kernel deliver what is left.
    fn end(&mut self) {
        if let Err(error) = SockRef::from(&*self.stream).set_linger(None) {
            tracing::debug!(%error, "cannot take back SO_LINGER from an ended connection");
        }
    }
}

/// EPOLLERR: the peer's reset, or the kernel gave up.
async fn wait_for_error(stream: Arc<TcpStream>) -> Broken {
    match stream.ready(Interest::ERROR).await {
        Ok(_) => match stream.take_error() {
            Ok(Some(error)) | Err(error) => error.into(),
            Ok(None) => Broken::Reset,
        },
        Err(error) => error.into(),
    }
}

impl std::fmt::Debug for TcpEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TcpEnd")
            .field("stream", &self.stream)
            .field("broken", &self.broken)
            .finish_non_exhaustive()
    }
}
