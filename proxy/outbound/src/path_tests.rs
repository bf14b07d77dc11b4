// SPDX-License-Identifier: Apache-2.0
//! Captured connections over loopback against a scripted far proxy, with the addresses injected.

use super::*;
use h2::Reason;
use http::StatusCode;
use podveil_flow::{DropReason, Protection};
use podveil_hbone::{Authority, Incoming, Server, Settings};
use podveil_model::{Mode, Stage};
use podveil_state::Limits;
use podveil_state::testing::{Loopback, Rig, connection};
use podveil_state::{Dial, Dialing};
use podveil_testing::{WorkloadBuilder, mesh, service, workload};
use podveil_tls::Configs;
use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Notify;

fn us() -> WorkloadBuilder {
    workload("us").address("10.0.0.1").identity("shop", "us")
}

fn web() -> WorkloadBuilder {
    workload("web").address("10.0.0.2").identity("shop", "web")
}

/// What the far proxy does with a CONNECT.
#[derive(Clone, Copy, Debug)]
enum Answer {
    /// Sends back what it gets, then ends.
    Echo,
    Refuse(u16),
    Reset(Reason),
}

struct FarProxy {
    tunnels: Arc<AtomicUsize>,
    authorities: Arc<Mutex<Vec<Authority>>>,
}

struct Bench {
    rig: Rig,
    outbound: Arc<Outbound>,
}

impl Bench {
    fn new(hold_bound: Duration) -> Self {
        let limits = Limits {
            hold_bound,
            ..Limits::default()
        };
        let rig = Rig::new(&us().build(), limits);
        rig.state.update(|view| {
            view.insert_mesh(Arc::new(mesh()));
            view.set_synced();
        });
        let tunnels = TaskTracker::new();
        let outbound = Arc::new(Outbound::new(rig.pod.clone(), &tunnels));
        tokio::spawn(outbound.clone().maintain(CancellationToken::new()));
        Self { rig, outbound }
    }

    /// A proxy at `address` that proves `identity` and gives these answers in turn, the last one for ever.
    async fn far_proxy(
        &self,
        address: &str,
        identity: &WorkloadBuilder,
        answers: &[Answer],
    ) -> FarProxy {
        let listener = self.rig.network.listen(address).await;
        let svid = self.rig.authority.svid(&identity.clone().build().identity);
        let configs = Configs::new(svid, self.rig.authority.bundle.clone());
        let answers = Arc::new(Mutex::new(VecDeque::from(answers.to_vec())));
        let far = FarProxy {
            tunnels: Arc::default(),
            authorities: Arc::default(),
        };
        let (tunnels, authorities) = (far.tunnels.clone(), far.authorities.clone());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let server = configs.server();
                let (tunnels, authorities) = (tunnels.clone(), authorities.clone());
                let answers = answers.clone();
                tokio::spawn(async move {
                    let Ok((stream, _)) = podveil_tls::accept(stream, server).await else {
                        return;
                    };
                    tunnels.fetch_add(1, Ordering::Relaxed);
                    let settings = Settings::default();
                    let mut server = Server::handshake(stream, &settings).await.unwrap();
                    while let Ok(incoming) = server.accept().await {
                        authorities
                            .lock()
                            .unwrap()
                            .push(incoming.authority().unwrap());
                        let answer = {
                            let mut answers = answers.lock().unwrap();
                            let next = answers.front().copied().unwrap();
                            if answers.len() > 1 {
                                answers.pop_front();
                            }
                            next
                        };
                        give(incoming, answer);
                    }
                });
            }
        });
        far
    }

    /// A captured connection, as its application sees it.
    async fn dial(&self, original: &str) -> TcpStream {
        self.dial_from("10.0.0.1:40000", original).await
    }

    async fn dial_from(&self, peer: &str, original: &str) -> TcpStream {
        let (near, far) = connection().await;
        let accepted = Accepted::new(
            far,
            PeerAddr(peer.parse().unwrap()),
            OriginalDst(original.parse().unwrap()),
        );
        let held = self.outbound.held.clone().try_acquire_owned().unwrap();
        let outbound = self.outbound.clone();
        tokio::spawn(async move { outbound.carry(accepted, held).await });
        near
    }

    async fn closed(&self) -> ConnectionRecord {
        self.rig.records.closed(1).await.remove(0)
    }

    async fn reason(&self) -> DropReason {
        match self.closed().await.verdict {
            Verdict::Dropped { reason, .. } => reason,
            Verdict::Allowed { .. } => panic!("it was allowed"),
        }
    }

    fn insert(&self, workload: WorkloadBuilder) {
        self.rig.state.update(|view| {
            view.insert_workload(workload.build());
        });
    }
}

