// SPDX-License-Identifier: Apache-2.0
use std::time::Duration;

/// The bounds of one pod's connections. Each default says why.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Limits {
    /// How long a connection waits for an answer, a certificate or a tunnel before it is reset. Clients commonly wait
    /// longer, and a restart of one of our programs takes less.
    pub hold_bound: Duration,
    /// One TCP connect. The third SYN (sent after 1 and 3 s) still has its chance.
    pub connect_timeout: Duration,
    /// One TLS handshake: two round trips and two signatures.
    pub tls_timeout: Duration,
    /// The HTTP/2 preface and settings of a new tunnel.
    pub h2_timeout: Duration,
    /// The answer to CONNECT: the far side may itself hold for its bound and then connect.
    pub connect_response_timeout: Duration,
    /// Connections of one pod that are accepted and not yet joined to the far side.
    pub max_held: usize,
    /// All connections of one pod in one direction: one pod cannot take the node's descriptors.
    pub max_connections: usize,
    /// Tunnels that one pod has open, and tunnels that one pod accepts.
    pub max_tunnels: usize,
    /// Streams on one tunnel; a peer may grant fewer. Istio's default, so that Envoy peers are never asked for more.
    pub max_streams_per_tunnel: usize,
    /// A tunnel without a stream is closed after this time.
    pub tunnel_idle: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            hold_bound: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(5),
            tls_timeout: Duration::from_secs(5),
            h2_timeout: Duration::from_secs(5),
            connect_response_timeout: Duration::from_secs(15),
            max_held: 1024,
            max_connections: 32768,
            max_tunnels: 1024,
            max_streams_per_tunnel: 100,
            tunnel_idle: Duration::from_secs(60),
        }
    }
}
