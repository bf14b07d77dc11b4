// SPDX-License-Identifier: Apache-2.0
use podveil_netns::{NetNs, NetNsError};
use socket2::{Domain, Protocol, Socket, Type};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpSocket, TcpStream};

/// The mark on the proxy's packets, because Cilium's and Istio's rules in the pod recognise the proxy by it. Our own
/// rules never take it as proof.
pub const MARK: u32 = 0x539;

/// Source ports of connections that keep their client's address: below the range from which Linux gives ports to
/// connections of the client's own. A plain connection of the same client to the same application (older than
/// enrolment, or its TIME_WAIT) has a port of that range, and a hop on the same 4-tuple would run into it and hang.
pub const KEPT_SOURCE_PORTS: RangeInclusive<u16> = 10_000..=32_767;

/// With nine of ten ports taken, all of these fail once in five thousand.
const KEPT_SOURCE_ATTEMPTS: u32 = 80;

#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Family {
    V4,
    V6,
}

/// Why a connection from inside a pod's network namespace was not made.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("cannot enter the network namespace")]
    Namespace(#[source] NetNsError),
    #[error("{destination} did not answer within {after:?}")]
    NoAnswer {
        destination: SocketAddr,
        after: Duration,
    },
    #[error("cannot connect to {destination}")]
    Refused {
        destination: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("cannot make a socket for {destination}")]
    Socket {
        destination: SocketAddr,
        #[source]
        source: io::Error,
    },
}

/// Why a listener inside a pod's network namespace was not made.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("cannot listen on port {port}")]
    Bind {
        port: u16,
        #[source]
        source: io::Error,
    },
    #[error("cannot enter the network namespace")]
    Namespace(#[source] NetNsError),
}

/// Makes sockets that live in one pod's network namespace.
#[derive(Clone, Debug)]
pub struct PodSockets {
    netns: Arc<NetNs>,
    mark: Option<u32>,
}

impl PodSockets {
    /// `mark` is [`MARK`] in production; `None` makes sockets without privileges.
    pub fn new(netns: Arc<NetNs>, mark: Option<u32>) -> Self {
        Self { netns, mark }
    }

    /// Connects from the pod's own address. The socket has the options of [`crate::prepare_application`]; for a tunnel
    /// [`crate::prepare_tunnel`] replaces them.
    ///
    /// # Errors
    /// [`ConnectError`]; no socket is left.
    pub async fn connect(
        &self,
        destination: SocketAddr,
        timeout: Duration,
    ) -> Result<TcpStream, ConnectError> {
        self.dial(None, destination, timeout).await
    }

    /// Connects with `source` as the source address, which need not be local, and a port of [`KEPT_SOURCE_PORTS`].
    ///
    /// # Errors
    /// [`ConnectError`]; no socket is left. `source` is never replaced by the pod's own address.
    pub async fn connect_as(
        &self,
        source: IpAddr,
        destination: SocketAddr,
        timeout: Duration,
    ) -> Result<TcpStream, ConnectError> {
        let mut attempts = 1..=KEPT_SOURCE_ATTEMPTS;
        loop {
            let port = rand::random_range(KEPT_SOURCE_PORTS);
            let from = SocketAddr::new(source, port);
            match self.dial(Some(from), destination, timeout).await {
                Err(
                    ConnectError::Refused { source: error, .. }
                    | ConnectError::Socket { source: error, .. },
                ) if is_taken(&error) && attempts.next().is_some() => {}
                outcome => return outcome,
            }
        }
    }

    /// Listens on the wildcard address of one family, transparently: TPROXY may deliver connections to foreign addresses.
    ///
    /// # Errors
    /// [`ListenError`].
    pub fn listen(
        &self,
        port: u16,
        family: Family,
        backlog: u32,
    ) -> Result<TcpListener, ListenError> {
        let address = match family {
            Family::V4 => SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)),
            Family::V6 => SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)),
        };
        let make = || {
            let socket = self.socket(address)?;
            socket.set_reuse_address(true)?;
            if family == Family::V6 {
                socket.set_only_v6(true)?;
            }
            if self.mark.is_some() {
                set_transparent(&socket, address)?;
            }
            socket.bind(&address.into())?;
            socket.listen(i32::try_from(backlog).unwrap_or(i32::MAX))?;
            Ok(socket)
        };
        let socket = self
            .netns
            .run(make)
            .map_err(ListenError::Namespace)?
            .map_err(|source| ListenError::Bind { port, source })?;
        TcpListener::from_std(socket.into()).map_err(|source| ListenError::Bind { port, source })
    }

    async fn dial(
        &self,
        source: Option<SocketAddr>,
        destination: SocketAddr,
        timeout: Duration,
    ) -> Result<TcpStream, ConnectError> {
        // A socket belongs to the namespace it was made in, so only this part runs there.
        let socket = self
            .netns
            .run(|| {
                let socket = self.socket(destination)?;
                // Before the connect: one that is given up in the moment it succeeds is reset as well.
                crate::prepare_application(&socket)?;
                if let Some(source) = source {
                    set_source(&socket, source)?;
                }
                Ok(socket)
            })
            .map_err(ConnectError::Namespace)?
            .map_err(|source| ConnectError::Socket {
                destination,
                source,
            })?;
        let connecting = TcpSocket::from_std_stream(socket.into()).connect(destination);
        tokio::time::timeout(timeout, connecting)
            .await
            .map_err(|_| ConnectError::NoAnswer {
                destination,
                after: timeout,
            })?
            .map_err(|source| ConnectError::Refused {
                destination,
                source,
            })
    }

    /// A socket that does not block, for the family of `like`.
    fn socket(&self, like: SocketAddr) -> io::Result<Socket> {
        let socket = Socket::new(
            Domain::for_address(like),
            Type::STREAM.nonblocking(),
            Some(Protocol::TCP),
        )?;
        if let Some(mark) = self.mark {
            socket.set_mark(mark)?;
        }
        Ok(socket)
    }
}

fn set_source(socket: &Socket, source: SocketAddr) -> io::Result<()> {
    set_transparent(socket, source)?;
    match source {
        SocketAddr::V4(_) => socket.set_freebind_v4(true)?,
        SocketAddr::V6(_) => socket.set_freebind_v6(true)?,
    }
    // A port serves as many connections as there are destinations: what must be free is the 4-tuple.
    socket.set_reuse_address(true)?;
    socket.bind(&source.into())
}

/// The port, or the 4-tuple with it, belongs to another connection.
fn is_taken(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable
    )
}

fn set_transparent(socket: &Socket, like: SocketAddr) -> io::Result<()> {
    match like {
        SocketAddr::V4(_) => socket.set_ip_transparent_v4(true),
        SocketAddr::V6(_) => socket.set_ip_transparent_v6(true),
    }
}
