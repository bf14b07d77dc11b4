// SPDX-License-Identifier: Apache-2.0
//! Questions to the kernel about TCP sockets (sock_diag(7)). `/proc/net/tcp` knows the same, and walks through the
//! connections of the whole machine for each piece that is read of it.

use crate::NetNs;
use crate::netlink::Netlink;
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{
    AF_INET, AF_INET6, IPPROTO_TCP, TCP_ESTABLISHED, TCP_LISTEN, TCP_TIME_WAIT,
};
use netlink_packet_sock_diag::inet::{
    ExtensionFlags, InetRequest, InetResponse, SocketId, StateFlags,
};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;

/// As far as anybody here asks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum TcpState {
    Listen,
    /// Half-open and closing ones too.
    Open,
    TimeWait,
}

/// An IPv4 address that an IPv6 socket has is IPv4.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct TcpSocket {
    pub local: SocketAddr,
    pub remote: SocketAddr,
    pub state: TcpState,
    /// The kernel's number of it, 0 where no process has it any more.
    pub inode: u64,
}

/// All of one namespace, both families.
/// # Errors
/// When the namespace cannot be entered; what the kernel says, `NotFound` when it cannot tell of TCP sockets.
pub fn sockets(netns: &NetNs) -> io::Result<Vec<TcpSocket>> {
    list(netns, StateFlags::all() - StateFlags::CLOSE)
}

/// The numbers of those that listen, by their address.
/// # Errors
/// As [`sockets`].
pub fn listeners(netns: &NetNs) -> io::Result<HashMap<SocketAddr, u64>> {
    let listening = list(netns, StateFlags::LISTEN)?;
    Ok((listening.iter())
        .map(|socket| (socket.local, socket.inode))
        .collect())
}

fn list(netns: &NetNs, states: StateFlags) -> io::Result<Vec<TcpSocket>> {
    let kernel = Netlink::<SockDiagMessage>::open(netns, NETLINK_SOCK_DIAG)?;
    let mut sockets = Vec::new();
    for (family, any) in [
        (AF_INET, SocketId::new_v4()),
        (AF_INET6, SocketId::new_v6()),
    ] {
        for answer in kernel.list(question(family, states.clone(), any))? {
            sockets.extend(socket(&answer));
        }
    }
    Ok(sockets)
}

/// The number of the socket that has exactly this connection open in the calling thread's network namespace. `None` if
/// there is none; a listening socket is none.
/// # Errors
/// As `socket(2)`; what the kernel says, `ENOENT` apart.
pub fn established(local: SocketAddr, remote: SocketAddr) -> io::Result<Option<u64>> {
    let family = match (local, remote) {
        (SocketAddr::V4(_), SocketAddr::V4(_)) => AF_INET,
        (SocketAddr::V6(_), SocketAddr::V6(_)) => AF_INET6,
        _ => return Err(io::ErrorKind::InvalidInput.into()),
    };
    let kernel = Netlink::<SockDiagMessage>::here(NETLINK_SOCK_DIAG)?;
    let id = SocketId {
        source_address: local.ip(),
        source_port: local.port(),
        destination_address: remote.ip(),
        destination_port: remote.port(),
        // Any.
        interface_id: 0,
        cookie: [0xff; 8],
    };
    match kernel.get(question(family, StateFlags::ESTABLISHED, id)) {
        // An address that nobody is connected from or to finds whoever listens there.
        Ok(answer) => Ok(response(&answer)
            .filter(|found| found.header.state == TCP_ESTABLISHED)
            .map(|found| found.header.inode.into())),
        Err(error) if error.raw_os_error() == Some(nix::libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

fn question(family: u8, states: StateFlags, socket_id: SocketId) -> SockDiagMessage {
    SockDiagMessage::InetRequest(InetRequest {
        family,
        protocol: IPPROTO_TCP,
        extensions: ExtensionFlags::empty(),
        states,
        socket_id,
    })
}

fn response(answer: &SockDiagMessage) -> Option<&InetResponse> {
    match answer {
        SockDiagMessage::InetResponse(response) => Some(response),
        _ => None,
    }
}

fn socket(answer: &SockDiagMessage) -> Option<TcpSocket> {
    let found = &response(answer)?.header;
    let id = &found.socket_id;
    Some(TcpSocket {
        local: SocketAddr::new(id.source_address.to_canonical(), id.source_port),
        remote: SocketAddr::new(id.destination_address.to_canonical(), id.destination_port),
        state: match found.state {
            TCP_LISTEN => TcpState::Listen,
            TCP_TIME_WAIT => TcpState::TimeWait,
            _ => TcpState::Open,
        },
        inode: found.inode.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::fstat;
    use std::net::{TcpListener, TcpStream};

    const ANY: [&str; 2] = ["127.0.0.1:0", "[::1]:0"];

    #[test]
    fn the_one_socket_of_a_connection_is_found() {
        for any in ANY {
            let listener = TcpListener::bind(any).unwrap();
            let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (local, remote) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
            let expected = fstat(&client).unwrap().st_ino;
            assert_eq!(established(local, remote).unwrap(), Some(expected));
            let (server, _) = listener.accept().unwrap();
            let expected = fstat(&server).unwrap().st_ino;
            assert_eq!(established(remote, local).unwrap(), Some(expected));
        }
    }

    #[test]
    fn a_listener_is_no_connection() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let local = listener.local_addr().unwrap();
        let remote = "127.0.0.9:9".parse().unwrap();
        assert_eq!(established(local, remote).unwrap(), None);
        assert_eq!(established(remote, local).unwrap(), None);
    }

    #[test]
    fn every_socket_is_listed_with_its_state() {
        let here = NetNs::current().unwrap();
        for any in ANY {
            let listener = TcpListener::bind(any).unwrap();
            let at = listener.local_addr().unwrap();
            // More than one answer of the kernel's holds.
            let connect = |_| (TcpStream::connect(at).unwrap(), listener.accept().unwrap());
            let clients: Vec<_> = (0..300).map(connect).collect();
            let found = sockets(&here).unwrap();
            for (client, _server) in &clients {
                let expected = TcpSocket {
                    local: client.local_addr().unwrap(),
                    remote: at,
                    state: TcpState::Open,
                    inode: fstat(client).unwrap().st_ino,
                };
                assert!(found.contains(&expected), "{expected:?}");
            }
            let listening = listeners(&here).unwrap();
            assert_eq!(listening.get(&at), Some(&fstat(&listener).unwrap().st_ino));
            let own = clients[0].0.local_addr().unwrap();
            assert!(!listening.contains_key(&own));
        }
    }

    #[test]
    fn an_ipv4_address_of_an_ipv6_socket_is_ipv4() {
        let listener = TcpListener::bind("[::]:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let client = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let (server, _) = listener.accept().unwrap();
        let found = sockets(&NetNs::current().unwrap()).unwrap();
        let inode = fstat(&server).unwrap().st_ino;
        let own = found.iter().find(|socket| socket.inode == inode).unwrap();
        assert_eq!(own.remote, client.local_addr().unwrap());
    }
}
