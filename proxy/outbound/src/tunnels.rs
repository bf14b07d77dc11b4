// SPDX-License-Identifier: Apache-2.0
//! Makes the tunnels of one pod.

use crate::pool::{Carrier, Connect, Fate};
use podveil_hbone::{NoSlot, Settings, Slot, Tunnel, TunnelEnd};
use podveil_identity::WorkloadIdentity;
use podveil_model::Uid;
use podveil_net::{ConnectError, prepare_tunnel};
use podveil_state::{PodContext, View};
use podveil_tls::{Configs, HandshakeError, VerifiedPeer};
use std::hash::{Hash, Hasher};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::debug;

/// What a tunnel is good for. Any of it changed means another tunnel.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub(crate) struct TunnelKey {
    /// The destination; a replaced pod with the same address has another.
    pub uid: Uid,
    pub address: SocketAddr,
    /// The only identity that the server may prove.
    pub expected: WorkloadIdentity,
    /// Our certificate and whom we trust.
    pub credentials: Credentials,
}

/// One pair of certificate and trust bundle, told apart by the configuration that was made of it.
#[derive(Clone, Debug)]
pub(crate) struct Credentials(pub Arc<Configs>);

impl PartialEq for Credentials {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Credentials {}

impl Hash for Credentials {
    fn hash<H: Hasher>(&self, state: &mut H) {
        Arc::as_ptr(&self.0).hash(state);
    }
}

impl TunnelKey {
    /// What becomes of a tunnel of this key now.
    pub fn fate(&self, view: &View, own: &Uid, current: Option<&Credentials>) -> Fate {
        // Either end is gone, or is another pod now.
        if view.by_uid(own).is_none() || view.by_uid(&self.uid).is_none() {
            return Fate::Terminate;
        }
        if current.is_some_and(|current| *current == self.credentials) {
            Fate::Keep
        } else {
            Fate::Retire
        }
    }
}

/// Why there is no tunnel.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TunnelError {
    #[error(transparent)]
    Connect(ConnectError),
    #[error("the tunnel's socket failed")]
    Socket(#[source] io::Error),
    #[error("no TLS handshake with {address} within {after:?}")]
    TlsTimeout {
        address: SocketAddr,
        after: Duration,
    },
    #[error("no TLS with {address} as {expected}")]
    Tls {
        address: SocketAddr,
        expected: WorkloadIdentity,
        #[source]
        source: HandshakeError,
    },
    #[error("{address} did not begin HTTP/2 within {after:?}")]
    Http2Timeout {
        address: SocketAddr,
        after: Duration,
    },
    #[error("no HTTP/2 with {address}")]
    Http2 {
        address: SocketAddr,
        #[source]
        source: TunnelEnd,
    },
}

/// A tunnel with what is known of its far end.
#[derive(Clone, Debug)]
pub(crate) struct PodTunnel {
    tunnel: Tunnel,
    pub peer: Arc<VerifiedPeer>,
    end: CancellationToken,
}

impl PodTunnel {
    pub fn tunnel(&self) -> &Tunnel {
        &self.tunnel
    }
}

impl Carrier for PodTunnel {
    type Slot = Slot;

    fn try_reserve(&self) -> Result<Slot, NoSlot> {
        self.tunnel.try_reserve()
    }

    async fn reserve(&self) -> Result<Slot, NoSlot> {
        self.tunnel.reserve().await
    }

    fn streams(&self) -> usize {
        self.tunnel.streams()
    }

    fn is_spent(&self) -> bool {
        // The server's certificate was good at the handshake; nothing new is entrusted to it afterwards.
        self.tunnel.is_closing() || self.peer.not_after <= SystemTime::now()
    }

    fn end(&self) -> CancellationToken {
        self.end.clone()
    }
}

/// Connects, proves who we are, and checks who they are, each step within its own time.
#[derive(Debug)]
pub(crate) struct Connector {
    pub pod: Arc<PodContext>,
    /// Where the tunnels' drivers run.
    pub tasks: TaskTracker,
}

impl Connect for Connector {
    type Key = TunnelKey;
    type Tunnel = PodTunnel;
    type Error = TunnelError;

    async fn connect(&self, key: &TunnelKey) -> Result<PodTunnel, TunnelError> {
        let limits = &self.pod.limits;
        let address = key.address;
        let stream = self
            .pod
            .sockets
            .dial(None, address, limits.connect_timeout)
            .await
            .map_err(TunnelError::Connect)?;
        prepare_tunnel(&stream).map_err(TunnelError::Socket)?;

        let config = key
            .credentials
            .0
            .client(std::slice::from_ref(&key.expected));
        let handshake = timeout(limits.tls_timeout, podveil_tls::connect(stream, config)).await;
        let (stream, peer) = handshake
            .map_err(|_| TunnelError::TlsTimeout {
                address,
                after: limits.tls_timeout,
            })?
            .map_err(|source| TunnelError::Tls {
                address,
                expected: key.expected.clone(),
                source,
            })?;

        let settings = Settings {
            max_streams: u32::try_from(limits.max_streams_per_tunnel).unwrap_or(u32::MAX),
            ..Settings::default()
        };
        let opened = timeout(limits.h2_timeout, Tunnel::open(stream, &settings)).await;
        let (tunnel, driver) = opened
            .map_err(|_| TunnelError::Http2Timeout {
                address,
                after: limits.h2_timeout,
            })?
            .map_err(|source| TunnelError::Http2 { address, source })?;

        let end = CancellationToken::new();
        self.tasks.spawn({
            let (end, stop) = (end.clone(), self.pod.stop.clone());
            async move {
                // Dropping the driver terminates the tunnel.
                let ended = tokio::select! {
                    biased;
                    () = end.cancelled() => None,
                    () = stop.cancelled() => None,
                    ended = driver => Some(ended),
                };
                end.cancel();
                debug!(%address, ?ended, "tunnel ended");
            }
        });
        Ok(PodTunnel {
            tunnel,
            peer: Arc::new(peer),
            end,
        })
    }
}
