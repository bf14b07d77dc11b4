// SPDX-License-Identifier: Apache-2.0
//! The listener and the channel, connection by connection.

use crate::ca::{CA, HOUR, LeafSpec, NODE, TestCa, bundle, leaf, p256};
use podveil_ca_client::transport::{
    Refusals, TlsConnection, channel, client_config, incoming, server_config,
};
use podveil_ca_client::verify::Expected;
use podveil_ca_client::{Credentials, ProgramCredentials, Svid, TrustBundle};
use podveil_identity::ProgramIdentity;
use podveil_proto::podveil::ca::v1::ProgramSvidRequest;
use podveil_proto::podveil::ca::v1::programs_client::ProgramsClient;
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_stream::{Stream, StreamExt as _};

struct Server {
    ca: TestCa,
    bundle: Arc<TrustBundle>,
    address: SocketAddr,
    connections: Pin<Box<dyn Stream<Item = io::Result<TlsConnection>> + Send>>,
    refusals: Arc<Refusals>,
}

async fn server() -> Server {
    let ca = TestCa::new("a");
    let bundle = bundle(1, &[&ca], 0);
    let credentials = Credentials {
        svid: ca.svid(CA),
        bundle: bundle.clone(),
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let config = move || Some(server_config(&credentials, Expected::AnyProgram, false));
    let refusals = Arc::default();
    Server {
        ca,
        bundle,
        address,
        connections: Box::pin(incoming(listener, config, Arc::clone(&refusals))),
        refusals,
    }
}

impl Server {
    async fn next(&mut self) -> TlsConnection {
        let next = tokio::time::timeout(Duration::from_secs(20), self.connections.next());
        next.await.unwrap().unwrap().unwrap()
    }

    async fn connect(&self, svid: &Svid) -> io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
        let config = client_config(Some(svid), &self.bundle, Expected::AnyProgram);
        let name = ServerName::try_from("podveil.invalid").unwrap();
        let stream = TcpStream::connect(self.address).await?;
        TlsConnector::from(config).connect(name, stream).await
    }
}

fn id(connection: &TlsConnection) -> String {
    use tonic::transport::server::Connected as _;
    connection.connect_info().id.unwrap().to_string()
}

#[tokio::test]
async fn a_client_that_says_nothing_holds_up_nobody() {
    let mut server = server().await;
    let _silent = TcpStream::connect(server.address).await.unwrap();
    let _client = server.connect(&server.ca.svid(NODE)).await.unwrap();
    assert_eq!(id(&server.next().await), NODE);
}

#[tokio::test]
async fn one_identity_has_no_more_than_its_share_of_connections() {
    const SHARE: usize = 32;
    let mut server = server().await;
    let greedy = server.ca.svid(NODE);
    let mut held = Vec::new();
    for _ in 0..SHARE {
        let client = server.connect(&greedy).await.unwrap();
        held.push((client, server.next().await));
    }
    // The handshake of TLS 1.3 is over for the client before the server has judged.
    let mut refused = server.connect(&greedy).await.unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(20), refused.read_u8());
    assert!(ended.await.unwrap().is_err());
    assert!(
        server
            .refusals
            .read()
            .contains(&("too_many_of_identity", 1))
    );
    let other = server.ca.svid("spiffe://cluster.local/podveil/controller");
    let _other = server.connect(&other).await.unwrap();
    server.next().await;
    // One that ends gives its place to the next.
    held.pop();
    let _again = server.connect(&greedy).await.unwrap();
    assert_eq!(id(&server.next().await), NODE);
}

#[tokio::test]
async fn a_connection_ends_with_the_certificate_that_opened_it() {
    let mut server = server().await;
    let key = p256();
    let spec = LeafSpec {
        not_after: SystemTime::now() + HOUR,
        ..leaf(NODE)
    };
    let chain = server.ca.sign(&spec, &key);
    let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let svid = Svid::from_der(chain, &der, 1).unwrap();
    let client = server.connect(&svid).await.unwrap();
    let mut connection = server.next().await;
    // Time runs ahead as soon as nothing else is to do.
    tokio::time::pause();
    let start = tokio::time::Instant::now();
    let error = connection.read_u8().await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    let lived = start.elapsed();
    assert!(
        lived <= HOUR && lived > HOUR - Duration::from_secs(60),
        "{lived:?}"
    );
    drop(client);
}

#[tokio::test]
async fn a_lost_connection_is_made_again_with_the_newest_svid() {
    let mut server = server().await;
    let credentials = ProgramCredentials::fixed(Credentials {
        svid: server.ca.svid(NODE),
        bundle: server.bundle.clone(),
    });
    let address = server.address.to_string();
    let ca = channel(&address, &credentials, ProgramIdentity::Ca);
    let ask = || {
        let mut programs = ProgramsClient::new(ca.clone());
        tokio::spawn(async move {
            programs
                .issue_program_svid(ProgramSvidRequest::default())
                .await
        })
    };
    let first = ask();
    let connection = server.next().await;
    assert_eq!(id(&connection), NODE);
    drop(connection);
    assert!(first.await.unwrap().is_err());
    let controller = "spiffe://cluster.local/podveil/controller";
    credentials.replace(Credentials {
        svid: server.ca.svid(controller),
        bundle: server.bundle.clone(),
    });
    let second = ask();
    assert_eq!(id(&server.next().await), controller);
    second.abort();
}

#[tokio::test]
async fn the_listener_is_closed_with_the_stream() {
    let server = server().await;
    let address = server.address;
    drop(server);
    // The task notices before the runtime has nothing else to do.
    while TcpStream::connect(address).await.is_ok() {
        tokio::task::yield_now().await;
    }
}
