// SPDX-License-Identifier: Apache-2.0
use super::*;
use crate::config::LimitsConfig;
use crate::consumers::Consumers;
use crate::entitlement::{Entitlements, Programs};
use crate::first_contact::Tokens;
use crate::ledger::Lives;
use crate::reading::AHEAD;
use crate::store::{Directory, Store};
use podveil_ca_client::Key;
use podveil_ca_client::verify;
use std::path::Path;
use tokio::sync::watch;

const DAY: Duration = Duration::from_secs(24 * 3600);
const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

struct Fixture {
    issuance: Issuance,
    entitlements: watch::Sender<Option<Arc<Entitlements>>>,
    _folder: tempfile::TempDir,
}

fn entitlements(node: &str) -> Option<Arc<Entitlements>> {
    let text = format!(
        "trustDomain: cluster.local\n\
         nodes: [{{name: n1}}, {{name: n2}}]\n\
         namespaces: [{{name: shop, labels: {{io.cilium/mtls-enabled: \"true\"}}}}]\n\
         workloads:\n  - {{name: web-1, namespace: shop, uid: u1, node: {node}, serviceAccount: web, \
         addresses: [10.244.1.10]}}\n"
    );
    let cluster = podveil_source::parse(1, [(Path::new("cluster.yaml"), text.as_str())]).unwrap();
    let now = Instant::now().into_std();
    Some(Arc::new(Entitlements::read(
        &cluster,
        &Programs::Listed,
        None,
        now,
    )))
}

async fn fixture(limits: LimitsConfig) -> Fixture {
    let folder = tempfile::tempdir().unwrap();
    let tokens = folder.path().join("tokens");
    std::fs::create_dir(&tokens).unwrap();
    std::fs::write(tokens.join("node.n1"), "node-one-token-0123").unwrap();
    std::fs::write(tokens.join("node.n2"), "node-two-token-0123").unwrap();
    let lives = Lives {
        root: 365 * DAY,
        issuing: 30 * DAY,
    };
    let trust_domain = TrustDomain::new("cluster.local").unwrap();
    let ledger = Ledger::open(
        Store::Directory(Arc::new(
            Directory::open(&folder.path().join("data")).unwrap(),
        )),
        &trust_domain,
        lives,
        SystemTime::now(),
    );
    let ledger = Arc::new(ledger.await.unwrap());
    let (entitlements, received) = watch::channel(None);
    Fixture {
        issuance: Issuance {
            ledger,
            reading: Reading::new(received),
            first_contact: FirstContact::Files(Tokens::new(tokens)),
            admission: Admission::new(limits, Instant::now().into_std()),
            metrics: Metrics::new(),
            leaf_life: DAY,
            program_life: DAY,
        },
        entitlements,
        _folder: folder,
    }
}

impl Fixture {
    async fn workload(&self, peer: &str, identity: &str) -> Result<Issued, Refusal> {
        self.workload_with(peer, identity, identity, DAY).await
    }

    async fn workload_with(
        &self,
        peer: &str,
        identity: &str,
        named: &str,
        life: Duration,
    ) -> Result<Issued, Refusal> {
        let peer = SpiffeId::new(peer).unwrap();
        self.issuance
            .workload(Some(&peer), Some(identity), &csr(named), life)
            .await
    }
}

fn csr(named: &str) -> String {
    // What is no SPIFFE ID cannot be named; then the request's name does not matter.
    let id = SpiffeId::new(named)
        .or_else(|_| SpiffeId::new(WEB))
        .unwrap();
    Key::generate().unwrap().request(&id).unwrap()
}

fn leaf(issued: &Issued) -> verify::Leaf {
    use podveil_ca_client::TrustBundle;
    let chain = TrustBundle::from_pem(
        TrustDomain::new("cluster.local").unwrap(),
        issued.chain[0].as_bytes(),
    );
    verify::leaf(&chain.unwrap().roots).unwrap()
}

const N1: &str = "spiffe://cluster.local/podveil/node/n1";
const N2: &str = "spiffe://cluster.local/podveil/node/n2";

#[tokio::test(start_paused = true)]
async fn a_node_gets_the_identity_of_its_own_workload() {
    let fixture = fixture(LimitsConfig::default()).await;
    fixture.entitlements.send_replace(entitlements("n1"));
    let issued = fixture.workload(N1, WEB).await.unwrap();
    assert_eq!(issued.generation, 1);
    assert_eq!(issued.chain.len(), 3);
    assert_eq!(leaf(&issued).id.to_string(), WEB);
}

#[tokio::test(start_paused = true)]
async fn another_node_is_refused_after_the_ca_could_have_caught_up() {
    let fixture = fixture(LimitsConfig::default()).await;
    fixture.entitlements.send_replace(entitlements("n1"));
    let before = Instant::now();
    let refusal = fixture.workload(N2, WEB).await.unwrap_err();
    assert_eq!(refusal.reason(), "no_such_workload_on_node");
    assert_eq!(before.elapsed(), AHEAD);
}

