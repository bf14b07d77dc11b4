// SPDX-License-Identifier: Apache-2.0
//! The least that a client and a server can do, so that a figure is the way's own: one thread each, which stays in its
//! namespace.

use anyhow::{Context, ensure};
use nix::sys::socket::{Shutdown, shutdown};
use podveil_netns::NetNs;
use podveil_sim::in_netns;
use socket2::{Domain, SockRef, Socket, Type};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const BACKLOG: i32 = 1024;
const CHUNK_BYTES: usize = 128 * 1024;
const PATIENCE: Duration = Duration::from_secs(10);
/// As long as the address that a proxy would send.
const WORD: [u8; 6] = [1; 6];

/// What is done with connections.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// Each brings a word and is reset.
    Connections = 0,
    /// A byte each way on one.
    Requests = 1,
    /// As much as one takes, to the client.
    Stream = 2,
}

impl Kind {
    pub const ALL: [Self; 3] = [Self::Connections, Self::Requests, Self::Stream];

    /// What [`measure`] counts of it, and what that is divided by.
    pub fn unit(self) -> (&'static str, f64) {
        match self {
            Self::Connections => ("connections/s", 1.0),
            Self::Requests => ("requests/s", 1.0),
            Self::Stream => ("one stream, MB/s", 1e6),
        }
    }
}

/// Answers on a port of a namespace until it is dropped, one connection at a time.
pub struct Server {
    listener: Arc<TcpListener>,
    kind: Arc<AtomicU8>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub fn start(netns: &NetNs, port: u16) -> anyhow::Result<Self> {
        let listener = in_netns(netns, || {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
            socket.set_reuse_address(true)?;
            // What is captured comes with an address that is not the pod's.
            socket.set_ip_transparent_v4(true)?;
            socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)).into())?;
            socket.listen(BACKLOG)?;
            Ok(Arc::new(TcpListener::from(socket)))
        })?;
        let kind = Arc::new(AtomicU8::new(0));
        let (accepting, asked) = (listener.clone(), kind.clone());
        let thread = std::thread::spawn(move || {
            while let Ok((stream, _)) = accepting.accept() {
                // The client ends it, whenever it likes.
                let _ended = answer(stream, asked.load(Ordering::Acquire));
            }
        });
        Ok(Self {
            listener,
            kind,
            thread: Some(thread),
        })
    }

    pub fn be_ready_for(&self, kind: Kind) {
        self.kind.store(kind as u8, Ordering::Release);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Its accept() returns.
        let _ended = shutdown(self.listener.as_raw_fd(), Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ended = thread.join();
        }
    }
}

fn answer(mut stream: TcpStream, kind: u8) -> io::Result<()> {
    stream.set_nodelay(true)?;
    if kind == Kind::Stream as u8 {
        let chunk = vec![0x5a; CHUNK_BYTES];
        loop {
            stream.write_all(&chunk)?;
        }
    }
    let mut byte = [0];
    if kind == Kind::Requests as u8 {
        loop {
            stream.read_exact(&mut byte)?;
            stream.write_all(&byte)?;
        }
    }
    stream.write_all(&WORD)?;
    // Until it is reset.
    stream.read(&mut byte).map(drop)
}

/// How much is done in a second of this, as [`Kind::unit`] counts.
pub fn measure(
    from: &NetNs,
    to: SocketAddr,
    kind: Kind,
    duration: Duration,
) -> anyhow::Result<f64> {
    let from = from.try_clone()?;
    let client = std::thread::spawn(move || {
        in_netns(&from, || match kind {
            Kind::Connections => connections(to, duration),
            Kind::Requests => requests(to, duration),
            Kind::Stream => stream(to, duration),
        })
    });
    let count = client.join().expect("a client does not panic")?;
    Ok(count as f64 / kind.unit().1 / duration.as_secs_f64())
}

fn open(to: SocketAddr) -> anyhow::Result<TcpStream> {
    let stream = TcpStream::connect(to).context("connecting")?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn connections(to: SocketAddr, duration: Duration) -> anyhow::Result<u64> {
    let deadline = Instant::now() + duration;
    let mut made = 0;
    while Instant::now() < deadline {
        let mut stream = open(to)?;
        let mut word = [0; WORD.len()];
        stream.read_exact(&mut word)?;
        ensure!(word == WORD, "somebody else answers");
        SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
        made += 1;
    }
    Ok(made)
}

fn requests(to: SocketAddr, duration: Duration) -> anyhow::Result<u64> {
    let mut stream = open(to)?;
    let deadline = Instant::now() + duration;
    let mut made = 0;
    while Instant::now() < deadline {
        stream.write_all(&[1])?;
        stream.read_exact(&mut [0])?;
        made += 1;
    }
    Ok(made)
}

fn stream(to: SocketAddr, duration: Duration) -> anyhow::Result<u64> {
    let mut stream = open(to)?;
    let mut buffer = vec![0; CHUNK_BYTES];
    let deadline = Instant::now() + duration;
    let mut total = 0;
    while Instant::now() < deadline {
        let count = stream.read(&mut buffer)?;
        ensure!(count > 0, "the stream ended");
        total += count as u64;
    }
    SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    Ok(total)
}
