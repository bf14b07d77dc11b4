// SPDX-License-Identifier: Apache-2.0
use crate::harness::{Place, node, trust_domain};
use podveil_ca_client::transport::channel;
use podveil_ca_client::{Credentials, Key, Module, ProgramCredentials, Svid, TrustBundle};
use podveil_identity::{ProgramIdentity, SpiffeId};
use podveil_proto::istio::v1::auth::istio_certificate_service_client::IstioCertificateServiceClient;
use podveil_proto::istio::v1::auth::{IstioCertificateRequest, IstioCertificateResponse};
use podveil_proto::podveil::ca::v1::ProgramSvidRequest;
use podveil_proto::podveil::ca::v1::programs_client::ProgramsClient;
use podveil_proto::podveil::node::v1::trust_bundles_client::TrustBundlesClient;
use podveil_proto::podveil::node::v1::{self as node_wire, BundleInUse};
use prost_types::value::Kind;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::{Code, Response, Status};

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

async fn create(
    ca: SocketAddr,
    caller: &ProgramCredentials,
    identity: &str,
    key: &Key,
) -> Result<Response<IstioCertificateResponse>, Status> {
    let value = prost_types::Value {
        kind: Some(Kind::StringValue(identity.to_owned())),
    };
    let request = IstioCertificateRequest {
        csr: key.request(&SpiffeId::new(WEB).unwrap()).unwrap(),
        validity_duration: 24 * 3600,
        metadata: Some(prost_types::Struct {
            fields: [("ImpersonatedIdentity".to_owned(), value)].into(),
        }),
    };
    IstioCertificateServiceClient::new(channel(&ca.to_string(), caller, ProgramIdentity::Ca))
        .create_certificate(request)
        .await
}

fn blocks(pem: &str) -> TrustBundle {
    TrustBundle::from_pem(trust_domain(), pem.as_bytes()).unwrap()
}

#[tokio::test]
async fn a_program_comes_by_token_then_by_svid_and_its_node_gets_its_workloads() {
    let place = Place::new();
    let ca = place.start().await;
    let address = ca.running.address;
    let n1 = place.program(address, node("n1"), Module::Proxy, "node.n1", &ca.stop);
    let credentials = n1.ready().await;
    assert_eq!(
        credentials.svid.id(),
        &node("n1").spiffe_id(&trust_domain())
    );

    // No token from here on.
    let key = Key::generate().unwrap();
    let request = ProgramSvidRequest {
        csr: key.request(credentials.svid.id()).unwrap(),
    };
    let renewed = ProgramsClient::new(channel(&address.to_string(), &n1, ProgramIdentity::Ca))
        .issue_program_svid(request)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(renewed.certificate_generation, 1);
    assert_eq!(renewed.cert_chain.len(), 3);

    let key = Key::generate().unwrap();
    let response = create(address, &n1, WEB, &key).await.unwrap();
    let generation = response.metadata().get("podveil-certificate-generation");
    assert_eq!(generation.unwrap(), "1");
    let chain = response.into_inner().cert_chain;
    let shape: Vec<usize> = chain.iter().map(|pem| blocks(pem).roots.len()).collect();
    assert_eq!(shape, [1, 1, 1]);
    let presented = [&chain[0], &chain[1]]
        .into_iter()
        .flat_map(|pem| blocks(pem).roots)
        .collect();
    let svid = Svid::new(presented, &key, 1).unwrap();
    assert_eq!(svid.id().to_string(), WEB);

    // A workload is not one of our programs: its certificate opens nothing here.
    let workload = ProgramCredentials::fixed(Credentials {
        svid: Arc::new(svid),
        bundle: Arc::new(blocks(&chain[2])),
    });
    let refused = create(address, &workload, WEB, &key).await.unwrap_err();
    // The handshake failed: the CA itself was never reached.
    assert!(refused.metadata().get("podveil-reason").is_none());
    assert!(refused.message().contains("transport error"), "{refused}");
    ca.stop().await;
}

#[tokio::test]
async fn refusals_name_their_reason_on_the_wire() {
    let place = Place::new();
    let ca = place.start().await;
    let address = ca.running.address;
    let n1 = place.program(address, node("n1"), Module::Proxy, "node.n1", &ca.stop);
    let controller = place.program(
        address,
        ProgramIdentity::Controller,
        Module::Controller,
        "controller",
        &ca.stop,
    );
    let key = Key::generate().unwrap();
    for (caller, identity, code, reason) in [
        (
            &n1,
            "spiffe://cluster.local/podveil/node/n2",
            Code::PermissionDenied,
            "program_identity",
        ),
        (
            &n1,
            "spiffe://cluster.local/ns/shop/sa/db",
            Code::PermissionDenied,
            "csr_names_another_identity",
        ),
        (&n1, "nonsense", Code::InvalidArgument, "bad_identity"),
        (
            &controller,
            WEB,
            Code::PermissionDenied,
            "caller_is_no_node",
        ),
    ] {
        let status = create(address, caller, identity, &key).await.unwrap_err();
        assert_eq!(status.code(), code, "{status}");
        assert_eq!(status.metadata().get("podveil-reason").unwrap(), reason);
    }
    let n2 = place.program(address, node("n2"), Module::Proxy, "node.n2", &ca.stop);
    let status = create(address, &n2, WEB, &key).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    assert!(status.message().starts_with("no_such_workload_on_node"));
    ca.stop().await;
}