#[tokio::test(start_paused = true)]
async fn a_request_ahead_of_the_reading_is_answered_when_it_catches_up() {
    let fixture = fixture(LimitsConfig::default()).await;
    fixture.entitlements.send_replace(entitlements("n1"));
    let catches_up = async {
        tokio::time::sleep(Duration::from_secs(2)).await;
        fixture.entitlements.send_replace(entitlements("n2"));
    };
    let (issued, ()) = tokio::join!(fixture.workload(N2, WEB), catches_up);
    issued.unwrap();
}

#[tokio::test(start_paused = true)]
async fn before_the_first_reading_nothing_is_issued_to_nodes() {
    let fixture = fixture(LimitsConfig::default()).await;
    let refusal = fixture.workload(N1, WEB).await.unwrap_err();
    assert_eq!(refusal.reason(), "not_ready");
}

#[tokio::test(start_paused = true)]
async fn what_is_not_a_workload_of_ours_is_refused() {
    let fixture = fixture(LimitsConfig::default()).await;
    fixture.entitlements.send_replace(entitlements("n1"));
    for (identity, reason) in [
        ("spiffe://cluster.local/podveil/node/n1", "program_identity"),
        ("spiffe://cluster.local/podveil/ca", "program_identity"),
        ("spiffe://cluster.local/podveil", "program_identity"),
        ("spiffe://cluster.local/podveil/x/y", "program_identity"),
        ("spiffe://other.domain/ns/shop/sa/web", "wrong_trust_domain"),
        ("spiffe://cluster.local", "bad_identity"),
        ("spiffe://cluster.local/ns/shop/sa/web/x", "bad_identity"),
        (
            "spiffe://cluster.local/ns/shop/sa/web,spiffe://cluster.local/ns/bank/sa/admin",
            "bad_identity",
        ),
        ("https://cluster.local/ns/shop/sa/web", "bad_identity"),
        ("", "bad_identity"),
    ] {
        let refusal = fixture.workload(N1, identity).await.unwrap_err();
        assert_eq!(refusal.reason(), reason, "{identity}");
        let status = tonic::Status::from(refusal);
        assert!(
            identity.is_empty() || !status.message().contains(identity),
            "the identity is never echoed: {status}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn the_identity_is_built_again_from_its_parts() {
    let fixture = fixture(LimitsConfig::default()).await;
    fixture.entitlements.send_replace(entitlements("n1"));
    // Scheme and trust domain compare without case; what is issued is the one form that peers compare with.
    let issued = fixture
        .workload_with(N1, "SPIFFE://Cluster.Local/ns/shop/sa/web", WEB, DAY)
        .await;
    assert_eq!(leaf(&issued.unwrap()).id.to_string(), WEB);
}

#[tokio::test(start_paused = true)]
async fn only_nodes_ask_for_workloads() {
    let fixture = fixture(LimitsConfig::default()).await;
    fixture.entitlements.send_replace(entitlements("n1"));
    for peer in [
        "spiffe://cluster.local/podveil/controller",
        "spiffe://cluster.local/podveil/ca",
        WEB,
    ] {
        let refusal = fixture.workload(peer, WEB).await.unwrap_err();
        assert_eq!(refusal.reason(), "caller_is_no_node", "{peer}");
    }
    let refusal = fixture
        .issuance
        .workload(None, Some(WEB), &csr(WEB), DAY)
        .await;
    assert_eq!(refusal.unwrap_err().reason(), "no_credential");
    let peer = SpiffeId::new(N1).unwrap();
    let refusal = fixture
        .issuance
        .workload(Some(&peer), None, &csr(WEB), DAY)
        .await;
    assert_eq!(refusal.unwrap_err().reason(), "no_identity");
}

#[tokio::test(start_paused = true)]
async fn a_request_that_names_another_identity_is_refused() {
    let fixture = fixture(LimitsConfig::default()).await;
    fixture.entitlements.send_replace(entitlements("n1"));
    let refusal = fixture
        .workload_with(N1, WEB, "spiffe://cluster.local/ns/shop/sa/db", DAY)
        .await
        .unwrap_err();
    assert_eq!(refusal.reason(), "csr_names_another_identity");
}

#[tokio::test(start_paused = true)]
async fn the_life_asked_for_is_clamped_never_refused() {
    let fixture = fixture(LimitsConfig::default()).await;
    fixture.entitlements.send_replace(entitlements("n1"));
    for (asked, given) in [
        (0, 24 * 3600),
        (1, 60),
        (3600, 3600),
        (400 * 24 * 3600, 24 * 3600),
        (i64::MAX as u64, 24 * 3600),
    ] {
        let before = SystemTime::now();
        let issued = fixture
            .workload_with(N1, WEB, WEB, Duration::from_secs(asked))
            .await
            .unwrap();
        let life = leaf(&issued).not_after.duration_since(before).unwrap();
        assert!(
            life.abs_diff(Duration::from_secs(given)) < Duration::from_secs(10),
            "{asked}: {life:?}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_flood_is_told_when_to_come_back() {
    let fixture = fixture(LimitsConfig {
        requests_per_second_per_program: 2,
        ..LimitsConfig::default()
    })
    .await;
    fixture.entitlements.send_replace(entitlements("n1"));
    for _ in 0..4 {
        fixture.workload(N1, WEB).await.unwrap();
    }
    let refusal = fixture.workload(N1, WEB).await.unwrap_err();
    assert_eq!(refusal.reason(), "rate_limited");
    tokio::time::advance(Duration::from_millis(500)).await;
    fixture.workload(N1, WEB).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_program_gets_its_own_identity_by_its_token_and_then_by_its_svid() {
    let fixture = fixture(LimitsConfig::default()).await;
    fixture.entitlements.send_replace(entitlements("n1"));
    let issuance = &fixture.issuance;
    let issued = issuance
        .program(None, Some("node-one-token-0123"), &csr(N1))
        .await
        .unwrap();
    assert_eq!(leaf(&issued).id.to_string(), N1);
    // With an SVID no token is looked at, whatever it is.
    let peer = SpiffeId::new(N1).unwrap();
    let issued = issuance
        .program(Some(&peer), Some("node-two-token-0123"), &csr(N1))
        .await
        .unwrap();
    assert_eq!(leaf(&issued).id.to_string(), N1);
}

#[tokio::test(start_paused = true)]
async fn a_token_of_another_program_is_refused() {
    let fixture = fixture(LimitsConfig::default()).await;
    fixture.entitlements.send_replace(entitlements("n1"));
    let issuance = &fixture.issuance;
    for (peer, token, named, reason) in [
        (
            None,
            Some("node-two-token-0123"),
            N1,
            "csr_names_another_identity",
        ),
        (None, Some("nobody's-token-0123"), N1, "unknown_token"),
        (None, Some(""), N1, "unknown_token"),
        (None, None, N1, "no_credential"),
        (
            Some(N2),
            Some("node-one-token-0123"),
            N1,
            "csr_names_another_identity",
        ),
        (Some(WEB), None, N1, "caller_not_renewable"),
        (
            Some("spiffe://cluster.local/podveil/ca"),
            None,
            "spiffe://cluster.local/podveil/ca",
            "caller_not_renewable",
        ),
    ] {
        let peer = peer.map(|peer| SpiffeId::new(peer).unwrap());
        let refusal = issuance
            .program(peer.as_ref(), token, &csr(named))
            .await
            .unwrap_err();
        assert_eq!(refusal.reason(), reason, "{peer:?} {token:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_that_left_the_cluster_does_not_renew_its_own_svid() {
    let fixture = fixture(LimitsConfig::default()).await;
    let peer = SpiffeId::new("spiffe://cluster.local/podveil/node/n3").unwrap();
    let named = csr("spiffe://cluster.local/podveil/node/n3");
    let renewal = || fixture.issuance.program(Some(&peer), None, &named);
    assert_eq!(renewal().await.unwrap_err().reason(), "not_ready");
    fixture.entitlements.send_replace(entitlements("n1"));
    let before = Instant::now();
    assert_eq!(renewal().await.unwrap_err().reason(), "no_such_program");
    assert_eq!(before.elapsed(), AHEAD, "it could have been ahead of us");
}

#[tokio::test(start_paused = true)]
async fn each_refusal_is_counted_where_dashboards_look() {
    let fixture = fixture(LimitsConfig::default()).await;
    let issuance = &fixture.issuance;
    issuance
        .metrics
        .observe(issuance.ledger.clone(), Consumers::new(), Arc::default());
    fixture.entitlements.send_replace(entitlements("n1"));
    fixture.workload(N1, WEB).await.unwrap();
    fixture.workload(N2, WEB).await.unwrap_err();
    let peer = SpiffeId::new(N1).unwrap();
    let csr = fixture
        .issuance
        .workload(Some(&peer), Some(WEB), "junk", DAY)
        .await;
    csr.unwrap_err();
    let mut text = String::new();
    prometheus::TextEncoder::new()
        .encode_utf8(&fixture.issuance.metrics.registry().gather(), &mut text)
        .unwrap();
    for line in [
        "citadel_server_csr_count 3",
        "citadel_server_success_cert_issuance_count 1",
        "citadel_server_csr_parsing_err_count 1",
        "citadel_server_id_extraction_err_count 1",
        "podveil_ca_refusals_total{reason=\"csr_malformed\"} 1",
        "podveil_ca_refusals_total{reason=\"no_such_workload_on_node\"} 1",
        "podveil_ca_bundle_sequence 1",
        "podveil_ca_certificate_generation 1",
        "podveil_ca_consumers 0",
        "podveil_ca_rotation_active 0",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
    assert!(text.contains("citadel_server_root_cert_expiry_timestamp "));
    assert!(text.contains("citadel_server_cert_chain_expiry_seconds "));
}
