// SPDX-License-Identifier: Apache-2.0
use podveil_model::{LocalAddr, OriginalDst};
use socket2::SockRef;
use std::io;
use std::net::SocketAddr;
use tokio::net::TcpStream;

/// Why nothing is known about what the application dialled. The connection is refused, never guessed.
#[derive(Debug, thiserror::Error)]
pub enum NoOriginalDst {
    #[error("the socket has no local address")]
    NoLocalAddress(#[source] io::Error),
    /// Nobody redirected this connection: somebody dialled the listener itself.
    #[error("the connection was not redirected")]
    NotRedirected,
    /// Neither IPv4 nor IPv6, or the kernel refused to say.
    #[error("the kernel does not tell the original destination")]
    Unreadable(#[source] io::Error),
}

/// What the application dialled before its connection was redirected to us. A socket that was assigned to the listener
/// (eBPF, TPROXY) still has that as its local address; NAT has put `listening` there, the listener's own port, and keeps
/// the original elsewhere (`SO_ORIGINAL_DST`). IPv4 and IPv6.
///
/// # Errors
/// [`NoOriginalDst::NotRedirected`] if the kernel has no entry, or only our own listener's address.
pub fn original_dst(stream: &TcpStream, listening: u16) -> Result<OriginalDst, NoOriginalDst> {
    let local = LocalAddr(stream.local_addr().map_err(NoOriginalDst::NoLocalAddress)?);
    if local.0.port() != listening {
        return Ok(OriginalDst(local.0));
    }
    let socket = SockRef::from(stream);
    let answer = match local.0 {
        SocketAddr::V4(_) => socket.original_dst_v4(),
        SocketAddr::V6(_) => socket.original_dst_v6(),
    };
    let original = match answer {
        Ok(address) => address,
        // No conntrack entry (ENOENT), or no conntrack for this family at all (ENOPROTOOPT).
        Err(error)
            if error.kind() == io::ErrorKind::NotFound
                || error.raw_os_error() == Some(nix::libc::ENOPROTOOPT) =>
        {
            return Err(NoOriginalDst::NotRedirected);
        }
        Err(error) => return Err(NoOriginalDst::Unreadable(error)),
    };
    let original = original
        .as_socket()
        .ok_or_else(|| NoOriginalDst::Unreadable(io::ErrorKind::InvalidData.into()))?;
    // A connection that is tracked and not redirected has its own local address as its original one.
    if original == local.0 {
        return Err(NoOriginalDst::NotRedirected);
    }
    Ok(OriginalDst(original))
}
