// SPDX-License-Identifier: Apache-2.0
//! Plain sockets inside pods. Made in the pod's namespace, used from any thread.

use anyhow::{Context, bail, ensure};
use podveil_netns::NetNs;
use podveil_sim::{in_netns, pattern};
use socket2::{Domain, Socket, Type};
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

/// A test hangs no longer than this.
pub const PATIENCE: Duration = Duration::from_secs(20);

const CHUNK_BYTES: usize = 64 * 1024;

/// # Errors
/// If it is refused, or not answered in time.
pub fn connect(from: &NetNs, to: SocketAddr) -> anyhow::Result<TcpStream> {
    let stream = in_netns(from, || {
        TcpStream::connect_timeout(&to, PATIENCE).with_context(|| format!("connecting to {to}"))
    })?;
    patient(&stream)?;
    Ok(stream)
}

/// # Errors
/// If the port is taken.
pub fn listen(on: &NetNs, port: u16) -> anyhow::Result<TcpListener> {
    in_netns(on, || {
        let socket = Socket::new(Domain::IPV6, Type::STREAM, None)?;
        socket.set_only_v6(false)?;
        socket.set_reuse_address(true)?;
        socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into())?;
        socket.listen(512)?;
        Ok(socket.into())
    })
}

/// # Errors
/// If nobody connects in time.
pub fn accept(listener: &TcpListener) -> anyhow::Result<TcpStream> {
    // SO_RCVTIMEO bounds accept too.
    let bounded = Socket::from(listener.try_clone()?);
    bounded.set_read_timeout(Some(PATIENCE))?;
    let (stream, _) = listener.accept().context("waiting for a connection")?;
    patient(&stream)?;
    Ok(stream)
}

fn patient(stream: &TcpStream) -> anyhow::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    Ok(())
}

/// Sends `length` bytes of the pattern.
///
/// # Errors
/// If the connection breaks.
pub fn send(stream: &TcpStream, length: u64) -> anyhow::Result<()> {
    let mut stream = stream;
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut offset = 0;
    while offset < length {
        let count = CHUNK_BYTES.min(usize::try_from(length - offset)?);
        pattern::fill(offset, &mut buffer[..count]);
        stream
            .write_all(&buffer[..count])
            .with_context(|| format!("after {offset} of {length} bytes sent"))?;
        offset += count as u64;
    }
    Ok(())
}

/// Receives exactly `length` bytes of the pattern.
///
/// # Errors
/// If one is wrong or missing.
pub fn receive(stream: &TcpStream, length: u64) -> anyhow::Result<()> {
    let mut stream = stream;
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut offset = 0;
    while offset < length {
        let wanted = CHUNK_BYTES.min(usize::try_from(length - offset)?);
        let count = stream
            .read(&mut buffer[..wanted])
            .with_context(|| format!("after {offset} of {length} bytes"))?;
        ensure!(count > 0, "a clean end after {offset} of {length} bytes");
        if let Some(place) = pattern::first_difference(offset, &buffer[..count]) {
            bail!("byte {place} is wrong");
        }
        offset += count as u64;
    }
    Ok(())
}

/// The peer's clean end comes next, and nothing else.
///
/// # Errors
/// If a byte or a reset comes.
pub fn expect_end(stream: &TcpStream) -> anyhow::Result<()> {
    let mut stream = stream;
    let mut byte = [0];
    let count = stream.read(&mut byte).context("waiting for a clean end")?;
    ensure!(count == 0, "a byte came after the end");
    Ok(())
}

/// A reset comes next, never a clean end.
///
/// # Errors
/// If it ends cleanly, or not at all.
pub fn expect_reset(stream: &TcpStream) -> anyhow::Result<()> {
    let mut stream = stream;
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => bail!("a clean end came where a reset belongs"),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(()),
            Err(error) => return Err(error).context("waiting for a reset"),
        }
    }
}

/// A new connection is reset. On a busy machine the reset may come before `connect` has returned.
///
/// # Errors
/// If it ends cleanly, or not at all, or cannot be tried.
pub fn expect_connection_reset(from: &NetNs, to: SocketAddr) -> anyhow::Result<()> {
    match connect(from, to) {
        Ok(stream) => expect_reset(&stream),
        Err(error) => match error.downcast_ref::<std::io::Error>() {
            Some(refused) if refused.kind() == ErrorKind::ConnectionReset => Ok(()),
            _ => Err(error),
        },
    }
}

/// Closes with a reset.
///
/// # Errors
/// If the option cannot be set.
pub fn reset(stream: TcpStream) -> anyhow::Result<()> {
    Socket::from(stream)
        .set_linger(Some(Duration::ZERO))
        .context("setting SO_LINGER")
}

/// One end of an exchange: sends `length` bytes and its end while it receives the same from the other side.
///
/// # Errors
/// If a byte is wrong, missing or too much, in either direction.
pub fn exchange(stream: &TcpStream, length: u64) -> anyhow::Result<()> {
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            send(stream, length)?;
            stream
                .shutdown(Shutdown::Write)
                .context("ending our direction")
        });
        receive(stream, length)?;
        expect_end(stream)?;
        match sender.join() {
            Ok(sent) => sent,
            Err(_) => bail!("the sender panicked"),
        }
    })
}

/// One connection and both its ends, in plain sight of the test.
///
/// # Errors
/// If it is not made, or not through.
pub fn pair(
    from: &NetNs,
    listener: &TcpListener,
    to: SocketAddr,
) -> anyhow::Result<(TcpStream, TcpStream)> {
    let client = connect(from, to)?;
    // The server's end exists once the proxies have carried the connection through.
    let server = accept(listener)?;
    Ok((client, server))
}
