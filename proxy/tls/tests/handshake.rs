// SPDX-License-Identifier: Apache-2.0
//! Handshakes in memory, with certificates made here.

use podveil_ca_client::{Svid, TrustBundle, verify};
use podveil_identity::{TrustDomain, WorkloadIdentity};
use podveil_tls::{ConfigCache, Configs, HandshakeError, TlsStream, VerifiedPeer, accept, connect};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, ServerConfig};
use std::io;
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
const CART: &str = "spiffe://cluster.local/ns/shop/sa/cart";

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    bundle: Arc<TrustBundle>,
}

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let root = params.self_signed(&key).unwrap().der().clone();
        let trust_domain = TrustDomain::new("cluster.local").unwrap();
        Self {
            issuer: Issuer::new(params, key),
            bundle: Arc::new(TrustBundle::new(trust_domain, 1, vec![root], 1).unwrap()),
        }
    }

    fn leaf(&self, uris: &[&str]) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = uris
            .iter()
            .map(|uri| SanType::URI((*uri).try_into().unwrap()))
            .collect();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        (vec![certificate.der().clone()], key)
    }

    fn configs(&self, uri: &str) -> Configs {
        let (chain, key) = self.leaf(&[uri]);
        Configs::new(
            Arc::new(Svid::from_der(chain, &key, 1).unwrap()),
            self.bundle.clone(),
        )
    }

    /// A certificate that no [`Svid`] can hold.
    fn resolver(&self, uris: &[&str]) -> Arc<SingleCertAndKey> {
        let (chain, key) = self.leaf(uris);
        let key = rustls::crypto::aws_lc_rs::sign::any_ecdsa_type(&key).unwrap();
        Arc::new(SingleCertAndKey::from(CertifiedKey::new(chain, key)))
    }

    fn verifier(&self) -> Arc<verify::Verifier> {
        Arc::new(verify::Verifier::new(
            self.bundle.clone(),
            verify::Expected::Any,
        ))
    }

    fn loose_client(&self) -> rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert> {
        ClientConfig::builder_with_provider(verify::provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(self.verifier())
    }
}

fn identity(uri: &str) -> WorkloadIdentity {
    uri.parse().unwrap()
}

type Side = Result<(TlsStream<DuplexStream>, VerifiedPeer), HandshakeError>;

async fn handshake(server: Arc<ServerConfig>, client: Arc<ClientConfig>) -> (Side, Side) {
    let (near, far) = tokio::io::duplex(64 * 1024);
    tokio::join!(accept(far, server), connect(near, client))
}

fn h2(mut client: ClientConfig) -> Arc<ClientConfig> {
    client.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(client)
}

#[tokio::test]
async fn both_sides_know_whom_they_met_and_how() {
    let authority = Authority::new();
    let (server, client) = (authority.configs(WEB), authority.configs(CART));
    let expected = [identity("spiffe://cluster.local/ns/a/sa/b"), identity(WEB)];
    let (at_server, at_client) = handshake(server.server(), client.client(&expected)).await;
    let (_, met_by_server) = at_server.unwrap();
    let (_, met_by_client) = at_client.unwrap();
    assert_eq!(met_by_server.identity, identity(CART));
    assert_eq!(met_by_client.identity, identity(WEB));
    assert_eq!(met_by_client.serial, server.svid().serial());
    assert_eq!(met_by_client.not_after, server.svid().not_after());
    for peer in [met_by_server, met_by_client] {
        assert_eq!(peer.key_exchange, "X25519MLKEM768");
        assert_eq!(peer.cipher, "TLS13_AES_256_GCM_SHA384");
    }
}

#[tokio::test]
async fn a_server_of_another_identity_is_refused() {
    let authority = Authority::new();
    let (server, client) = (authority.configs(WEB), authority.configs(CART));
    for expected in [vec![], vec![identity(CART)]] {
        let (at_server, at_client) = handshake(server.server(), client.client(&expected)).await;
        assert!(matches!(at_client, Err(HandshakeError::PeerRefused(_))));
        assert!(matches!(at_server, Err(HandshakeError::RefusedByPeer(_))));
    }
}

