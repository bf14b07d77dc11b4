// SPDX-License-Identifier: Apache-2.0
use podveil_model::{HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT};
use podveil_netns::{NetNs, NetNsError};
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// A TCP connection as one socket sees it.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Connection {
    pub local: SocketAddr,
    pub remote: SocketAddr,
}

/// As `/proc/net/tcp` numbers them, as far as anybody here asks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum TcpState {
    Closed,
    Listen,
    Open,
    TimeWait,
}

/// Everything TCP in one namespace at one moment.
#[derive(Debug, Default)]
pub struct Connections {
    sockets: Vec<(Connection, TcpState)>,
    listening: BTreeMap<SocketAddr, u64>,
    /// The namespace's own addresses.
    addresses: HashSet<IpAddr>,
}

impl Connections {
    /// # Errors
    /// When `/proc` cannot be read or the namespace cannot be entered.
    pub fn list(netns: &NetNs) -> Result<Self, ListError> {
        netns.run(|| {
            // A kernel without IPv6 has no tcp6.
            let mut lines = fs::read_to_string("/proc/thread-self/net/tcp")?;
            lines.push_str(&fs::read_to_string("/proc/thread-self/net/tcp6").unwrap_or_default());
            let sockets: Vec<Socket> = lines.lines().filter_map(parse).collect();
            let addresses = addresses()?;
            let listening = sockets
                .iter()
                .filter(|socket| socket.state == TcpState::Listen);
            Ok(Self {
                listening: listening
                    .map(|socket| (socket.connection.local, socket.inode))
                    .collect(),
                sockets: (sockets.iter())
                    .map(|socket| (socket.connection, socket.state))
                    .collect(),
                addresses,
            })
        })?
    }

    /// Has the namespace been given an address by which others reach it? Loopback and link-local ones it has by itself.
    pub fn has_address(&self) -> bool {
        let by_itself = |ip: &IpAddr| match ip {
            IpAddr::V4(ip) => ip.is_loopback() || ip.is_link_local(),
            IpAddr::V6(ip) => ip.is_loopback() || ip.is_unicast_link_local(),
        };
        !self.addresses.iter().all(by_itself)
    }

    /// Is this one of the namespace's own addresses?
    pub fn is_own(&self, ip: IpAddr) -> bool {
        self.addresses.contains(&ip)
    }

    /// Connections that leave the pod past the proxy, half-open and closing ones too; not those in TIME-WAIT, which carry
    /// no more data and may be thousands.
    pub fn direct(&self) -> BTreeSet<Connection> {
        let inside: HashSet<Connection> = self.sockets.iter().map(|(c, _)| *c).collect();
        // The application's end of a captured connection: the proxy's end names it as its remote.
        let captured: HashSet<SocketAddr> = inside
            .iter()
            .filter(|c| c.local.port() == OUTBOUND_PORT)
            .map(|c| c.remote)
            .collect();
        self.open()
            .copied()
            .filter(|c| {
                let reversed = Connection {
                    local: c.remote,
                    remote: c.local,
                };
                !is_proxys(c.local.port())
                    && !captured.contains(&c.local)
                    && !inside.contains(&reversed)
                    && !c.local.ip().is_loopback()
                    && self.addresses.contains(&c.local.ip())
            })
            .collect()
    }

    /// How many connections need our rules to live: those accepted on the capture ports, and those that the proxy
    /// opened to the application from an address that is not the pod's.
    pub fn captured(&self) -> usize {
        self.open()
            .filter(|c| {
                let port = c.local.port();
                port == OUTBOUND_PORT
                    || port == INBOUND_PORT
                    || !(self.addresses.contains(&c.local.ip()) || c.local.ip().is_unspecified())
            })
            .count()
    }

    /// The kernel's number of the socket that listens at exactly this address.
    pub fn listener(&self, address: SocketAddr) -> Option<u64> {
        self.listening.get(&address).copied()
    }

    /// Those of `connections` that have ended.
    pub fn ended(&self, connections: &BTreeSet<Connection>) -> BTreeSet<Connection> {
        let open: HashSet<&Connection> = self.open().collect();
        connections
            .iter()
            .filter(|connection| !open.contains(connection))
            .copied()
            .collect()
    }

    fn open(&self) -> impl Iterator<Item = &Connection> {
        self.sockets
            .iter()
            .filter(|(_, state)| *state == TcpState::Open)
            .map(|(connection, _)| connection)
    }
}

/// The addresses of the calling thread's namespace, loopback included.
pub fn addresses() -> io::Result<HashSet<IpAddr>> {
    let interfaces = nix::ifaddrs::getifaddrs()?;
    Ok(interfaces
        .filter_map(|interface| {
            let address = interface.address?;
            let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
        })
        .collect())
}

