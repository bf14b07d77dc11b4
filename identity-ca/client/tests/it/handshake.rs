// SPDX-License-Identifier: Apache-2.0
//! Whole handshakes in memory.

use crate::ca::{CA, NODE, TestCa, WEB, bundle};
use podveil_ca_client::transport::{client_config, server_config};
use podveil_ca_client::verify::{Expected, peer_id};
use podveil_ca_client::{Credentials, Svid, TrustBundle};
use podveil_identity::SpiffeId;
use rustls::{NamedGroup, ProtocolVersion};
use rustls_pki_types::ServerName;
use std::io;
use std::sync::Arc;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_rustls::{TlsAcceptor, TlsConnector};

struct Seen {
    client: Option<String>,
    server: String,
    group: NamedGroup,
    version: ProtocolVersion,
    alpn: Vec<u8>,
}

fn exactly(uri: &str) -> Expected {
    Expected::Exactly(vec![SpiffeId::new(uri).unwrap()])
}

/// A handshake and one byte each way: in TLS 1.3 the client learns only from the first read that it was refused.
async fn meet(
    server: (Arc<Svid>, &Arc<TrustBundle>, Expected, bool),
    client: (Option<Arc<Svid>>, &Arc<TrustBundle>, Expected),
) -> io::Result<Seen> {
    let (near, far) = tokio::io::duplex(16 * 1024);
    let credentials = Credentials {
        svid: server.0,
        bundle: server.1.clone(),
    };
    let accept = TlsAcceptor::from(server_config(&credentials, server.2, server.3)).accept(far);
    let config = client_config(client.0.as_deref(), client.1, client.2);
    let name = ServerName::try_from("podveil.invalid").unwrap();
    let connect = TlsConnector::from(config).connect(name, near);
    let serve = async {
        let mut stream = accept.await?;
        stream.write_all(b"!").await?;
        stream.read_u8().await?;
        Ok::<_, io::Error>(
            stream
                .get_ref()
                .1
                .peer_certificates()
                .map(|certificates| peer_id(certificates).unwrap().to_string()),
        )
    };
    let ask = async {
        let mut stream = connect.await?;
        stream.read_u8().await?;
        stream.write_all(b"?").await?;
        stream.flush().await?;
        let tls = stream.get_ref().1;
        Ok::<_, io::Error>(Seen {
            client: None,
            server: peer_id(tls.peer_certificates().unwrap())
                .unwrap()
                .to_string(),
            group: tls.negotiated_key_exchange_group().unwrap().name(),
            version: tls.protocol_version().unwrap(),
            alpn: tls.alpn_protocol().unwrap().to_vec(),
        })
    };
    let (served, asked) = tokio::join!(serve, ask);
    let client = served?;
    Ok(Seen { client, ..asked? })
}

#[tokio::test]
async fn both_sides_prove_who_they_are_with_tls_13_and_post_quantum_key_exchange() {
    let ca = TestCa::new("a");
    let (bundle, node, server) = (bundle(1, &[&ca], 0), ca.svid(NODE), ca.svid(CA));
    let seen = meet(
        (server, &bundle, Expected::AnyProgram, false),
        (Some(node), &bundle, exactly(CA)),
    )
    .await
    .unwrap();
    assert_eq!(seen.client.as_deref(), Some(NODE));
    assert_eq!(seen.server, CA);
    assert_eq!(seen.version, ProtocolVersion::TLSv1_3);
    assert_eq!(seen.group, NamedGroup::X25519MLKEM768);
    assert_eq!(seen.alpn, b"h2");
}

#[tokio::test]
async fn a_server_with_another_id_is_refused() {
    let ca = TestCa::new("a");
    let (bundle, node) = (bundle(1, &[&ca], 0), ca.svid(NODE));
    let failed = meet(
        (ca.svid(WEB), &bundle, Expected::Any, false),
        (Some(node), &bundle, exactly(CA)),
    );
    assert!(failed.await.is_err());
}

#[tokio::test]
async fn a_client_with_another_id_is_refused() {
    let ca = TestCa::new("a");
    let (bundle, server) = (bundle(1, &[&ca], 0), ca.svid(CA));
    let failed = meet(
        (server.clone(), &bundle, exactly(NODE), true),
        (Some(ca.svid(WEB)), &bundle, exactly(CA)),
    );
    assert!(failed.await.is_err());
}

#[tokio::test]
async fn a_client_without_certificate_is_taken_only_where_optional() {
    let ca = TestCa::new("a");
    let (bundle, server) = (bundle(1, &[&ca], 0), ca.svid(CA));
    let refused = meet(
        (server.clone(), &bundle, Expected::AnyProgram, false),
        (None, &bundle, exactly(CA)),
    );
    assert!(refused.await.is_err());
    let taken = meet(
        (server.clone(), &bundle, Expected::AnyProgram, true),
        (None, &bundle, exactly(CA)),
    );
    assert_eq!(taken.await.unwrap().client, None);
}

#[tokio::test]
async fn a_peer_of_another_root_is_refused_by_each_side() {
    let (ours, theirs) = (TestCa::new("ours"), TestCa::new("theirs"));
    let (trust_ours, trust_both) = (bundle(1, &[&ours], 0), bundle(1, &[&ours, &theirs], 0));
    let client = meet(
        (ours.svid(CA), &trust_ours, Expected::Any, true),
        (Some(theirs.svid(NODE)), &trust_both, exactly(CA)),
    );
    assert!(client.await.is_err());
    let server = meet(
        (theirs.svid(CA), &trust_both, Expected::Any, false),
        (Some(ours.svid(NODE)), &trust_ours, exactly(CA)),
    );
    assert!(server.await.is_err());
    let rotation = meet(
        (theirs.svid(CA), &trust_both, Expected::Any, false),
        (Some(ours.svid(NODE)), &trust_both, exactly(CA)),
    );
    assert!(rotation.await.is_ok());
}

#[test]
fn only_tls_13_with_the_three_key_exchange_groups_is_offered() {
    let provider = podveil_ca_client::verify::provider();
    let groups: Vec<_> = provider
        .kx_groups
        .iter()
        .map(|group| group.name())
        .collect();
    assert_eq!(
        groups,
        [
            NamedGroup::X25519MLKEM768,
            NamedGroup::X25519,
            NamedGroup::secp256r1
        ]
    );
    assert!(
        provider
            .cipher_suites
            .iter()
            .all(|suite| suite.version().version == ProtocolVersion::TLSv1_3)
    );
}
