// SPDX-License-Identifier: Apache-2.0
//! Clients and servers of the bench. A connection's first byte says what it is for.

use super::Path;
use anyhow::{Context, ensure};
use podveil_netns::NetNs;
use podveil_sim::in_netns;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const STREAM: u8 = b's';
const ECHO: u8 = b'e';
const CHUNK_BYTES: usize = 128 * 1024;
/// Clients that open connections at once: enough to keep both cores busy.
const OPENERS: usize = 4;
const PATIENCE: Duration = Duration::from_secs(10);

pub fn serve(netns: &NetNs, port: u16) -> anyhow::Result<JoinHandle<()>> {
    let listener = in_netns(netns, || {
        Ok(TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?)
    })?;
    Ok(std::thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            std::thread::spawn(move || {
                // The client's end of it, whenever it likes.
                let _ended = answer(stream);
            });
        }
    }))
}

fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut first = [0];
    stream.read_exact(&mut first)?;
    if first[0] == STREAM {
        let chunk = vec![0x5a; CHUNK_BYTES];
        loop {
            stream.write_all(&chunk)?;
        }
    }
    loop {
        stream.write_all(&first)?;
        stream.read_exact(&mut first)?;
    }
}

fn open(path: &Path, purpose: u8) -> anyhow::Result<TcpStream> {
    let mut stream = in_netns(&path.client, || {
        TcpStream::connect_timeout(&path.to, PATIENCE).context("connecting")
    })?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(&[purpose])?;
    Ok(stream)
}

/// From a connection's opening to the first byte of its answer.
pub fn first_answer(path: &Path) -> anyhow::Result<Duration> {
    let began = Instant::now();
    let mut connection = open(path, ECHO)?;
    connection.read_exact(&mut [0])?;
    Ok(began.elapsed())
}

/// Bytes that `streams` connections received together.
pub fn stream(path: &Path, streams: usize, duration: Duration) -> anyhow::Result<u64> {
    let connections: Vec<TcpStream> = (0..streams)
        .map(|_| open(path, STREAM))
        .collect::<Result<_, _>>()?;
    let deadline = Instant::now() + duration;
    std::thread::scope(|scope| {
        let readers: Vec<_> = connections
            .iter()
            .map(|mut connection| {
                scope.spawn(move || -> anyhow::Result<u64> {
                    let mut buffer = vec![0; CHUNK_BYTES];
                    let mut total = 0;
                    while Instant::now() < deadline {
                        let count = connection.read(&mut buffer)?;
                        ensure!(count > 0, "the stream ended");
                        total += count as u64;
                    }
                    Ok(total)
                })
            })
            .collect();
        readers
            .into_iter()
            .map(|reader| reader.join().expect("a reader does not panic"))
            .sum()
    })
}

/// How long each byte took to come back.
pub fn request_response(path: &Path, duration: Duration) -> anyhow::Result<Vec<Duration>> {
    let mut stream = open(path, ECHO)?;
    let mut byte = [0];
    stream.read_exact(&mut byte)?;
    let deadline = Instant::now() + duration;
    let mut latencies = Vec::new();
    let mut began = Instant::now();
    while began < deadline {
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)?;
        let now = Instant::now();
        latencies.push(now - began);
        began = now;
    }
    Ok(latencies)
}

/// Connections that were opened, carried a byte each way, and were closed.
pub fn connections(path: &Path, duration: Duration) -> anyhow::Result<u64> {
    let deadline = Instant::now() + duration;
    std::thread::scope(|scope| {
        let openers: Vec<_> = (0..OPENERS)
            .map(|_| {
                scope.spawn(move || -> anyhow::Result<u64> {
                    let mut made = 0;
                    while Instant::now() < deadline {
                        let mut stream = open(path, ECHO)?;
                        stream.read_exact(&mut [0])?;
                        made += 1;
                    }
                    Ok(made)
                })
            })
            .collect();
        openers
            .into_iter()
            .map(|opener| opener.join().expect("an opener does not panic"))
            .sum()
    })
}

/// Connections that have carried a byte and now rest.
pub fn idle(path: &Path, count: usize) -> anyhow::Result<Vec<TcpStream>> {
    (0..count)
        .map(|number| {
            let mut stream = open(path, ECHO)?;
            match stream.read_exact(&mut [0]) {
                Ok(()) => Ok(stream),
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                    anyhow::bail!("connection {number} was closed")
                }
                Err(error) => Err(error).with_context(|| format!("connection {number}")),
            }
        })
        .collect()
}
