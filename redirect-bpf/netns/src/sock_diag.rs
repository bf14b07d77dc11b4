// SPDX-License-Identifier: Apache-2.0
//! Questions to the kernel about single TCP sockets (sock_diag(7)).

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;

const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const TCP_ESTABLISHED: u8 = 1;
const HEADER_BYTES: usize = 16;
/// `struct inet_diag_msg`: state at 1, inode in its last four bytes.
const STATE_AT: usize = HEADER_BYTES + 1;
const INODE_AT: usize = HEADER_BYTES + 68;

/// The number of the socket that has exactly this connection open in the calling thread's network namespace. `None` if
/// there is none; a listening socket is none.
/// # Errors
/// As `socket(2)` and `recv(2)`; `InvalidData` for an answer of another shape; what the kernel says, `ENOENT` apart.
pub fn established(local: SocketAddr, remote: SocketAddr) -> io::Result<Option<u64>> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkSockDiag,
    )?;
    let question = question(local, remote)?;
    let kernel = NetlinkAddr::new(0, 0);
    sendto(socket.as_raw_fd(), &question, &kernel, MsgFlags::empty())?;
    let mut answer = [0; 4096];
    // The kernel has queued the answer before `sendto` returned.
    let length = recv(socket.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT)?;
    inode(answer.get(..length).unwrap_or_default())
}

/// `struct nlmsghdr` and `struct inet_diag_req_v2`: numbers in host order, addresses and ports in network order.
fn question(local: SocketAddr, remote: SocketAddr) -> io::Result<Vec<u8>> {
    let family = match (local, remote) {
        (SocketAddr::V4(_), SocketAddr::V4(_)) => AddressFamily::Inet,
        (SocketAddr::V6(_), SocketAddr::V6(_)) => AddressFamily::Inet6,
        _ => return Err(io::ErrorKind::InvalidInput.into()),
    };
    let mut request = Vec::with_capacity(72);
    request.extend(72u32.to_ne_bytes());
    request.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request.extend(NLM_F_REQUEST.to_ne_bytes());
    request.extend([0; 8]);
    request.extend([family as i32 as u8, nix::libc::IPPROTO_TCP as u8, 0, 0]);
    request.extend((1u32 << TCP_ESTABLISHED).to_ne_bytes());
    request.extend(local.port().to_be_bytes());
    request.extend(remote.port().to_be_bytes());
    for ip in [local.ip(), remote.ip()] {
        match ip {
            IpAddr::V4(ip) => {
                request.extend(ip.octets());
                request.extend([0; 12]);
            }
            IpAddr::V6(ip) => request.extend(ip.octets()),
        }
    }
    // Any interface; a cookie of ones is none.
    request.extend([0; 4]);
    request.extend([0xff; 8]);
    Ok(request)
}

fn inode(answer: &[u8]) -> io::Result<Option<u64>> {
    let broken = || io::Error::from(io::ErrorKind::InvalidData);
    let word = |at: usize| {
        let bytes = answer.get(at..at + 4)?;
        Some(u32::from_ne_bytes(bytes.try_into().ok()?))
    };
    let kind = answer.get(4..6).ok_or_else(broken)?;
    match u16::from_ne_bytes([kind[0], kind[1]]) {
        NLMSG_ERROR => match word(HEADER_BYTES).ok_or_else(broken)?.cast_signed() {
            error if -error == nix::libc::ENOENT => Ok(None),
            error => Err(io::Error::from_raw_os_error(-error)),
        },
        SOCK_DIAG_BY_FAMILY => {
            // An address that nobody is connected from or to finds whoever listens there.
            let open = *answer.get(STATE_AT).ok_or_else(broken)? == TCP_ESTABLISHED;
            let inode = word(INODE_AT).ok_or_else(broken)?;
            Ok(open.then_some(inode.into()))
        }
        _ => Err(broken()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::fstat;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn the_one_socket_of_a_connection_is_found() {
        for any in ["127.0.0.1:0", "[::1]:0"] {
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
    fn a_short_answer_is_an_error() {
        for length in 0..6 {
            assert!(inode(&[0; 6][..length]).is_err());
        }
        let mut short = vec![0; 40];
        short[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        assert!(inode(&short).is_err());
    }
}
