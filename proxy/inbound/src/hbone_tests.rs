// SPDX-License-Identifier: Apache-2.0
//! A client with a certificate against the whole path, over loopback, with the addresses injected.

use super::*;
use podveil_flow::{CloseReason, ConnectionRecord, Verdict};
use podveil_hbone::{ConnectRequest, HboneStream, StreamError, Tunnel};
use podveil_model::Mode;
use podveil_net::{Counters, Ended, TcpEnd, relay};
use podveil_state::Limits;
use podveil_state::testing::{Rig, connection};
use podveil_testing::{WorkloadBuilder, policy, workload};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn us() -> WorkloadBuilder {
    workload("us").address("10.0.0.2").identity("shop", "us")
}

fn peer() -> WorkloadBuilder {
    workload("peer")
        .address("10.0.0.3")
        .identity("shop", "peer")
}

struct Bench {
    rig: Rig,
    inbound: Arc<Inbound>,
}

impl Bench {
    fn new() -> Self {
        let limits = Limits {
            hold_bound: Duration::from_millis(100),
            ..Limits::default()
        };
        let rig = Rig::new(&us().build(), limits);
        rig.state.update(|view| {
            view.insert_workload(peer().build());
            view.set_synced();
        });
        let inbound = Arc::new(Inbound::new(rig.pod.clone()));
        let watched = inbound.clone();
        tokio::spawn(async move {
            let (state, stop) = (watched.pod.state.clone(), watched.pod.stop.clone());
            watched.registry.watch(state, stop).await;
        });
        Self { rig, inbound }
    }

    /// A tunnel from `address` with a certificate for `identity`, as far as the client can tell.
    async fn tunnel(&self, address: &str, identity: &Workload) -> Tunnel {
        let (near, far) = connection().await;
        let peer = PeerAddr(address.parse().unwrap());
        let local = LocalAddr("10.0.0.2:15008".parse().unwrap());
        let accepted = Accepted::new(far, peer, local);
        let (_tunnel, held) = self.inbound.places(peer).unwrap();
        let inbound = self.inbound.clone();
        tokio::spawn(async move { inbound.serve(accepted, held).await });
        let svid = self.rig.authority.svid(&identity.identity);
        let configs = Configs::new(svid, self.rig.authority.bundle.clone());
        let expected = [self.rig.pod.identity.clone()];
        let client = configs.client(&expected);
        let (stream, _) = podveil_tls::connect(near, client).await.unwrap();
        let (tunnel, driver) = Tunnel::open(stream, &Settings::default()).await.unwrap();
        tokio::spawn(driver);
        tunnel
    }

    async fn closed(&self) -> ConnectionRecord {
        self.rig.records.closed(1).await.remove(0)
    }
}

async fn connect(tunnel: &Tunnel, authority: &str) -> Result<HboneStream, StreamError> {
    let request = ConnectRequest {
        authority: authority.parse().unwrap(),
        baggage: None,
        forwarded: None,
        traceparent: None,
    };
    let slot = tunnel.reserve().await.unwrap();
    tunnel
        .connect(slot, request)
        .await
        .map(|(stream, _)| stream)
}

fn status(refused: Result<HboneStream, StreamError>) -> u16 {
    match refused {
        Err(StreamError::Refused { status }) => status.as_u16(),
        other => panic!("not an answer: {other:?}"),
    }
}

#[tokio::test]
async fn an_address_that_keeps_tunnels_leaves_places_to_others() {
    let limits = Limits {
        max_tunnels: 8,
        ..Limits::default()
    };
    let rig = Rig::new(&us().build(), limits);
    let inbound = Inbound::new(rig.pod.clone());
    let place = |address: &str| {
        let peer = PeerAddr(address.parse().unwrap());
        // The handshake is over, the tunnel stays.
        inbound.places(peer).map(|(tunnel, _handshaking)| tunnel)
    };
    let kept: Vec<_> = (0..8).map_while(|_| place("10.0.0.3:40000").ok()).collect();
    assert_eq!(kept.len(), 4);
    let others: Vec<_> = (0..8).map_while(|_| place("10.0.0.4:40000").ok()).collect();
    assert_eq!(others.len(), 2);
    drop(kept);
    assert!(place("10.0.0.3:40000").is_ok());
}

