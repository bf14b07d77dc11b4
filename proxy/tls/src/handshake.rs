// SPDX-License-Identifier: Apache-2.0
use crate::ReadAhead;
use podveil_ca_client::verify::{self, PeerError};
use podveil_identity::{IdentityError, WorkloadIdentity};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, CommonState, ServerConfig};
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::SystemTime;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// Encrypted bytes that wait for the socket. rustls writes all of them with one `writev`; its default of 64 KiB would
/// split each of our larger reads into several.
const WRITE_BUFFER: usize = 256 * 1024;

/// A TLS connection between two workloads.
pub type TlsStream<IO> = tokio_rustls::TlsStream<ReadAhead<IO>>;

/// Whom a handshake proved, and how it was protected.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct VerifiedPeer {
    pub identity: WorkloadIdentity,
    pub not_after: SystemTime,
    /// Lower-case hexadecimal.
    pub serial: String,
    /// The name of the IANA registry with rustls' prefix, e.g. `TLS13_AES_256_GCM_SHA384`.
    pub cipher: &'static str,
    /// E.g. `X25519MLKEM768`.
    pub key_exchange: &'static str,
}

/// Why a handshake failed.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    #[error("the connection failed during the handshake")]
    Io(#[source] io::Error),
    #[error("the peer does not speak HTTP/2 over TLS")]
    NoHttp2,
    #[error("the peer is not a workload")]
    NotAWorkload(#[source] IdentityError),
    /// We refused the peer's certificate.
    #[error("the peer's certificate is refused")]
    PeerRefused(#[source] rustls::Error),
    #[error("the peer's certificate cannot be read")]
    PeerUnreadable(#[source] PeerError),
    #[error("the TLS handshake failed")]
    Protocol(#[source] rustls::Error),
    /// The peer sent an alert: usually it refused our certificate.
    #[error("the peer refused the handshake")]
    RefusedByPeer(#[source] rustls::Error),
}

impl From<io::Error> for HandshakeError {
    fn from(error: io::Error) -> Self {
        match error.downcast::<rustls::Error>() {
            Ok(
                error @ (rustls::Error::InvalidCertificate(_)
                | rustls::Error::NoCertificatesPresented),
            ) => Self::PeerRefused(error),
            Ok(error @ rustls::Error::AlertReceived(_)) => Self::RefusedByPeer(error),
            Ok(error) => Self::Protocol(error),
            Err(error) => Self::Io(error),
        }
    }
}

/// The server's side of a handshake.
///
/// # Errors
/// [`HandshakeError`]; the connection is closed.
pub async fn accept<IO>(
    io: IO,
    config: Arc<ServerConfig>,
) -> Result<(TlsStream<IO>, VerifiedPeer), HandshakeError>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let mut stream = TlsAcceptor::from(config).accept(ReadAhead::new(io)).await?;
    let connection = stream.get_mut().1;
    connection.set_buffer_limit(Some(WRITE_BUFFER));
    let peer = verified_peer(connection)?;
    Ok((stream.into(), peer))
}

/// The client's side of a handshake. `config` names the expected servers ([`crate::Configs::client`]).
///
/// In TLS 1.3 the client is done before the server has judged the client's certificate: a refusal arrives as an error of
/// the first read.
///
/// # Errors
/// [`HandshakeError`]; the connection is closed.
pub async fn connect<IO>(
    io: IO,
    config: Arc<ClientConfig>,
) -> Result<(TlsStream<IO>, VerifiedPeer), HandshakeError>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    // Not sent (no SNI) and not looked at by the verifier, which knows SPIFFE IDs only.
    let name = ServerName::IpAddress(IpAddr::V4(Ipv4Addr::UNSPECIFIED).into());
    let mut stream = TlsConnector::from(config)
        .connect(name, ReadAhead::new(io))
        .await?;
    let connection = stream.get_mut().1;
    connection.set_buffer_limit(Some(WRITE_BUFFER));
    let peer = verified_peer(connection)?;
    Ok((stream.into(), peer))
}

fn verified_peer(connection: &CommonState) -> Result<VerifiedPeer, HandshakeError> {
    if connection.alpn_protocol() != Some(b"h2") {
        return Err(HandshakeError::NoHttp2);
    }
    let leaf = verify::leaf(connection.peer_certificates().unwrap_or_default())
        .map_err(HandshakeError::PeerUnreadable)?;
    Ok(VerifiedPeer {
        identity: WorkloadIdentity::try_from(&leaf.id).map_err(HandshakeError::NotAWorkload)?,
        not_after: leaf.not_after,
        serial: leaf.serial,
        cipher: connection
            .negotiated_cipher_suite()
            .and_then(|suite| suite.suite().as_str())
            .unwrap_or("unknown"),
        key_exchange: connection
            .negotiated_key_exchange_group()
            .and_then(|group| group.name().as_str())
            .unwrap_or("unknown"),
    })
}
