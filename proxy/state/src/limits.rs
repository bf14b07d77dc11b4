// SPDX-License-Identifier: Apache-2.0
use std::time::Duration;

/// The bounds of one pod's connections. The defaults are those of the node program's configuration.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Limits {
    /// How long a connection waits for an answer, a certificate or a tunnel before it is reset. Clients commonly wait
    /// longer, and a restart of one of our programs takes less.
    pub hold_bound: Duration,
    /// One TCP connect. As in ztunnel; a fourth SYN (sent after 1, 3 and 7 s) still has its chance.
    pub connect_timeout: Duration,
    /// One TLS handshake: two round trips and two signatures, with retransmissions.
    pub tls_timeout: Duration,
    /// The HTTP/2 preface and settings of a new tunnel.
    pub h2_timeout: Duration,
    /// The answer to CONNECT: the far side may itself hold for its bound and then connect.
    pub connect_response_timeout: Duration,
    /// Connections of one pod that are accepted and not yet joined to the far side: one pod cannot hold the node's memory.
    pub max_held: usize,
    /// All connections of one pod in one direction: more than the ephemeral ports of one address.
    pub max_connections: usize,
    /// Tunnels that one pod has open, and tunnels that one pod accepts.
    pub max_tunnels: usize,
    /// Streams on one tunnel; a peer may grant fewer. As in ztunnel, so that Envoy peers are never asked for more.
    pub max_streams_per_tunnel: usize,
    /// A tunnel without a stream is closed after this time. As in ztunnel.
    pub tunnel_idle: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            hold_bound: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(10),
            tls_timeout: Duration::from_secs(10),
            h2_timeout: Duration::from_secs(10),
            connect_response_timeout: Duration::from_secs(20),
            max_held: 512,
            max_connections: 65_536,
            max_tunnels: 4096,
            max_streams_per_tunnel: 100,
            tunnel_idle: Duration::from_secs(300),
        }
    }
}