/// A stream as a socket that a test can read and write.
async fn socket(stream: HboneStream) -> TcpStream {
    let (near, far) = connection().await;
    tokio::spawn(async move {
        let counters = Counters::default();
        let never = std::future::pending::<()>();
        let _: Ended<()> = relay(TcpEnd::new(far), stream, &counters, never).await;
    });
    near
}

#[tokio::test]
async fn bytes_flow_from_the_peers_own_address_and_the_record_says_who() {
    let bench = Bench::new();
    let application = bench.rig.network.listen("10.0.0.2:8080").await;
    let tunnel = bench.tunnel("10.0.0.3:40000", &peer().build()).await;
    let (stream, accepted) = tokio::join!(connect(&tunnel, "10.0.0.2:8080"), application.accept());
    let mut client = socket(stream.unwrap()).await;
    let (mut server, _) = accepted.unwrap();
    client.write_all(b"question").await.unwrap();
    client.shutdown().await.unwrap();
    let mut question = String::new();
    server.read_to_string(&mut question).await.unwrap();
    assert_eq!(question, "question");
    server.write_all(b"the answer").await.unwrap();
    drop(server);
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    assert_eq!(answer, "the answer");

    let dialled = [(
        Some("10.0.0.3".parse().unwrap()),
        "10.0.0.2:8080".parse().unwrap(),
    )];
    assert_eq!(bench.rig.network.dialled(), dialled);
    let record = bench.closed().await;
    assert_eq!(record.close, CloseReason::Clean);
    assert_eq!((record.received_bytes, record.sent_bytes), (8, 10));
    assert_eq!(
        record.source.identity,
        Some(peer().build().identity.clone())
    );
    assert_eq!(
        record.destination.identity,
        Some(us().build().identity.clone())
    );
    assert!(matches!(
        record.protection,
        Protection::MutualTls {
            key_exchange: "X25519MLKEM768",
            ..
        }
    ));
}

#[tokio::test]
async fn a_refused_connect_names_its_reason() {
    let bench = Bench::new();
    bench.rig.state.update(|view| {
        let deny = policy("no-admin").deny().port(9000).build();
        view.insert_policy("shop/no-admin".into(), deny);
    });
    let tunnel = bench.tunnel("10.0.0.3:40000", &peer().build()).await;
    for (number, (authority, told, reason)) in [
        ("10.0.0.9:80", 400, DropReason::BadTarget),
        ("127.0.0.1:80", 400, DropReason::BadTarget),
        ("10.0.0.2:15001", 400, DropReason::BadTarget),
        ("10.0.0.2:9000", 401, DropReason::PolicyDenied),
        ("10.0.0.2:80", 503, DropReason::ConnectFailed),
    ]
    .into_iter()
    .enumerate()
    {
        assert_eq!(
            status(connect(&tunnel, authority).await),
            told,
            "{authority}"
        );
        let record = bench.rig.records.closed(number + 1).await.remove(number);
        let Verdict::Dropped { reason: why, .. } = record.verdict else {
            panic!("{authority} was allowed");
        };
        assert_eq!(why, reason, "{authority}");
    }
}

#[tokio::test]
async fn another_pods_identity_is_refused() {
    for address in ["10.0.0.4:40000", "10.0.0.9:40000"] {
        let bench = Bench::new();
        bench.rig.state.update(|view| {
            let other = workload("other")
                .address("10.0.0.4")
                .identity("shop", "other");
            view.insert_workload(other.build());
        });
        let tunnel = bench.tunnel(address, &peer().build()).await;
        let lost = connect(&tunnel, "10.0.0.2:80").await.unwrap_err();
        assert!(lost.may_move(), "{lost:?}");
        let Verdict::Dropped { reason, .. } = bench.closed().await.verdict else {
            panic!("{address} was allowed");
        };
        assert_eq!(reason, DropReason::PeerAddressMismatch, "{address}");
        assert!(bench.rig.network.dialled().is_empty());
    }
}

