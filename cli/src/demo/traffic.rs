// SPDX-License-Identifier: Apache-2.0
//! Clients of the demo that know what they should get: each byte is checked, no failure goes uncounted.

use anyhow::{Context, ensure};
use podveil_netns::NetNs;
use podveil_sim::{app, in_netns, pattern};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(10);

fn connect(netns: &NetNs, to: SocketAddr) -> anyhow::Result<TcpStream> {
    let stream = in_netns(netns, || {
        TcpStream::connect_timeout(&to, PATIENCE).context("connecting")
    })?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// One request on a connection of its own; the whole answer must come.
fn request(netns: &NetNs, to: SocketAddr) -> anyhow::Result<()> {
    let mut stream = connect(netns, to)?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream
        .read_to_string(&mut answer)
        .context("reading the answer")?;
    ensure!(
        answer.contains(app::MARKER),
        "the answer was cut: {answer:?}"
    );
    Ok(())
}

/// Requests one after the other until told to stop.
pub struct Requests {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<(u64, Vec<String>)>,
}

impl Requests {
    pub fn start(netns: &NetNs, to: SocketAddr) -> anyhow::Result<Self> {
        let (netns, stop) = (netns.try_clone()?, Arc::new(AtomicBool::new(false)));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let (mut good, mut bad) = (0, Vec::new());
            while !stopped.load(Ordering::Relaxed) {
                match request(&netns, to) {
                    Ok(()) => good += 1,
                    Err(error) => bad.push(format!("after {good} good ones: {error:#}")),
                }
            }
            (good, bad)
        });
        Ok(Self { stop, thread })
    }

    /// # Errors
    /// If a single request failed.
    pub fn finish(self) -> anyhow::Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        let Ok((good, bad)) = self.thread.join() else {
            anyhow::bail!("the client panicked")
        };
        ensure!(
            bad.is_empty(),
            "{} of {} requests failed; the first: {}",
            bad.len(),
            good + bad.len() as u64,
            bad[0]
        );
        ensure!(good > 0, "not one request was made");
        Ok(good)
    }
}

/// A download that goes at walking pace until it is let go, so that something can happen in its middle.
pub struct Download {
    hurry: Arc<AtomicBool>,
    received: Arc<AtomicU64>,
    thread: JoinHandle<anyhow::Result<u64>>,
}

/// Bytes a walking download reads between two pauses.
const STEP_BYTES: usize = 64 * 1024;
const STEP_PAUSE: Duration = Duration::from_millis(5);

impl Download {
    pub fn start(netns: &NetNs, to: SocketAddr, bytes: u64) -> anyhow::Result<Self> {
        let mut stream = connect(netns, to)?;
        stream.write_all(format!("GET /bytes/{bytes} HTTP/1.0\r\n\r\n").as_bytes())?;
        skip_head(&mut stream)?;
        let (hurry, received) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let (hurried, counted) = (hurry.clone(), received.clone());
        let thread = std::thread::spawn(move || {
            let mut buffer = vec![0; STEP_BYTES];
            let mut offset = 0;
            loop {
                let count = stream
                    .read(&mut buffer)
                    .with_context(|| format!("after {offset} bytes"))?;
                if count == 0 {
                    ensure!(offset == bytes, "{offset} of {bytes} bytes came");
                    return Ok(offset);
                }
                if let Some(place) = pattern::first_difference(offset, &buffer[..count]) {
                    anyhow::bail!("byte {place} is wrong");
                }
                offset += count as u64;
                counted.store(offset, Ordering::Relaxed);
                if !hurried.load(Ordering::Relaxed) {
                    std::thread::sleep(STEP_PAUSE);
                }
            }
        });
        Ok(Self {
            hurry,
            received,
            thread,
        })
    }

    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    pub fn is_under_way(&self) -> bool {
        !self.thread.is_finished()
    }

    /// Lets it go at full speed and waits for its end.
    ///
    /// # Errors
    /// If a byte is missing or wrong.
    pub fn finish(self) -> anyhow::Result<u64> {
        self.hurry.store(true, Ordering::Relaxed);
        let Ok(result) = self.thread.join() else {
            anyhow::bail!("the download panicked")
        };
        result
    }
}

fn skip_head(stream: &mut TcpStream) -> anyhow::Result<()> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        stream
            .read_exact(&mut byte)
            .context("reading the answer's head")?;
        head.push(byte[0]);
        ensure!(head.len() < 4096, "the answer has no end of head");
    }
    Ok(())
}

/// Is a plain connection answered, and if not, how is it refused?
pub fn is_refused(netns: &NetNs, to: IpAddr, port: u16) -> anyhow::Result<String> {
    match request(netns, SocketAddr::new(to, port)) {
        Ok(()) => anyhow::bail!("it was answered"),
        Err(error) => Ok(format!("{error:#}")),
    }
}
