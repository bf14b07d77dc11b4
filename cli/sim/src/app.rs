// SPDX-License-Identifier: Apache-2.0
//! The application inside a simulated pod: HTTP/1.0 enough for `curl`, and bytes that either end can check.

use crate::pattern;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Stands in every answer of `/`, so that a capture can look for it.
pub const MARKER: &str = "podveil-demo-payload-marker";

const LISTENS: &str = "listens since ";

/// The application's only line, so that a bench can tell when it could be reached.
pub fn listens_since(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("{LISTENS}{} us", since.as_micros())
}

/// The moment in such a line.
pub fn parse_listens_since(line: &str) -> Option<SystemTime> {
    let since = line.trim_end().strip_prefix(LISTENS)?.strip_suffix(" us")?;
    UNIX_EPOCH.checked_add(Duration::from_micros(since.parse().ok()?))
}

const CHUNK_BYTES: usize = 64 * 1024;

/// Serves until the process ends: `/` answers the marker and the client's address as the application sees it,
/// `/bytes/<n>` answers n bytes of [`pattern`].
///
/// # Errors
/// If accepting fails for good.
pub fn serve(listener: &TcpListener) -> io::Result<()> {
    loop {
        let (stream, peer) = listener.accept()?;
        std::thread::spawn(move || {
            if let Err(error) = answer(&stream, peer) {
                tracing::debug!(%peer, %error, "a client ended early");
            }
        });
    }
}

fn answer(mut stream: &TcpStream, peer: SocketAddr) -> io::Result<()> {
    let mut path = String::new();
    for (number, line) in BufReader::new(stream).lines().enumerate() {
        let line = line?;
        if number == 0 {
            path = line.split_whitespace().nth(1).unwrap_or("/").to_owned();
        }
        if line.is_empty() {
            break;
        }
    }
    let head = |length: u64| format!("HTTP/1.0 200 OK\r\ncontent-length: {length}\r\n\r\n");
    match path
        .strip_prefix("/bytes/")
        .and_then(|number| number.parse::<u64>().ok())
    {
        Some(length) => {
            stream.write_all(head(length).as_bytes())?;
            let mut buffer = vec![0; CHUNK_BYTES];
            let mut offset = 0;
            while offset < length {
                let count =
                    CHUNK_BYTES.min(usize::try_from(length - offset).unwrap_or(CHUNK_BYTES));
                pattern::fill(offset, &mut buffer[..count]);
                stream.write_all(&buffer[..count])?;
                offset += count as u64;
            }
        }
        None => {
            let body = format!("{MARKER} peer={}\n", peer.ip().to_canonical());
            stream.write_all(head(body.len() as u64).as_bytes())?;
            stream.write_all(body.as_bytes())?;
        }
    }
    stream.shutdown(std::net::Shutdown::Write)
}
