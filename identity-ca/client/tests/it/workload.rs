// SPDX-License-Identifier: Apache-2.0
use crate::ca::{TestCa, WEB, bundle};
use crate::fake::{FakeCa, Log};
use crate::program::{self, Program};
use podveil_ca_client::{
    CertificateState, WorkloadCertificates, WorkloadLimits, WorkloadSvidError, transport,
};
use podveil_identity::{ProgramIdentity, WorkloadIdentity};
use std::sync::Arc;
use std::time::Duration;

struct Node {
    ca: Arc<TestCa>,
    fake: FakeCa,
    program: Program,
    certificates: WorkloadCertificates,
}

async fn node() -> Node {
    let ca = Arc::new(TestCa::new("a"));
    let fake = FakeCa::start(ca.clone()).await;
    let program = program::start(&fake, &[&ca], None);
    let channel = transport::channel(&fake.address(), &program.credentials, ProgramIdentity::Ca);
    let certificates = WorkloadCertificates::new(
        channel,
        program.credentials.clone(),
        WorkloadLimits::default(),
        program.stop.clone(),
    );
    Node {
        ca,
        fake,
        program,
        certificates,
    }
}

fn web() -> WorkloadIdentity {
    WEB.parse().unwrap()
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future)
        .await
        .expect("within 20 s")
}

#[tokio::test]
async fn all_pods_of_one_identity_share_one_certificate() {
    let node = node().await;
    let held: Vec<_> = (0..10).map(|_| node.certificates.hold(&web())).collect();
    let identity = web();
    let first = within(node.certificates.svid(&identity)).await.unwrap();
    assert_eq!(first.id().to_string(), WEB);
    assert_eq!(first.generation(), 1);
    for held in &held {
        let svid = held.svid().borrow().clone().unwrap();
        assert!(Arc::ptr_eq(&svid, &first));
    }
    assert_eq!(node.fake.log().workloads, [WEB]);
    let snapshot = node.certificates.snapshot();
    assert_eq!(snapshot.len(), 1);
    assert_eq!(snapshot[0].state, CertificateState::Valid);
    assert!(snapshot[0].next_attempt.unwrap() > first.not_before());
}

#[tokio::test]
async fn the_last_drop_forgets_and_the_next_hold_asks_anew() {
    let node = node().await;
    let (a, b) = (
        node.certificates.hold(&web()),
        node.certificates.hold(&web()),
    );
    let first = within(node.certificates.svid(&web())).await.unwrap();
    let mut watch = node.certificates.watch(&web());
    drop(a);
    assert_eq!(node.certificates.snapshot().len(), 1);
    drop(b);
    assert!(node.certificates.snapshot().is_empty());
    assert_eq!(node.certificates.lowest_generation(), None);
    watch.borrow_and_update();
    assert!(watch.changed().await.is_err(), "the sender is gone");
    let error = node.certificates.svid(&web()).await.unwrap_err();
    assert!(matches!(error, WorkloadSvidError::NotHeld { .. }));
    let _again = node.certificates.hold(&web());
    let second = within(node.certificates.svid(&web())).await.unwrap();
    assert_ne!(first.serial(), second.serial());
    assert_ne!(first.chain()[0], second.chain()[0]);
}

#[tokio::test]
async fn a_refusal_is_named_and_tried_again() {
    let node = node().await;
    node.fake.refuse_workloads(true);
    let _held = node.certificates.hold(&web());
    node.fake.until(|log| log.workloads.len() >= 2).await;
    let error = node.certificates.last_error(&web()).unwrap();
    assert!(error.contains("no such workload on this node"), "{error}");
    assert_eq!(
        node.certificates.snapshot()[0].state,
        CertificateState::Missing
    );
    node.fake.refuse_workloads(false);
    within(node.certificates.svid(&web())).await.unwrap();
    assert_eq!(node.certificates.last_error(&web()), None);
}

#[tokio::test]
async fn a_newer_generation_replaces_every_certificate_and_is_then_acknowledged() {
    let node = node().await;
    let names = ["web", "api", "db"];
    let held: Vec<_> = names
        .iter()
        .map(|name| {
            let identity = format!("spiffe://cluster.local/ns/shop/sa/{name}");
            node.certificates.hold(&identity.parse().unwrap())
        })
        .collect();
    for held in &held {
        within(node.certificates.svid(held.identity()))
            .await
            .unwrap();
    }
    assert_eq!(node.certificates.lowest_generation(), Some(1));
    node.fake.issue_from(&node.ca, 2);
    node.fake.send_bundle(bundle(2, &[&node.ca], 2));
    node.fake
        .until(|log| {
            log.in_use
                .last()
                .is_some_and(|said| (said.sequence, said.certificate_generation) == (2, 2))
        })
        .await;
    assert_eq!(node.program.credentials.lowest_generation(), 2);
    for held in &held {
        assert_eq!(held.svid().borrow().as_ref().unwrap().generation(), 2);
    }
    let log = node.fake.log();
    let early = log
        .in_use
        .iter()
        .filter(|said| said.sequence == 2)
        .position(|said| said.certificate_generation == 2)
        .unwrap();
    assert!(early > 0, "the bundle was acknowledged before the re-issue");
    assert_eq!(log.workloads.len(), 2 * names.len());
}

#[tokio::test]
async fn a_certificate_that_peers_would_not_believe_is_not_used() {
    let node = node().await;
    let api = "spiffe://cluster.local/ns/shop/sa/api".parse().unwrap();
    let _connected = node.certificates.hold(&api);
    within(node.certificates.svid(&api)).await.unwrap();
    // From now on the CA issues from a root that no bundle has announced.
    node.fake
        .issue_from(&Arc::new(TestCa::new("unannounced")), 1);
    let held = node.certificates.hold(&web());
    let asked = |log: &Log| log.workloads.iter().filter(|uri| *uri == WEB).count();
    node.fake.until(|log| asked(log) >= 2).await;
    assert!(held.svid().borrow().is_none());
    let error = node.certificates.last_error(&web()).unwrap();
    assert!(error.contains("would not be believed"), "{error}");
}

#[tokio::test]
async fn a_certificate_that_expired_is_not_given_out() {
    let node = node().await;
    node.fake.issue_for(Duration::from_secs(2));
    let _held = node.certificates.hold(&web());
    let mut svid = node.certificates.watch(&web());
    within(svid.wait_for(Option::is_some)).await.unwrap();
    node.fake.refuse_workloads(true);
    within(svid.wait_for(Option::is_none)).await.unwrap();
    assert_eq!(node.certificates.lowest_generation(), None);
}