fn give(incoming: Incoming, answer: Answer) {
    match answer {
        Answer::Refuse(status) => incoming.refuse(StatusCode::from_u16(status).unwrap()),
        Answer::Reset(reason) => incoming.reset(reason),
        Answer::Echo => {
            tokio::spawn(async move {
                let stream = incoming.accept(None).unwrap();
                let (echo, far) = connection().await;
                let (mut read, mut write) = echo.into_split();
                let counters = Counters::default();
                let never = std::future::pending::<()>();
                let relayed = relay(TcpEnd::new(far), stream, &counters, never);
                tokio::join!(relayed, async {
                    let _reset = tokio::io::copy(&mut read, &mut write).await;
                    let _reset = write.shutdown().await;
                })
            });
        }
    }
}

const SHORT: Duration = Duration::from_millis(100);
const LONG: Duration = Duration::from_secs(30);

async fn echoed(client: &mut TcpStream) -> String {
    client.write_all(b"hello").await.unwrap();
    client.shutdown().await.unwrap();
    let mut text = String::new();
    client.read_to_string(&mut text).await.unwrap();
    text
}

#[tokio::test]
async fn an_enrolled_destination_is_reached_through_one_tunnel() {
    let bench = Bench::new(LONG);
    bench.insert(web());
    let far = bench
        .far_proxy("10.0.0.2:15008", &web(), &[Answer::Echo])
        .await;
    for _ in 0..3 {
        let mut client = bench.dial("10.0.0.2:80").await;
        assert_eq!(echoed(&mut client).await, "hello");
    }
    assert_eq!(far.tunnels.load(Ordering::Relaxed), 1);
    let record = bench.rig.records.closed(3).await.remove(2);
    assert_eq!(record.close, CloseReason::Clean);
    assert_eq!((record.received_bytes, record.sent_bytes), (5, 5));
    assert_eq!(
        record.destination.identity,
        Some(web().build().identity.clone())
    );
    assert!(matches!(record.protection, Protection::MutualTls { .. }));
    assert_eq!(
        far.authorities.lock().unwrap()[0].to_string(),
        "10.0.0.2:80"
    );
}

#[tokio::test]
async fn plain_goes_where_it_was_dialled() {
    let bench = Bench::new(LONG);
    bench.insert(web().stage(Stage::None));
    for address in ["10.0.0.2:80", "1.1.1.1:80"] {
        let listener = bench.rig.network.listen(address).await;
        let mut client = bench.dial(address).await;
        let (mut server, _) = listener.accept().await.unwrap();
        server.write_all(b"plain").await.unwrap();
        drop(server);
        let mut text = String::new();
        client.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "plain");
    }
}

/// Refuses plain connections when it is let.
#[derive(Debug)]
struct Gate {
    network: Arc<Loopback>,
    dialled: Notify,
    let_go: Notify,
}

impl Dial for Gate {
    fn dial(&self, from: Option<IpAddr>, to: SocketAddr, within: Duration) -> Dialing<'_> {
        Box::pin(async move {
            if to.port() == 80 {
                self.dialled.notify_one();
                self.let_go.notified().await;
            }
            self.network.dial(from, to, within).await
        })
    }
}

