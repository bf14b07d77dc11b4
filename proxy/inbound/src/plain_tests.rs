// SPDX-License-Identifier: Apache-2.0
//! Captured connections over loopback, with the addresses injected.

use super::*;
use podveil_flow::{CloseReason, ConnectionRecord, Protection, Verdict};
use podveil_model::{Mode, Stage};
use podveil_state::testing::{Rig, connection};
use podveil_state::{Limits, View};
use podveil_testing::{WorkloadBuilder, policy, workload};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn us() -> WorkloadBuilder {
    workload("us").address("10.0.0.2")
}

/// The kubelet, as a test wants it.
#[derive(Debug)]
struct OnlyFrom(&'static str);

impl Kubelet for OnlyFrom {
    fn is_probe(&self, peer: SocketAddr, _: SocketAddr) -> bool {
        peer == self.0.parse().unwrap()
    }
}

struct Bench {
    rig: Rig,
    inbound: Arc<PlainInbound>,
}

impl Bench {
    fn new() -> Self {
        let limits = Limits {
            hold_bound: Duration::from_millis(100),
            ..Limits::default()
        };
        let rig = Rig::new(&us().build(), limits);
        rig.state.update(|view| {
            let peer = workload("peer").address("10.0.0.3").stage(Stage::None);
            view.insert_workload(peer.build());
            let enrolled = workload("enrolled").address("10.0.0.4");
            view.insert_workload(enrolled.build());
            view.set_synced();
        });
        let inbound = Arc::new(PlainInbound::new(
            rig.pod.clone(),
            Arc::new(OnlyFrom("10.0.0.9:40000")),
        ));
        let watched = inbound.clone();
        tokio::spawn(async move {
            let (state, stop) = (watched.pod.state.clone(), watched.pod.stop.clone());
            watched.registry.watch(state, stop).await;
        });
        Self { rig, inbound }
    }

    /// A captured connection, as its client sees it.
    async fn client(&self, peer: &str, original: &str) -> TcpStream {
        let (near, far) = connection().await;
        let ends = Ends {
            peer: PeerAddr(peer.parse().unwrap()),
            local: LocalAddr("10.0.0.2:15006".parse().unwrap()),
            original: OriginalDst(original.parse().unwrap()),
        };
        let accepted = Accepted::new(far, ends);
        let held = self.inbound.held.clone().try_acquire_owned().unwrap();
        let inbound = self.inbound.clone();
        tokio::spawn(async move { inbound.serve(accepted, held).await });
        near
    }

    async fn closed(&self) -> ConnectionRecord {
        self.rig.records.closed(1).await.remove(0)
    }
}

#[tokio::test]
async fn plain_from_a_pod_that_is_not_enrolled_flows() {
    let bench = Bench::new();
    let application = bench.rig.network.listen("10.0.0.2:8080").await;
    let mut client = bench.client("10.0.0.3:40000", "10.0.0.2:8080").await;
    let (mut server, _) = application.accept().await.unwrap();
    client.write_all(b"question").await.unwrap();
    client.shutdown().await.unwrap();
    let mut question = String::new();
    server.read_to_string(&mut question).await.unwrap();
    server.write_all(b"answer").await.unwrap();
    drop(server);
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    assert_eq!((question.as_str(), answer.as_str()), ("question", "answer"));
    let record = bench.closed().await;
    assert_eq!(record.close, CloseReason::Clean);
    assert_eq!(record.protection, Protection::Plain);
    let kept = Some("10.0.0.3".parse().unwrap());
    assert_eq!(bench.rig.network.dialled()[0].0, kept);
}

#[tokio::test]
async fn a_refused_connection_is_reset_and_names_its_reason() {
    for (peer, original, reason) in [
        (
            "10.0.0.4:40000",
            "10.0.0.2:8080",
            DropReason::PlaintextMandatory,
        ),
        ("10.0.0.3:40000", "10.0.0.9:8080", DropReason::BadTarget),
        ("10.0.0.3:40000", "127.0.0.1:8080", DropReason::BadTarget),
        ("10.0.0.3:40000", "10.0.0.2:15001", DropReason::BadTarget),
        ("10.0.0.3:40000", "10.0.0.2:81", DropReason::ConnectFailed),
        // Nobody has told who this is, within the hold bound.
        (
            "10.0.0.77:40000",
            "10.0.0.2:8080",
            DropReason::PlaintextMandatory,
        ),
    ] {
        let bench = Bench::new();
        let _application = bench.rig.network.listen("10.0.0.2:8080").await;
        let mut client = bench.client(peer, original).await;
        let reset = client.read(&mut [0]).await;
        assert!(reset.is_err(), "{peer} to {original}: a clean end");
        let Verdict::Dropped { reason: why, .. } = bench.closed().await.verdict else {
            panic!("{peer} to {original} was allowed");
        };
        assert_eq!(why, reason, "{peer} to {original}");
    }
}

/// Opens a connection, changes the state, and says whether it lives.
async fn lives_after(change: impl FnOnce(&mut View)) -> Result<(), CloseReason> {
    let bench = Bench::new();
    let application = bench.rig.network.listen("10.0.0.2:8080").await;
    let mut client = bench.client("10.0.0.3:40000", "10.0.0.2:8080").await;
    let (mut server, _) = application.accept().await.unwrap();
    bench.rig.records.opened(1).await;
    bench.rig.state.update(change);
    let alive = client.write_all(b"x").await.is_ok() && server.read_exact(&mut [0]).await.is_ok();
    if alive {
        return Ok(());
    }
    assert!(client.read(&mut [0]).await.is_err(), "a clean end");
    Err(bench.closed().await.close)
}

#[tokio::test]
async fn enrolment_leaves_a_living_connection_alone() {
    let enrolled = lives_after(|view| {
        view.insert_workload(workload("peer").address("10.0.0.3").epoch(2, 0).build());
    });
    assert_eq!(enrolled.await, Ok(()));
}

#[tokio::test]
async fn strict_mode_policy_and_removal_end_a_living_connection() {
    let strict = lives_after(|view| {
        view.insert_workload(us().mode(Mode::Strict).epoch(2, 0).build());
    });
    assert_eq!(strict.await, Err(CloseReason::PolicyChanged));
    let denied = lives_after(|view| {
        view.insert_policy("shop/none".into(), policy("none").build());
    });
    assert_eq!(denied.await, Err(CloseReason::PolicyChanged));
    let removed = lives_after(|view| {
        view.remove_address("us");
    });
    assert_eq!(removed.await, Err(CloseReason::WorkloadGone));
}

#[tokio::test]
async fn only_the_kubelet_probes_a_strict_pod_in_plain() {
    let bench = Bench::new();
    let application = bench.rig.network.listen("10.0.0.2:8080").await;
    let strict = us().mode(Mode::Strict).probe_port(8080).epoch(2, 0).build();
    bench.rig.state.update(|view| {
        view.insert_workload(strict);
    });
    let mut probe = bench.client("10.0.0.9:40000", "10.0.0.2:8080").await;
    let (mut server, _) = application.accept().await.unwrap();
    probe.shutdown().await.unwrap();
    let mut nothing = String::new();
    server.read_to_string(&mut nothing).await.unwrap();
    server.write_all(b"ok").await.unwrap();
    drop(server);
    let mut answer = String::new();
    probe.read_to_string(&mut answer).await.unwrap();
    assert_eq!(answer, "ok");
    let record = bench.closed().await;
    let rule = Some("kubelet probe".to_owned());
    assert_eq!(record.verdict, Verdict::Allowed { rule });

    // The same address, another socket; and the kubelet, to a port that is not for probes.
    for (peer, to) in [
        ("10.0.0.9:40001", "10.0.0.2:8080"),
        ("10.0.0.9:40000", "10.0.0.2:8081"),
    ] {
        let mut client = bench.client(peer, to).await;
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap_err();
    }
    for record in &bench.rig.records.closed(3).await[1..] {
        assert!(
            matches!(record.verdict, Verdict::Dropped { reason, .. } if reason == DropReason::PlaintextStrict)
        );
    }
}
