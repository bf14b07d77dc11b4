// SPDX-License-Identifier: Apache-2.0
use crate::harness::{DEADLINE, Place, authorities, node, trust_domain};
use podveil_ca_client::transport::channel;
use podveil_ca_client::{Module, ProgramCredentials};
use podveil_identity::ProgramIdentity;
use podveil_proto::podveil::ca::v1 as wire;
use podveil_proto::podveil::ca::v1::{RotationKind, RotationStep};
use podveil_proto::podveil::node::v1::trust_bundles_client::TrustBundlesClient;
use podveil_proto::podveil::node::v1::{self as node_wire, BundleInUse};
use std::net::SocketAddr;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

/// The steps told, each once, and the last event.
async fn story(events: Streaming<wire::RotationEvent>) -> (Vec<RotationStep>, wire::RotationEvent) {
    let read = async {
        let mut events = events;
        let mut steps = Vec::new();
        let mut last = None;
        while let Some(event) = events.message().await.unwrap() {
            if steps.last() != Some(&event.step()) {
                steps.push(event.step());
            }
            last = Some(event);
        }
        (steps, last.unwrap())
    };
    tokio::time::timeout(DEADLINE, read).await.unwrap()
}

async fn rotate(place: &Place, kind: RotationKind, timeout: u32) -> Streaming<wire::RotationEvent> {
    let request = wire::RotateRequest {
        kind: kind.into(),
        timeout_seconds: timeout,
    };
    place
        .admin()
        .await
        .rotate(request)
        .await
        .unwrap()
        .into_inner()
}

/// A consumer of bundles that acknowledges only when told to.
struct Silent {
    answers: mpsc::Sender<BundleInUse>,
    bundles: Streaming<node_wire::TrustBundle>,
}

async fn silent(ca: SocketAddr, credentials: &ProgramCredentials) -> Silent {
    let (answers, outgoing) = mpsc::channel(4);
    let message = BundleInUse {
        sequence: 0,
        certificate_generation: 1,
        module: node_wire::Module::Redirect.into(),
    };
    answers.send(message).await.unwrap();
    let bundles =
        TrustBundlesClient::new(channel(&ca.to_string(), credentials, ProgramIdentity::Ca))
            .stream(ReceiverStream::new(outgoing))
            .await
            .unwrap()
            .into_inner();
    Silent { answers, bundles }
}

#[tokio::test]
async fn a_root_rotation_is_followed_by_every_program() {
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
    n1.ready().await;
    controller.ready().await;
    let before = place
        .status_when("all have the bundle", |status| {
            status.consumers.len() == 3
                && status
                    .consumers
                    .iter()
                    .all(|consumer| consumer.bundle_sequence == 1)
        })
        .await;
    let old_bundle = n1.current().unwrap().bundle.clone();

    let (steps, last) = story(rotate(&place, RotationKind::Root, 0).await).await;
    assert_eq!(
        steps,
        [
            RotationStep::AddRoot,
            RotationStep::SwitchIssuer,
            RotationStep::Reissue,
            RotationStep::Withdraw,
            RotationStep::Done
        ],
        "{last:?}"
    );
    assert_eq!((last.acknowledged, last.expected), (3, 3));

    let after = place.status().await;
    assert_eq!(after.bundle_sequence, 4);
    assert_eq!(after.certificate_generation, 2);
    assert_eq!(after.authorities.len(), 2);
    assert!(
        authorities(&after)
            .iter()
            .all(|serial| !authorities(&before).contains(serial))
    );
    for program in [&n1, &controller] {
        let now = program.current().unwrap();
        assert_eq!(now.svid.generation(), 2);
        assert_eq!(now.bundle.roots.len(), 1);
        assert_ne!(now.bundle.roots, old_bundle.roots);
    }
    // A program that comes now meets a CA of the new root alone.
    let n2 = place.program(address, node("n2"), Module::Proxy, "node.n2", &ca.stop);
    assert_eq!(n2.ready().await.svid.generation(), 2);
    ca.stop().await;
}

#[tokio::test]
async fn a_leaf_rotation_keeps_the_root() {
    let place = Place::new();
    let ca = place.start().await;
    let n1 = place.program(
        ca.running.address,
        node("n1"),
        Module::Proxy,
        "node.n1",
        &ca.stop,
    );
    n1.ready().await;
    place
        .status_when("n1 is there", |status| status.consumers.len() == 2)
        .await;
    let before = authorities(&place.status().await);
    let serial = n1.current().unwrap().svid.serial().to_owned();
    let (steps, last) = story(rotate(&place, RotationKind::Leaf, 0).await).await;
    assert_eq!(last.step(), RotationStep::Done, "{last:?}");
    assert!(!steps.contains(&RotationStep::AddRoot) && !steps.contains(&RotationStep::Withdraw));
    let after = authorities(&place.status().await);
    assert_eq!(after[0], before[0], "the root");
    assert_ne!(after[1], before[1], "who issues");
    assert_ne!(n1.current().unwrap().svid.serial(), serial);
    ca.stop().await;
}

#[tokio::test]
async fn a_silent_program_stops_a_rotation_and_is_named_and_then_it_goes_on() {
    let place = Place::new();
    let ca = place.start().await;
    let address = ca.running.address;
    let n1 = place.program(address, node("n1"), Module::Proxy, "node.n1", &ca.stop);
    n1.ready().await;
    let mut quiet = silent(address, &n1).await;
    assert_eq!(quiet.bundles.message().await.unwrap().unwrap().sequence, 1);

    let (steps, last) = story(rotate(&place, RotationKind::Root, 1).await).await;
    assert_eq!(steps, [RotationStep::AddRoot, RotationStep::Failed]);
    assert_eq!(last.waiting_for, ["podveil-node on n1 (redirect)"]);
    assert_eq!(place.status().await.authorities.len(), 3, "nothing undone");

    // Another kind is refused while this one is not over.
    let request = wire::RotateRequest {
        kind: RotationKind::Leaf.into(),
        timeout_seconds: 0,
    };
    let status = place.admin().await.rotate(request).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::FailedPrecondition, "{status}");

    let answering = tokio::spawn(async move {
        let mut generation = 1;
        while let Ok(Some(bundle)) = quiet.bundles.message().await {
            // As a program that replaces its certificates at once.
            generation = generation.max(bundle.certificate_generation);
            let message = BundleInUse {
                sequence: bundle.sequence,
                certificate_generation: generation,
                module: node_wire::Module::Redirect.into(),
            };
            if quiet.answers.send(message).await.is_err() {
                return;
            }
        }
    });
    let (steps, last) = story(rotate(&place, RotationKind::Root, 5).await).await;
    assert_eq!(last.step(), RotationStep::Done, "{steps:?} {last:?}");
    assert_eq!(place.status().await.authorities.len(), 2);
    assert_eq!(
        n1.current().unwrap().svid.id(),
        &node("n1").spiffe_id(&trust_domain())
    );
    ca.stop().await;
    answering.await.unwrap();
}

#[tokio::test]
async fn an_unspecified_kind_is_refused() {
    let place = Place::new();
    let ca = place.start().await;
    let status = place
        .admin()
        .await
        .rotate(wire::RotateRequest::default())
        .await
        .unwrap_err();
    assert_eq!(status.code(), tonic::Code::InvalidArgument);
    ca.stop().await;
}
