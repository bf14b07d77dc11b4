// SPDX-License-Identifier: Apache-2.0
//! The last word on whether a pod is captured: a connection that is really opened in its namespace.
//!
//! It goes to an address that nobody has ([`VERIFICATION_V4`]), so that only the proxy's listener can take it. The
//! process that opens it is the proxy's by its cgroup, hence a mark for which no back end lets the proxy's own sockets
//! go their own way: it takes exactly the way of the pod's connections.

use crate::backend::{ApplyError, VerifyError};
use crate::connections::Addresses;
use crate::routes::{Family, Sources};
use podveil_model::{HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT, VERIFICATION_V4, VERIFICATION_V6};
use podveil_netns::NetNs;
use podveil_plan::{Capture, VERIFY_MARK};
use socket2::{Domain, Socket, Type};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;
use tokio::net::TcpSocket;

/// The way is over `lo`: this is long enough for a machine that is busy, and for the SYN's first repetition.
const ANSWER: Duration = Duration::from_secs(2);
/// How long the proxy is given to reset it, so that it does not find a dead connection in its queue.
const END: Duration = Duration::from_millis(100);

/// Opens a connection in each address family that the pod has a way out in.
/// # Errors
/// [`VerifyError::Connection`]: it is not captured, or nobody listens.
pub async fn connect(netns: &NetNs, capture: &Capture) -> Result<(), VerifyError> {
    let addresses = Addresses::of(netns).map_err(ApplyError::from)?;
    let sources = Sources::of(netns, &addresses).map_err(ApplyError::from)?;
    // Of the ports that are never dialled, so that a proxy that does not know this address dials nothing either.
    let port = [HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT]
        .into_iter()
        .find(|port| !capture.exclude_outbound_ports.contains(port));
    let Some(port) = port else {
        return Ok(());
    };
    for (family, source, ip) in [
        (Family::V4, sources.v4, IpAddr::V4(VERIFICATION_V4)),
        (Family::V6, sources.v6, IpAddr::V6(VERIFICATION_V6)),
    ] {
        if source.is_none() {
            continue;
        }
        let opened = open(netns, SocketAddr::new(ip, port)).await;
        match opened {
            Ok(()) => {}
            // Without a route nothing leaves, captured or not.
            Err(error) if error.kind() == io::ErrorKind::NetworkUnreachable => {}
            Err(source) => return Err(VerifyError::Connection { family, source }),
        }
    }
    Ok(())
}

async fn open(netns: &NetNs, to: SocketAddr) -> io::Result<()> {
    let socket = netns
        .run(|| {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM.nonblocking(), None)?;
            socket.set_mark(VERIFY_MARK)?;
            // It ends by a reset, without a TIME-WAIT.
            socket.set_linger(Some(Duration::ZERO))?;
            Ok(socket)
        })
        .map_err(io::Error::other)
        .flatten()?;
    let socket = TcpSocket::from_std_stream(socket.into());
    let connected = tokio::time::timeout(ANSWER, socket.connect(to))
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?;
    match connected {
        Ok(stream) => {
            let _ended_or_not = tokio::time::timeout(END, stream.readable()).await;
            Ok(())
        }
        // The proxy was faster: a connection that was never taken is *refused*.
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(()),
        Err(error) => Err(error),
    }
}
