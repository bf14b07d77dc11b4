// SPDX-License-Identifier: Apache-2.0
//! New connections, one after the other, while something is taken away.

use super::bed::{Bed, Side};
use anyhow::{Context, ensure};
use podveil_interop_tests::tcp;
use podveil_netns::NetNs;
use podveil_sim::eventually;
use socket2::SockRef;
use std::fmt;
use std::net::{Shutdown, SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const PORT: u16 = 9001;
const BYTES: u64 = 1000;
const PATIENCE: Duration = Duration::from_secs(60);
/// Connections that must have worked before anything is taken away, and after.
const SOME: usize = 20;

/// From `client` to `far`: each sends, and receives the same again.
pub struct Prober {
    seen: Arc<Mutex<Vec<Tried>>>,
    stop: Arc<AtomicBool>,
    worker: JoinHandle<()>,
    server: Server,
}

/// Serves one connection after the other.
struct Server {
    listener: TcpListener,
    worker: JoinHandle<()>,
}

struct Tried {
    began: Instant,
    ended: Instant,
    error: Option<String>,
}

/// What new connections saw after the end of something.
#[derive(Debug)]
pub struct Outage {
    /// Until the first one was carried that began after it.
    pub duration: Duration,
    pub failed: usize,
    pub clean_ends: usize,
}

impl Prober {
    pub fn start(bed: &Bed) -> anyhow::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::new(Mutex::new(Vec::new()));
        let server = Server::start(&bed.far, stop.clone())?;
        let (netns, to) = (bed.client.netns.clone(), bed.far.v4(PORT));
        let (stopped, tries) = (stop.clone(), seen.clone());
        let worker = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let began = Instant::now();
                let error = once(&netns, to).err().map(|error| format!("{error:#}"));
                let tried = Tried {
                    began,
                    ended: Instant::now(),
                    error,
                };
                tries
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(tried);
            }
        });
        let prober = Self {
            seen,
            stop,
            worker,
            server,
        };
        prober.wait_for(Instant::now(), SOME)?;
        Ok(prober)
    }

    /// Waits until connections that began after `end` are carried again, then stops.
    pub fn until_carried(self, end: Instant) -> anyhow::Result<Outage> {
        let waited = self.wait_for(end, SOME);
        self.stop.store(true, Ordering::Relaxed);
        self.worker
            .join()
            .map_err(|_| anyhow::anyhow!("the prober panicked"))?;
        self.server.end()?;
        waited?;
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let failed: Vec<&String> = seen
            .iter()
            .filter_map(|tried| tried.error.as_ref())
            .collect();
        let first = seen
            .iter()
            .find(|tried| tried.began >= end && tried.error.is_none())
            .context("none was carried")?;
        Ok(Outage {
            duration: first.ended - end,
            failed: failed.len(),
            clean_ends: (failed.iter())
                .filter(|error| error.contains("a clean end"))
                .count(),
        })
    }

    fn wait_for(&self, since: Instant, count: usize) -> anyhow::Result<()> {
        eventually(PATIENCE, "new connections are carried", || {
            let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
            let carried = |tried: &&Tried| tried.began >= since && tried.error.is_none();
            let carried = seen.iter().filter(carried).count();
            let last = seen.iter().rev().find_map(|tried| tried.error.clone());
            ensure!(carried >= count, "{carried}, the last error: {last:?}");
            Ok(())
        })
    }
}

impl fmt::Display for Outage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "carried again after {:.2} s, {} reset meanwhile",
            self.duration.as_secs_f64(),
            self.failed
        )
    }
}

fn once(netns: &NetNs, to: SocketAddr) -> anyhow::Result<()> {
    let stream = tcp::connect(netns, to)?;
    tcp::send(&stream, BYTES)?;
    tcp::receive(&stream, BYTES)
}

impl Server {
    fn start(side: &Side, stop: Arc<AtomicBool>) -> anyhow::Result<Self> {
        let listener = tcp::listen(&side.netns, PORT)?;
        let accepting = listener.try_clone()?;
        let worker = std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let Ok(stream) = tcp::accept(&accepting) else {
                    continue;
                };
                // One that ends early has been cut off: the client counts it.
                let _cut_off =
                    tcp::receive(&stream, BYTES).and_then(|()| tcp::send(&stream, BYTES));
            }
        });
        Ok(Self { listener, worker })
    }

    /// After `stop`. The port is free then.
    fn end(self) -> anyhow::Result<()> {
        SockRef::from(&self.listener).shutdown(Shutdown::Both)?;
        (self.worker.join()).map_err(|_| anyhow::anyhow!("the server panicked"))
    }
}
