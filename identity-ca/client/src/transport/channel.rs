// SPDX-License-Identifier: Apache-2.0
use super::client_config;
use crate::verify::Expected;
use crate::{ProgramCredentials, Svid, TrustBundle};
use hyper_util::rt::TokioIo;
use podveil_identity::ProgramIdentity;
use rustls_pki_types::ServerName;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint, Uri};

/// TCP and TLS together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A peer that vanished, or stands still, is noticed after interval + timeout, and long streams with it: new pods wait
/// for that where another replica would answer. Nothing is sent where the peer has just been heard.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a connection to the CA or the controller was not made.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("could not connect to {address}")]
    Tcp {
        address: String,
        #[source]
        source: io::Error,
    },
    /// TCP or TLS took too long, or this program has no SVID yet to show.
    #[error("no connection to {address} within {CONNECT_TIMEOUT:?}")]
    TimedOut { address: String },
    #[error("TLS with {address} failed")]
    Tls {
        address: String,
        #[source]
        source: io::Error,
    },
}

/// A channel to `address` (`host:port`) that connects when it is first used, connects again when the connection is
/// lost, and shows the newest SVID at each connect; before the first one there is it waits for it. The server must prove
/// to be `expected`.
///
/// # Panics
/// Never: the address is not part of the URI that is parsed.
pub fn channel(
    address: &str,
    credentials: &ProgramCredentials,
    expected: ProgramIdentity,
) -> Channel {
    let credentials = credentials.clone();
    lazy(address, move || {
        let credentials = credentials.clone();
        let expected = expected.clone();
        async move {
            let current = credentials.ready().await;
            let server = expected.spiffe_id(&current.bundle.trust_domain);
            Shown {
                svid: Some(current.svid.clone()),
                bundle: current.bundle.clone(),
                server: Expected::Exactly(vec![server]),
            }
        }
    })
}

/// What one connection shows and demands.
pub(crate) struct Shown {
    pub(crate) svid: Option<Arc<Svid>>,
    pub(crate) bundle: Arc<TrustBundle>,
    pub(crate) server: Expected,
}

/// `shown` is asked at each connect, within the bound of the connect.
pub(crate) fn lazy<F>(address: &str, shown: impl Fn() -> F + Send + Sync + 'static) -> Channel
where
    F: Future<Output = Shown> + Send + 'static,
{
    let address: Arc<str> = address.into();
    // The authority is a constant: who the server is follows from its SPIFFE ID, where it is from `address`. The
    // scheme is `http` because tonic itself does no TLS here.
    Endpoint::from_static("http://podveil")
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
            let address = address.clone();
            let shown = shown();
            async move {
                let stream = tokio::time::timeout(CONNECT_TIMEOUT, connect(&address, shown));
                match stream.await {
                    Ok(stream) => stream.map(TokioIo::new),
                    Err(_) => Err(ConnectError::TimedOut {
                        address: address.to_string(),
                    }),
                }
            }
        }))
}

async fn connect(
    address: &str,
    shown: impl Future<Output = Shown>,
) -> Result<TlsStream<TcpStream>, ConnectError> {
    let tcp_error = |source| ConnectError::Tcp {
        address: address.to_owned(),
        source,
    };
    let shown = shown.await;
    let stream = TcpStream::connect(address).await.map_err(tcp_error)?;
    stream.set_nodelay(true).map_err(tcp_error)?;
    let config = client_config(shown.svid.as_deref(), &shown.bundle, shown.server);
    // Neither sent (no SNI) nor compared: the verifier looks at the SPIFFE ID.
    let name = ServerName::try_from("podveil.invalid").expect("a DNS name");
    TlsConnector::from(config)
        .connect(name, stream)
        .await
        .map_err(|source| ConnectError::Tls {
            address: address.to_owned(),
            source,
        })
}