#[tokio::test]
async fn a_token_of_another_program_gets_nothing() {
    let place = Place::new();
    let ca = place.start().await;
    std::fs::write(place.path("tokens/wrong"), "nobody's-token-0123456").unwrap();
    for (token, reason) in [
        ("node.n2", "csr_names_another_identity"),
        ("wrong", "unknown_token"),
    ] {
        let n1 = place.program(
            ca.running.address,
            node("n1"),
            Module::Proxy,
            token,
            &ca.stop,
        );
        let mut error = n1.last_error();
        let error = error.wait_for(Option::is_some).await.unwrap().clone();
        assert!(error.as_deref().unwrap().contains(reason), "{error:?}");
        assert!(n1.current().is_none());
    }
    ca.stop().await;
}

#[tokio::test]
async fn a_bundle_never_sent_cannot_be_acknowledged() {
    let place = Place::new();
    let ca = place.start().await;
    let address = ca.running.address;
    let n1 = place.program(address, node("n1"), Module::Redirect, "node.n1", &ca.stop);
    let mut client =
        TrustBundlesClient::new(channel(&address.to_string(), &n1, ProgramIdentity::Ca));
    let lie = BundleInUse {
        sequence: 99,
        certificate_generation: 99,
        module: node_wire::Module::Proxy.into(),
    };
    let mut stream = client
        .stream(tokio_stream::iter([lie]))
        .await
        .unwrap()
        .into_inner();
    let status = stream.message().await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    ca.stop().await;
}

#[tokio::test]
async fn a_restart_keeps_the_root_the_sequence_and_the_programs() {
    let place = Place::new();
    let ca = place.start().await;
    let address = ca.running.address;
    let programs = tokio_util::sync::CancellationToken::new();
    let n1 = place.program(address, node("n1"), Module::Proxy, "node.n1", &programs);
    n1.ready().await;
    let listed = |status: &podveil_proto::podveil::ca::v1::StatusResponse| {
        status
            .consumers
            .iter()
            .any(|consumer| consumer.module == "proxy" && consumer.bundle_sequence == 1)
    };
    let before = place.status_when("n1 has the bundle", listed).await;
    ca.stop().await;
    let ca = place.start_at(address).await;
    let after = place.status_when("n1 is back", listed).await;
    assert_eq!(after, before);
    ca.stop().await;
    programs.cancel();
}

#[tokio::test]
async fn sockets_metrics_and_readiness_are_as_promised() {
    let place = Place::new();
    std::fs::remove_file(place.path("cluster.yaml")).unwrap();
    let ca = place.start().await;
    let mode = |path: &str| {
        let metadata = std::fs::metadata(place.path(path)).unwrap();
        metadata.permissions().mode() & 0o777
    };
    assert_eq!(mode("run"), 0o700);
    assert_eq!(mode("run/admin.sock"), 0o600);
    assert_eq!(mode("data"), 0o700);
    assert_eq!(mode("data/journal.json"), 0o600);
    assert_eq!(mode("data/bundle.pem"), 0o644);

    let ready = ask(ca.running.readiness_address, "/healthz/ready").await;
    assert!(ready.starts_with("HTTP/1.1 503"), "{ready}");
    std::fs::write(place.path("cluster.yaml"), crate::harness::CLUSTER).unwrap();
    let poll = async {
        while !ask(ca.running.readiness_address, "/healthz/ready")
            .await
            .starts_with("HTTP/1.1 200")
        {}
    };
    tokio::time::timeout(crate::harness::DEADLINE, poll)
        .await
        .unwrap();
    let metrics = ask(ca.running.metrics_address, "/metrics").await;
    assert!(
        metrics.contains("\ncitadel_server_csr_count 0\n"),
        "{metrics}"
    );
    assert!(metrics.contains("\npodveil_ca_consumers 1\n"), "{metrics}");
    assert!(
        metrics.contains("\npodveil_ca_consumers_behind 0\n"),
        "{metrics}"
    );
    ca.stop().await;
}

async fn ask(address: SocketAddr, path: &str) -> String {
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}