#[derive(Debug, thiserror::Error)]
pub enum ListError {
    #[error("cannot read /proc/net/tcp or the namespace's addresses")]
    Io(#[from] io::Error),
    #[error(transparent)]
    NetNs(#[from] NetNsError),
}

fn is_proxys(port: u16) -> bool {
    matches!(port, OUTBOUND_PORT | INBOUND_PORT | HBONE_PORT)
}

#[derive(Debug)]
struct Socket {
    connection: Connection,
    state: TcpState,
    inode: u64,
}

/// A line of `/proc/net/tcp` or `tcp6`; `None` for the heading.
fn parse(line: &str) -> Option<Socket> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let local = parse_address(fields.next()?)?;
    let remote = parse_address(fields.next()?)?;
    let state = match u8::from_str_radix(fields.next()?, 16).ok()? {
        6 => TcpState::TimeWait,
        7 => TcpState::Closed,
        10 => TcpState::Listen,
        _ => TcpState::Open,
    };
    // After the state: queues, timer, retransmissions, uid, timeout, inode.
    let inode = fields.nth(5)?.parse().ok()?;
    Some(Socket {
        connection: Connection { local, remote },
        state,
        inode,
    })
}

/// `0100007F:3A99`: groups of 32 bits in host order, then the port. An IPv4 address held by an IPv6 socket is IPv4.
fn parse_address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let group = |index: usize| {
        let text = ip.get(index * 8..index * 8 + 8)?;
        Some(u32::from_str_radix(text, 16).ok()?.to_ne_bytes())
    };
    let ip = match ip.len() {
        8 => IpAddr::V4(Ipv4Addr::from(group(0)?)),
        32 => {
            let mut bytes = [0; 16];
            for (index, chunk) in bytes.chunks_exact_mut(4).enumerate() {
                chunk.copy_from_slice(&group(index)?);
            }
            IpAddr::V6(Ipv6Addr::from(bytes)).to_canonical()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_parsed() {
        let line = "   0: 0100007F:3A99 0109000A:EBD4 01 00000000:00000000 00:00000000 00000000     0        0 77 1";
        let Socket {
            connection,
            state,
            inode,
        } = parse(line).unwrap();
        assert_eq!(inode, 77);
        assert_eq!(connection.local, "127.0.0.1:15001".parse().unwrap());
        assert_eq!(connection.remote, "10.0.9.1:60372".parse().unwrap());
        assert_eq!(state, TcpState::Open);
        assert!(parse("  sl  local_address rem_address   st tx_queue").is_none());
        assert_eq!(
            parse_address("0000000000000000FFFF00000109000A:1F90"),
            Some("10.0.9.1:8080".parse().unwrap())
        );
        assert_eq!(
            parse_address("000009FD000000000000000001000000:1F90"),
            Some("[fd09::1]:8080".parse().unwrap())
        );
    }

    fn connections(list: &[(&str, &str)]) -> Connections {
        Connections {
            sockets: list
                .iter()
                .map(|(local, remote)| {
                    let (local, remote) = (local.parse().unwrap(), remote.parse().unwrap());
                    (Connection { local, remote }, TcpState::Open)
                })
                .collect(),
            listening: BTreeMap::new(),
            addresses: ["10.0.0.1".parse().unwrap(), "127.0.0.1".parse().unwrap()].into(),
        }
    }

    #[test]
    fn only_what_leaves_past_the_proxy_is_direct() {
        let connections = connections(&[
            // captured outbound: application's end, proxy's end
            ("10.0.0.1:40000", "10.0.0.2:80"),
            ("127.0.0.1:15001", "10.0.0.1:40000"),
            // captured inbound, and the hop to the application from the client's address
            ("10.0.0.1:15006", "10.0.0.3:50000"),
            ("10.0.0.3:33333", "10.0.0.1:8080"),
            ("10.0.0.1:8080", "10.0.0.3:33333"),
            // a tunnel
            ("10.0.0.1:15008", "10.0.0.4:41000"),
            // to itself
            ("10.0.0.1:42000", "10.0.0.1:8080"),
            ("10.0.0.1:8080", "10.0.0.1:42000"),
            ("127.0.0.1:43000", "127.0.0.1:9"),
            // past the proxy, both ways
            ("10.0.0.1:44000", "10.0.0.2:80"),
            ("10.0.0.1:8080", "10.0.0.2:45000"),
        ]);
        let direct: Vec<u16> = connections
            .direct()
            .iter()
            .map(|c| c.remote.port())
            .collect();
        assert_eq!(direct, [45000, 80]);
        assert_eq!(connections.captured(), 3);
    }
}
