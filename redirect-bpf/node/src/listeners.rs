// SPDX-License-Identifier: Apache-2.0
mod taker;

use nix::sys::stat::fstat;
use podveil_apply::Family;
use podveil_model::{HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT};
use podveil_netns::cgroup::Membership;
use podveil_netns::process::{self, Process};
use podveil_netns::seqpacket::Peer;
use podveil_netns::{NetNs, NetNsError, sock_diag};
use podveil_proto::podveil::node::v1::listener::Kind;
use socket2::{Domain, Socket, Type};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use taker::Taker;

/// One listening socket in a pod, and what arrives there.
#[derive(Debug)]
pub struct Listener {
    pub kind: Kind,
    pub ipv6: bool,
    pub socket: TcpListener,
}

/// All listening sockets of a pod: three ports, each family that the pod can carry.
#[derive(Debug)]
pub struct PodListeners(pub Vec<Listener>);

#[derive(Debug, thiserror::Error)]
pub enum ListenersError {
    #[error("cannot see who listens in the pod")]
    List(#[source] io::Error),
    #[error(transparent)]
    NetNs(#[from] NetNsError),
    #[error("cannot listen at {address} in the pod")]
    Socket {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    /// By somebody who is not the proxy.
    #[error("port {} in the pod is taken by {by}", address.port())]
    Taken { address: SocketAddr, by: Taker },
    /// The same, by nobody who is to be seen.
    #[error("port {} in the pod is taken", address.port())]
    Unusable { address: SocketAddr },
}

const PORTS: [(Kind, u16); 3] = [
    (Kind::Outbound, OUTBOUND_PORT),
    (Kind::InboundPlain, INBOUND_PORT),
    (Kind::InboundHbone, HBONE_PORT),
];

impl PodListeners {
    /// Makes the pod's listeners, or takes back those that a proxy still has from a holder before us: the same sockets, so
    /// that no connection in their queues is lost. It may be the one that is connected, one that is still to connect, or one
    /// that is being followed: a proxy is whoever is in `cgroup`. There is no `SO_REUSEPORT` here: with it any process of the pod
    /// that runs as root could listen beside us.
    /// # Errors
    /// See [`ListenersError`].
    pub fn open(
        netns: &NetNs,
        backlog: u32,
        proxy: Option<&Peer>,
        cgroup: &Membership,
    ) -> Result<Self, ListenersError> {
        let mut listeners = Vec::new();
        for family in Family::of(netns)? {
            for (kind, port) in PORTS {
                let (domain, ip) = match family {
                    Family::V4 => (Domain::IPV4, Ipv4Addr::UNSPECIFIED.into()),
                    Family::V6 => (Domain::IPV6, Ipv6Addr::UNSPECIFIED.into()),
                };
                let address = SocketAddr::new(ip, port);
                let made = netns.run(|| listen(domain, address, backlog))?;
                let socket = match made {
                    Ok(socket) => socket,
                    Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                        take_back(netns, address, proxy, cgroup)?
                    }
                    Err(source) => return Err(ListenersError::Socket { address, source }),
                };
                listeners.push(Listener {
                    kind,
                    ipv6: family == Family::V6,
                    socket,
                });
            }
        }
        Ok(Self(listeners))
    }
}

fn listen(domain: Domain, address: SocketAddr, backlog: u32) -> io::Result<TcpListener> {
    let socket = Socket::new(domain, Type::STREAM.nonblocking(), None)?;
    if domain == Domain::IPV6 {
        socket.set_only_v6(true)?;
    }
    // eBPF assigns connections to addresses that are not the pod's.
    match address {
        SocketAddr::V4(_) => socket.set_ip_transparent_v4(true)?,
        SocketAddr::V6(_) => socket.set_ip_transparent_v6(true)?,
    }
    // Connections that the former listener accepted may linger in TIME-WAIT.
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(backlog.try_into().unwrap_or(i32::MAX))?;
    Ok(socket.into())
}

fn take_back(
    netns: &NetNs,
    address: SocketAddr,
    proxy: Option<&Peer>,
    cgroup: &Membership,
) -> Result<TcpListener, ListenersError> {
    let listeners = sock_diag::listeners(netns).map_err(ListenersError::List)?;
    let inode = *(listeners.get(&address)).ok_or(ListenersError::Unusable { address })?;
    let failed = |source| ListenersError::Socket { address, source };
    if let Some((proxy, pidfd)) = proxy.and_then(|proxy| Some((proxy, proxy.pidfd.as_ref()?)))
        && let Ok(sockets) = process::sockets(proxy.pid)
        && let Some(fd) = sockets.get(&inode)
    {
        return duplicate(pidfd.as_fd(), *fd, inode).map_err(failed);
    }
    // Looks through the whole node, so only if the one that is connected does not have it.
    let by = Taker::of(inode).ok_or(ListenersError::Unusable { address })?;
    // Held before it is looked at, so that it is its own number that is looked at.
    let holder = Process::open(by.pid).map_err(failed)?;
    let is_proxys = cgroup.contains(by.pid).unwrap_or(false);
    match process::sockets(by.pid).map_err(failed)?.get(&inode) {
        Some(fd) if is_proxys && holder.is_alive() => {
            duplicate(holder.pidfd(), *fd, inode).map_err(failed)
        }
        _ => Err(ListenersError::Taken { address, by }),
    }
}

fn duplicate(pidfd: BorrowedFd<'_>, fd: RawFd, inode: u64) -> io::Result<TcpListener> {
    let socket: OwnedFd = process::duplicate(pidfd, fd, inode)?;
    debug_assert!(fstat(&socket).is_ok_and(|stat| stat.st_ino == inode));
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sched::{CloneFlags, unshare};
    use std::process::{Child, Command};
    use std::time::{Duration, Instant};

    /// A process that listens in the namespace it is started in, under another mesh's name.
    fn listen_as(name: &str, port: u16) -> Child {
        let script = format!(
            "open('/proc/self/comm', 'w').write('{name}')\nimport socket, time\n\
             s = socket.create_server(('', {port}))\ntime.sleep(60)"
        );
        Command::new("python3")
            .args(["-c", &script])
            .spawn()
            .unwrap()
    }

    #[test]
    #[ignore = "netns"]
    fn who_holds_a_port_that_capture_needs_is_named() {
        std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let pod = NetNs::current().unwrap();
            let mut other = listen_as("pilot-agent", INBOUND_PORT);
            let mut proxy = Command::new("sleep").arg("60").spawn().unwrap();
            let peer = Peer {
                uid: 0,
                gid: 0,
                pid: proxy.id() as i32,
                pidfd: None,
            };
            let address = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), INBOUND_PORT);
            let deadline = Instant::now() + Duration::from_secs(30);
            while !sock_diag::listeners(&pod).unwrap().contains_key(&address) {
                assert!(Instant::now() < deadline, "nobody listens");
                std::thread::yield_now();
            }
            let cgroup = Membership::Folder("nobodys".to_owned());
            for proxy in [Some(&peer), None] {
                let by = match PodListeners::open(&pod, 16, proxy, &cgroup) {
                    Err(ListenersError::Taken { address: at, by }) if at == address => by,
                    found => panic!("{found:?}"),
                };
                assert_eq!((by.pid, &*by.name), (other.id() as i32, "pilot-agent"));
                assert!(by.to_string().ends_with("container istio-proxy"), "{by}");
            }
            for child in [&mut other, &mut proxy] {
                child.kill().unwrap();
                child.wait().unwrap();
            }
        })
        .join()
        .unwrap();
    }
}