#[tokio::test]
async fn a_server_with_two_uri_sans_is_refused() {
    let authority = Authority::new();
    let mut server = ServerConfig::builder_with_provider(verify::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(authority.verifier())
        .with_cert_resolver(authority.resolver(&[WEB, CART]));
    server.alpn_protocols = vec![b"h2".to_vec()];
    let client = authority.configs(CART).client(&[identity(WEB)]);
    let (_, at_client) = handshake(Arc::new(server), client).await;
    assert!(matches!(at_client, Err(HandshakeError::PeerRefused(_))));
}

#[tokio::test]
async fn a_client_with_two_uri_sans_is_refused() {
    let authority = Authority::new();
    let client = authority
        .loose_client()
        .with_client_cert_resolver(authority.resolver(&[CART, WEB]));
    let (at_server, _) = handshake(authority.configs(WEB).server(), h2(client)).await;
    assert!(matches!(at_server, Err(HandshakeError::PeerRefused(_))));
}

#[tokio::test]
async fn a_client_without_certificate_is_refused() {
    let authority = Authority::new();
    let client = authority.loose_client().with_no_client_auth();
    let (at_server, _) = handshake(authority.configs(WEB).server(), h2(client)).await;
    assert!(matches!(
        at_server,
        Err(HandshakeError::PeerRefused(
            rustls::Error::NoCertificatesPresented
        ))
    ));
}

#[tokio::test]
async fn a_client_that_is_one_of_our_programs_is_refused() {
    let authority = Authority::new();
    let client = authority
        .loose_client()
        .with_client_cert_resolver(authority.resolver(&["spiffe://cluster.local/podveil/node/n1"]));
    let (at_server, _) = handshake(authority.configs(WEB).server(), h2(client)).await;
    assert!(matches!(at_server, Err(HandshakeError::PeerRefused(_))));
}

#[tokio::test]
async fn a_client_of_another_root_is_refused_at_its_first_read() {
    let (authority, other) = (Authority::new(), Authority::new());
    let client = authority
        .loose_client()
        .with_client_cert_resolver(other.resolver(&[CART]));
    let (at_server, at_client) = handshake(authority.configs(WEB).server(), h2(client)).await;
    assert!(matches!(at_server, Err(HandshakeError::PeerRefused(_))));
    // The client was done first.
    let (mut stream, _) = at_client.unwrap();
    let error = HandshakeError::from(stream.read(&mut [0]).await.unwrap_err());
    assert!(
        matches!(error, HandshakeError::RefusedByPeer(_)),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_client_without_alpn_is_refused() {
    let authority = Authority::new();
    let client = authority
        .loose_client()
        .with_client_cert_resolver(authority.resolver(&[CART]));
    let (at_server, at_client) = handshake(authority.configs(WEB).server(), Arc::new(client)).await;
    assert!(matches!(at_server, Err(HandshakeError::NoHttp2)));
    assert!(matches!(at_client, Err(HandshakeError::NoHttp2)));
}

#[tokio::test]
async fn no_ticket_is_issued_and_no_name_sent() {
    let authority = Authority::new();
    let (server, client) = (authority.configs(WEB), authority.configs(CART));
    let (near, far) = tokio::io::duplex(64 * 1024);
    let name = ServerName::try_from("web.example").unwrap();
    let connecting =
        tokio_rustls::TlsConnector::from(client.client(&[identity(WEB)])).connect(name, near);
    let accepting = tokio_rustls::TlsAcceptor::from(server.server()).accept(far);
    let (connected, accepted) = tokio::join!(connecting, accepting);
    let (connected, accepted) = (connected.unwrap(), accepted.unwrap());
    assert_eq!(accepted.get_ref().1.server_name(), None);
    assert_eq!(connected.get_ref().1.tls13_tickets_received(), 0);
}

async fn connected() -> (TlsStream<DuplexStream>, TlsStream<DuplexStream>) {
    let authority = Authority::new();
    let (server, client) = (authority.configs(WEB), authority.configs(CART));
    let (server, client) = handshake(server.server(), client.client(&[identity(WEB)])).await;
    (server.unwrap().0, client.unwrap().0)
}

#[tokio::test]
async fn bytes_arrive_whole_whatever_the_sizes_read() {
    let (server, client) = connected().await;
    let bytes: Vec<u8> = (0..9_000_017_usize)
        .map(|at| (at ^ (at >> 9)) as u8)
        .collect();
    let (mut reader, _keep) = tokio::io::split(server);
    let (_keep_too, mut writer) = tokio::io::split(client);
    let sent = bytes.clone();
    let send = async {
        // Records of all sizes, with pauses in which the read-ahead buffer empties.
        let mut rest = &sent[..];
        let mut size = 1;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(size));
            writer.write_all(now).await.unwrap();
            writer.flush().await.unwrap();
            tokio::task::yield_now().await;
            rest = later;
            size = size * 3 % 200_003 + 1;
        }
        writer.shutdown().await.unwrap();
    };
    let receive = async {
        let mut received = Vec::new();
        let mut buffer = vec![0; 200_000];
        for size in [1, 5, 4096, 20_000, 70_000, 200_000].into_iter().cycle() {
            match reader.read(&mut buffer[..size]).await.unwrap() {
                0 => return received,
                count => received.extend_from_slice(&buffer[..count]),
            }
        }
        received
    };
    let (received, ()) = tokio::join!(receive, send);
    assert!(received == bytes);
}

#[tokio::test]
async fn an_end_without_close_notify_is_an_error() {
    let (mut server, client) = connected().await;
    drop(client);
    let error = server.read(&mut [0]).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
}

#[test]
fn configs_are_made_once_for_a_pair() {
    let authority = Authority::new();
    let configs = authority.configs(WEB);
    let (svid, bundle) = (configs.svid().clone(), configs.bundle().clone());
    let cache = ConfigCache::default();
    let first = cache.configs(&svid, &bundle);
    assert!(Arc::ptr_eq(&first, &cache.configs(&svid, &bundle)));
    assert!(Arc::ptr_eq(&first.server(), &first.server()));
    let newer = Arc::new((*bundle).clone());
    assert!(!Arc::ptr_eq(&first, &cache.configs(&svid, &newer)));
}

#[tokio::test]
async fn a_handshakes_future_is_small() {
    let authority = Authority::new();
    let configs = authority.configs(WEB);
    let (near, far) = tokio::io::duplex(1);
    let accepting = size_of_val(&accept(far, configs.server()));
    let connecting = size_of_val(&connect(near, configs.client(&[])));
    assert!(accepting <= 4096, "accept has {accepting} bytes");
    assert!(connecting <= 4096, "connect has {connecting} bytes");
}