#[tokio::test]
async fn a_peer_that_appears_within_the_hold_bound_is_let_in() {
    let bench = Bench::new();
    let _application = bench.rig.network.listen("10.0.0.5:80").await;
    let late = workload("late")
        .address("10.0.0.5")
        .identity("shop", "late");
    let late = late.build();
    let tunnel = bench.tunnel("10.0.0.5:40000", &late).await;
    bench.rig.state.update(|view| {
        view.insert_workload(late.clone());
    });
    assert_eq!(status(connect(&tunnel, "10.0.0.2:80").await), 503);
}

/// Opens a connection, changes the state, and gives the record of its end.
async fn ended_by(change: impl FnOnce(&mut podveil_state::View)) -> ConnectionRecord {
    let bench = Bench::new();
    let application = bench.rig.network.listen("10.0.0.2:8080").await;
    let tunnel = bench.tunnel("10.0.0.3:40000", &peer().build()).await;
    let (stream, accepted) = tokio::join!(connect(&tunnel, "10.0.0.2:8080"), application.accept());
    let mut client = socket(stream.unwrap()).await;
    let (mut server, _) = accepted.unwrap();
    client.write_all(b"x").await.unwrap();
    let mut byte = [0];
    server.read_exact(&mut byte).await.unwrap();
    bench.rig.state.update(change);
    // Both ends see a reset, never a clean end.
    assert!(server.read(&mut byte).await.is_err());
    assert!(client.read(&mut byte).await.is_err());
    bench.closed().await
}

#[tokio::test]
async fn a_policy_that_no_longer_allows_ends_the_connection() {
    let record = ended_by(|view| {
        view.insert_policy("shop/none".into(), policy("none").build());
    })
    .await;
    assert_eq!(record.close, CloseReason::PolicyChanged);
    assert!(matches!(
        record.verdict,
        Verdict::Dropped {
            reason: DropReason::PolicyDenied,
            ..
        }
    ));
}

#[tokio::test]
async fn a_removed_peer_ends_its_connections() {
    let record = ended_by(|view| {
        view.remove_address("peer");
    })
    .await;
    assert_eq!(record.close, CloseReason::WorkloadGone);
}

#[tokio::test]
async fn our_own_removal_ends_every_connection() {
    let record = ended_by(|view| {
        view.remove_address("us");
    })
    .await;
    assert_eq!(record.close, CloseReason::WorkloadGone);
}

#[tokio::test]
async fn strict_mode_and_unrelated_changes_leave_a_tunnel_alone() {
    let bench = Bench::new();
    let application = bench.rig.network.listen("10.0.0.2:8080").await;
    let tunnel = bench.tunnel("10.0.0.3:40000", &peer().build()).await;
    let (stream, accepted) = tokio::join!(connect(&tunnel, "10.0.0.2:8080"), application.accept());
    let mut client = socket(stream.unwrap()).await;
    let (mut server, _) = accepted.unwrap();
    bench.rig.state.update(|view| {
        view.insert_workload(us().mode(Mode::Strict).epoch(2, 0).build());
        view.insert_workload(workload("x").address("10.0.0.77").build());
    });
    client.write_all(b"x").await.unwrap();
    let mut byte = [0];
    server.read_exact(&mut byte).await.unwrap();
    assert_eq!(&byte, b"x");
}

#[tokio::test]
async fn a_renewed_certificate_asks_clients_for_a_new_tunnel() {
    let bench = Bench::new();
    let application = bench.rig.network.listen("10.0.0.2:8080").await;
    let tunnel = bench.tunnel("10.0.0.3:40000", &peer().build()).await;
    let (stream, accepted) = tokio::join!(connect(&tunnel, "10.0.0.2:8080"), application.accept());
    let mut client = socket(stream.unwrap()).await;
    let (mut server, _) = accepted.unwrap();
    let renewed = bench.rig.authority.svid(&bench.rig.pod.identity);
    bench.rig.svid.send_replace(Some(renewed));
    while !tunnel.is_closing() {
        tokio::task::yield_now().await;
    }
    // What runs on it goes on.
    client.write_all(b"x").await.unwrap();
    let mut byte = [0];
    server.read_exact(&mut byte).await.unwrap();
    drop((client, server));
    tunnel.ended().await;
}