#[tokio::test]
async fn a_destination_enrolled_while_it_was_dialled_is_reached_through_a_tunnel() {
    let Bench { rig, .. } = Bench::new(LONG);
    let gate = Arc::new(Gate {
        network: rig.network.clone(),
        dialled: Notify::new(),
        let_go: Notify::new(),
    });
    let pod = PodContext {
        sockets: gate.clone(),
        ..PodContext::clone(&rig.pod)
    };
    let outbound = Arc::new(Outbound::new(Arc::new(pod), &TaskTracker::new()));
    let bench = Bench { rig, outbound };
    let far = bench
        .far_proxy("10.0.0.2:15008", &web(), &[Answer::Echo])
        .await;
    bench.insert(web().stage(Stage::None));
    let mut client = bench.dial("10.0.0.2:80").await;
    gate.dialled.notified().await;
    bench.insert(web());
    gate.let_go.notify_one();
    assert_eq!(echoed(&mut client).await, "hello");
    assert_eq!(far.tunnels.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn an_unknown_destination_is_held_and_flows_when_it_is_known() {
    let bench = Bench::new(LONG);
    let _far = bench
        .far_proxy("10.0.0.2:15008", &web(), &[Answer::Echo])
        .await;
    let mut client = bench.dial("10.0.0.2:80").await;
    client.write_all(b"first bytes ").await.unwrap();
    bench.insert(web());
    client.write_all(b"and more").await.unwrap();
    client.shutdown().await.unwrap();
    let mut text = String::new();
    client.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "first bytes and more");
}

#[tokio::test]
async fn a_refused_connection_is_reset_and_names_its_reason() {
    for (peer, original, reason) in [
        ("10.0.0.1:40000", "10.0.0.99:80", DropReason::NotKnown),
        ("10.0.0.5:40000", "10.0.0.2:80", DropReason::SourceNotOwn),
        ("10.0.0.1:40000", "127.0.0.1:80", DropReason::BadTarget),
        ("10.0.0.1:40000", "10.0.0.2:15008", DropReason::BadTarget),
        // Nobody listens on 15008 there.
        ("10.0.0.1:40000", "10.0.0.2:80", DropReason::TunnelFailed),
        ("10.0.0.1:40000", "1.1.1.1:80", DropReason::ConnectFailed),
    ] {
        let bench = Bench::new(SHORT);
        bench.insert(web());
        let mut client = bench.dial_from(peer, original).await;
        let reset = client.read(&mut [0]).await;
        assert!(reset.is_err(), "{peer} to {original}: a clean end");
        assert_eq!(bench.reason().await, reason, "{peer} to {original}");
    }
}

#[tokio::test]
async fn a_server_with_another_identity_is_refused() {
    let bench = Bench::new(SHORT);
    bench.insert(web());
    let imposter = web().identity("shop", "imposter");
    let far = bench
        .far_proxy("10.0.0.2:15008", &imposter, &[Answer::Echo])
        .await;
    let mut client = bench.dial("10.0.0.2:80").await;
    assert!(client.read(&mut [0]).await.is_err());
    assert_eq!(bench.reason().await, DropReason::PeerIdentity);
    assert_eq!(far.tunnels.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn without_a_certificate_an_announced_workload_is_held_then_refused() {
    let bench = Bench::new(SHORT);
    bench.insert(web());
    bench.rig.svid.send_replace(None);
    let mut client = bench.dial("10.0.0.2:80").await;
    assert!(client.read(&mut [0]).await.is_err());
    assert_eq!(bench.reason().await, DropReason::CertificateMissing);
    assert!(bench.rig.network.dialled().is_empty(), "nothing went out");
}

#[tokio::test]
async fn strict_mode_refuses_plain_inside_the_cluster() {
    let bench = Bench::new(SHORT);
    bench.insert(us().mode(Mode::Strict).epoch(2, 0));
    bench.insert(web().stage(Stage::None));
    let mut client = bench.dial("10.0.0.2:80").await;
    assert!(client.read(&mut [0]).await.is_err());
    assert_eq!(bench.reason().await, DropReason::PlaintextStrict);
}

#[tokio::test]
async fn a_stream_that_was_not_taken_moves() {
    let bench = Bench::new(LONG);
    bench.insert(web());
    let answers = [Answer::Reset(Reason::REFUSED_STREAM), Answer::Echo];
    let far = bench.far_proxy("10.0.0.2:15008", &web(), &answers).await;
    let mut client = bench.dial("10.0.0.2:80").await;
    assert_eq!(echoed(&mut client).await, "hello");
    assert_eq!(far.authorities.lock().unwrap().len(), 2);
}

#[tokio::test]
async fn policy_of_the_far_side_is_an_answer() {
    let bench = Bench::new(LONG);
    bench.insert(web());
    let far = bench
        .far_proxy("10.0.0.2:15008", &web(), &[Answer::Refuse(401)])
        .await;
    let mut client = bench.dial("10.0.0.2:80").await;
    assert!(client.read(&mut [0]).await.is_err());
    assert_eq!(bench.reason().await, DropReason::UpstreamRefused);
    assert_eq!(far.authorities.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn another_endpoint_takes_what_the_first_cannot() {
    let bench = Bench::new(LONG);
    let front = service("front")
        .address("10.96.0.80")
        .port(80, 8080)
        .build();
    let other = workload("other")
        .address("10.0.0.3")
        .identity("shop", "web");
    bench.insert(web().behind(&front, &[]));
    bench.insert(other.clone().behind(&front, &[]));
    bench
        .rig
        .state
        .update(|view| view.insert_service(front.clone()));
    // One answers 503, at the other nobody has even the port open; and one that works.
    let third = workload("third")
        .address("10.0.0.4")
        .identity("shop", "web");
    bench.insert(third.clone().behind(&front, &[]));
    let busy = bench
        .far_proxy("10.0.0.2:15008", &web(), &[Answer::Refuse(503)])
        .await;
    let works = bench
        .far_proxy("10.0.0.4:15008", &third, &[Answer::Echo])
        .await;
    for _ in 0..20 {
        let mut client = bench.dial("10.96.0.80:80").await;
        assert_eq!(echoed(&mut client).await, "hello");
    }
    assert_eq!(works.authorities.lock().unwrap().len(), 20);
    assert!(busy.authorities.lock().unwrap().len() < 20);
}

#[tokio::test]
async fn a_renewed_certificate_gets_no_new_stream_on_the_old_tunnel() {
    let bench = Bench::new(LONG);
    bench.insert(web());
    let far = bench
        .far_proxy("10.0.0.2:15008", &web(), &[Answer::Echo])
        .await;
    let mut old = bench.dial("10.0.0.2:80").await;
    old.write_all(b"x").await.unwrap();
    old.read_exact(&mut [0]).await.unwrap();
    let renewed = bench.rig.authority.svid(&bench.rig.pod.identity);
    bench.rig.svid.send_replace(Some(renewed));
    let mut new = bench.dial("10.0.0.2:80").await;
    assert_eq!(echoed(&mut new).await, "hello");
    assert_eq!(far.tunnels.load(Ordering::Relaxed), 2);
    // What runs on the old one goes on.
    assert_eq!(echoed(&mut old).await, "hello");
}

#[tokio::test]
async fn a_removed_destination_ends_its_connections() {
    let bench = Bench::new(LONG);
    bench.insert(web());
    let _far = bench
        .far_proxy("10.0.0.2:15008", &web(), &[Answer::Echo])
        .await;
    let mut client = bench.dial("10.0.0.2:80").await;
    client.write_all(b"x").await.unwrap();
    client.read_exact(&mut [0]).await.unwrap();
    bench.rig.state.update(|view| {
        view.remove_address("web");
    });
    assert!(client.read(&mut [0]).await.is_err(), "a clean end");
    assert_eq!(bench.closed().await.close, CloseReason::WorkloadGone);
}

#[tokio::test]
async fn a_stop_resets_everything() {
    let bench = Bench::new(LONG);
    bench.insert(web());
    let _far = bench
        .far_proxy("10.0.0.2:15008", &web(), &[Answer::Echo])
        .await;
    let mut living = bench.dial("10.0.0.2:80").await;
    living.write_all(b"x").await.unwrap();
    living.read_exact(&mut [0]).await.unwrap();
    let mut held = bench.dial("10.0.0.99:80").await;
    bench.rig.pod.stop.cancel();
    assert!(living.read(&mut [0]).await.is_err());
    assert!(held.read(&mut [0]).await.is_err());
}

#[tokio::test]
async fn an_application_that_gives_up_is_not_held_any_longer() {
    let bench = Bench::new(LONG);
    let client = bench.dial("10.0.0.99:80").await;
    client.set_zero_linger().unwrap();
    drop(client);
    assert_eq!(bench.closed().await.close, CloseReason::Abandoned);
}

#[tokio::test]
async fn a_connection_that_nobody_redirected_is_reset() {
    let bench = Bench::new(LONG);
    // On the real port, by which a socket that was given to the listener is told from one that dialled it.
    let address: SocketAddr = "127.77.1.1:15001".parse().unwrap();
    let listener = TcpListener::bind(address).await.unwrap();
    let running = tokio::spawn(Outbound::run(bench.rig.pod.clone(), vec![listener]));
    let mut client = TcpStream::connect(address).await.unwrap();
    assert!(client.read(&mut [0]).await.is_err(), "a clean end");
    assert_eq!(bench.reason().await, DropReason::NoOriginalDestination);
    bench.rig.pod.drain.cancel();
    running.await.unwrap();
    assert!(TcpStream::connect(address).await.is_err());
}

#[tokio::test]
async fn a_drain_lets_connections_end() {
    let bench = Bench::new(LONG);
    bench.insert(web());
    let _far = bench
        .far_proxy("10.0.0.2:15008", &web(), &[Answer::Echo])
        .await;
    let mut client = bench.dial("10.0.0.2:80").await;
    client.write_all(b"x").await.unwrap();
    client.read_exact(&mut [0]).await.unwrap();
    bench.rig.pod.drain.cancel();
    assert_eq!(echoed(&mut client).await, "hello");
    assert_eq!(bench.closed().await.close, CloseReason::Clean);
}
