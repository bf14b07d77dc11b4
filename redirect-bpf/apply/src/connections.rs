// SPDX-License-Identifier: Apache-2.0
use podveil_model::{HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT};
use podveil_netns::sock_diag::{self, TcpSocket, TcpState};
use podveil_netns::{NetNs, NetNsError};
use std::collections::{BTreeSet, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};

/// A TCP connection as one socket sees it.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Connection {
    pub local: SocketAddr,
    pub remote: SocketAddr,
}

/// Everything TCP in one namespace at one moment.
#[derive(Debug, Default)]
pub struct Connections {
    sockets: Vec<(Connection, TcpState)>,
    addresses: Addresses,
}

impl Connections {
    /// # Errors
    /// When the kernel does not tell, or the namespace cannot be entered.
    pub fn list(netns: &NetNs) -> Result<Self, ListError> {
        let sockets = sock_diag::sockets(netns).map_err(ListError::Io)?;
        let connection = |TcpSocket { local, remote, .. }| Connection { local, remote };
        Ok(Self {
            sockets: (sockets.into_iter())
                .map(|socket| (connection(socket), socket.state))
                .collect(),
            addresses: Addresses::of(netns)?,
        })
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
                    && self.addresses.has(c.local.ip())
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
                    || !(self.addresses.has(c.local.ip()) || c.local.ip().is_unspecified())
            })
            .count()
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

/// The addresses of a namespace, loopback included.
#[derive(Clone, Debug, Default)]
pub struct Addresses(HashSet<IpAddr>);

impl Addresses {
    /// # Errors
    /// When the kernel does not tell, or the namespace cannot be entered.
    pub fn of(netns: &NetNs) -> Result<Self, ListError> {
        let interfaces = netns.run(nix::ifaddrs::getifaddrs)?;
        let ips = interfaces
            .map_err(io::Error::from)?
            .filter_map(|interface| {
                let address = interface.address?;
                let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
                v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
            });
        Ok(Self(ips.collect()))
    }

    /// Has the namespace been given an address by which others reach it? Loopback and link-local ones it has by itself.
    pub fn are_given(&self) -> bool {
        let by_itself = |ip: &IpAddr| match ip {
            IpAddr::V4(ip) => ip.is_loopback() || ip.is_link_local(),
            IpAddr::V6(ip) => ip.is_loopback() || ip.is_unicast_link_local(),
        };
        !self.0.iter().all(by_itself)
    }

    /// Is this one of the namespace's own addresses?
    pub fn has(&self, ip: IpAddr) -> bool {
        self.0.contains(&ip)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = IpAddr> {
        self.0.iter().copied()
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ListError {
    #[error("the kernel does not tell the namespace's sockets or addresses")]
    Io(#[from] io::Error),
    #[error(transparent)]
    NetNs(#[from] NetNsError),
}

fn is_proxys(port: u16) -> bool {
    matches!(port, OUTBOUND_PORT | INBOUND_PORT | HBONE_PORT)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connections(list: &[(&str, &str)]) -> Connections {
        Connections {
            sockets: list
                .iter()
                .map(|(local, remote)| {
                    let (local, remote) = (local.parse().unwrap(), remote.parse().unwrap());
                    (Connection { local, remote }, TcpState::Open)
                })
                .collect(),
            addresses: Addresses(
                ["10.0.0.1", "127.0.0.1"]
                    .map(|ip| ip.parse().unwrap())
                    .into(),
            ),
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
