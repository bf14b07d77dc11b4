// SPDX-License-Identifier: Apache-2.0
//! The proxy in process, between a scripted control plane and a scripted agent, as far as loopback and no privileges
//! allow: no capture, so no connection with an original destination. What needs those is in `interop-tests`.

mod control_plane;
mod node;

use control_plane::{ControlPlane, trust_domain};
use node::{Agent, Answer, Folder, Held};
use podveil_identity::WorkloadIdentity;
use podveil_model::Stage;
use podveil_node::proxy::{Bound, Ended, Proxy};
use podveil_proto::podveil::node::v1::{NodeReport, WorkloadCondition, WorkloadReport};
use podveil_testing::{mesh, workload};
use podveil_xds_server::Snapshot;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Addresses of loopback stand for those of pods: the proxy never dials them, but takes connections between them.
const POD: &str = "127.0.0.1";
const PEER: &str = "127.0.0.2";

struct Fixture {
    control_plane: ControlPlane,
    agent: Agent,
    held: Answer,
    endpoints: Bound,
    stop: CancellationToken,
    running: JoinHandle<Ended>,
    _folder: Folder,
}

impl Fixture {
    /// The proxy, connected to everything; workload `a` (shop/web) is wanted on this node.
    async fn start() -> Self {
        let control_plane = ControlPlane::start().await;
        control_plane.publisher.publish(snapshot(Stage::Wanted));
        let folder = Folder::new();
        let held: Answer = Arc::new(Mutex::new(Ok(Held::new())));
        node::holder(&folder, held.clone());
        let agent = Agent::listen(&folder);
        let stop = CancellationToken::new();
        let proxy = Proxy::start(
            folder.config(),
            control_plane.links(),
            stop.clone(),
            CancellationToken::new(),
        )
        .await
        .unwrap();
        let endpoints = proxy.endpoints();
        let running = tokio::spawn(proxy.run());
        Self {
            agent: Agent::accept(agent).await,
            control_plane,
            held,
            endpoints,
            stop,
            running,
            _folder: folder,
        }
    }

    fn listeners(&self) -> Arc<Held> {
        self.held.lock().unwrap().clone().unwrap()
    }

    async fn pod_is(&self, condition: WorkloadCondition) -> (NodeReport, WorkloadReport) {
        let found = |report: &NodeReport| {
            let pod = report.workloads.iter().find(|pod| pod.uid == "a").cloned();
            pod.filter(|pod| pod.condition() == condition)
        };
        let report = self
            .control_plane
            .report(|report| found(report).is_some())
            .await;
        let pod = found(&report).unwrap();
        (report, pod)
    }

    /// Ends the proxy as SIGTERM does.
    async fn stop(self) {
        self.stop.cancel();
        let ended = tokio::time::timeout(Duration::from_secs(10), self.running);
        let ended = ended.await.expect("the proxy ends").unwrap();
        assert_eq!(ended, Ended::Stopped);
    }
}

fn snapshot(stage: Stage) -> Snapshot {
    let a = workload("a").address(POD).stage(stage);
    let peer = workload("peer").address(PEER).identity("shop", "client");
    Snapshot {
        workloads: vec![a.epoch(1, stage as u32).build(), peer.node("n2").build()],
        mesh: Some(Arc::new(mesh())),
        ..Snapshot::default()
    }
}

fn identity(service_account: &str) -> WorkloadIdentity {
    WorkloadIdentity::new(trust_domain(), "shop", service_account).unwrap()
}

async fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}

/// A connection from the peer's address.
async fn connect(address: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket
        .bind(SocketAddr::new(PEER.parse().unwrap(), 0))
        .unwrap();
    socket.connect(address).await.unwrap()
}

/// Waits until the page holds a text.
async fn wait_for(address: SocketAddr, path: &str, wanted: &str) {
    let look = async {
        while !get(address, path).await.contains(wanted) {
            tokio::task::yield_now().await;
        }
    };
    if tokio::time::timeout(Duration::from_secs(10), look)
        .await
        .is_err()
    {
        panic!("{wanted} is not in {}", get(address, path).await);
    }
}

#[tokio::test]
async fn a_pod_is_ready_when_it_is_served_and_has_its_certificate() {
    let fixture = Fixture::start().await;
    let (_, awaited) = fixture.pod_is(WorkloadCondition::Pending).await;
    assert_eq!(
        awaited.reason,
        "it has not been handed over to the proxy yet"
    );
    assert_eq!(fixture.agent.add("a").await, "");
    let (report, _) = fixture.pod_is(WorkloadCondition::Ready).await;
    assert_eq!(report.node, "n1");
    assert_eq!(report.bundle_sequence, 3);
    assert_eq!(report.certificate_generation, 1);

    let newest = fixture
        .control_plane
        .publisher
        .publish(snapshot(Stage::Announced));
    let newest = format!("7-{newest}");
    fixture
        .control_plane
        .report(|report| report.applied_version == newest)
        .await;

    let readiness = fixture.endpoints.readiness.unwrap();
    wait_for(
        readiness,
        "/healthz/ready",
        "the ZDS agent has not told all its pods yet",
    )
    .await;
    assert_eq!(fixture.agent.snapshot_sent().await, "");
    wait_for(readiness, "/healthz/ready", "HTTP/1.1 200").await;
    fixture.stop().await;
}

#[tokio::test]
async fn peers_meet_the_pods_own_identity_until_it_is_gone() {
    let fixture = Fixture::start().await;
    assert_eq!(fixture.agent.add("a").await, "");
    fixture.pod_is(WorkloadCondition::Ready).await;
    let client = fixture.control_plane.workload(&identity("client"));
    let address = fixture.listeners().hbone();
    let stream = connect(address).await;
    let web = [identity("web")];
    let (mut tls, peer) = podveil_tls::connect(stream, client.client(&web))
        .await
        .unwrap();
    assert_eq!(peer.identity, identity("web"));
    assert_eq!(peer.key_exchange, "X25519MLKEM768");

    let stream = connect(address).await;
    let other = [identity("other")];
    assert!(
        podveil_tls::connect(stream, client.client(&other))
            .await
            .is_err()
    );

    assert_eq!(fixture.agent.delete("a").await, "");
    let mut rest = Vec::new();
    let ended = tokio::time::timeout(Duration::from_secs(10), tls.read_to_end(&mut rest));
    let _reset_or_closed = ended.await.expect("the tunnel ends with its pod");
    fixture.pod_is(WorkloadCondition::Pending).await;
    fixture.stop().await;
}

#[tokio::test]
#[ignore = "netns"]
async fn a_replaced_pod_of_the_same_uid_is_served_anew() {
    let fixture = Fixture::start().await;
    assert_eq!(fixture.agent.add("a").await, "");
    fixture.pod_is(WorkloadCondition::Ready).await;
    let client = fixture.control_plane.workload(&identity("client"));
    let web = [identity("web")];
    let address = fixture.listeners().hbone();
    let (mut former, _) = podveil_tls::connect(connect(address).await, client.client(&web))
        .await
        .unwrap();

    assert_eq!(fixture.agent.add_in("a", &node::new_netns()).await, "");
    let mut rest = Vec::new();
    let ended = tokio::time::timeout(Duration::from_secs(10), former.read_to_end(&mut rest));
    let _reset_or_closed = ended.await.expect("the tunnel ends with its pod");
    podveil_tls::connect(connect(address).await, client.client(&web))
        .await
        .unwrap();
    let started = "workload_manager_proxies_started_total 2";
    wait_for(fixture.endpoints.metrics, "/metrics", started).await;
    fixture.stop().await;
}

#[tokio::test]
async fn a_connection_that_was_not_captured_is_refused_and_counted() {
    let fixture = Fixture::start().await;
    assert_eq!(fixture.agent.add("a").await, "");
    let mut stream = TcpStream::connect(fixture.listeners().plain())
        .await
        .unwrap();
    let error = stream.read_u8().await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    wait_for(
        fixture.endpoints.metrics,
        "/metrics",
        "podveil_connections_refused_total{reason=\"no_original_destination\",reporter=\"destination\"} 1",
    )
    .await;
    fixture.stop().await;
}

#[tokio::test]
async fn a_pod_without_listeners_is_pending_and_its_agent_is_told() {
    let fixture = Fixture::start().await;
    let listeners = std::mem::replace(
        &mut *fixture.held.lock().unwrap(),
        Err("not held".to_owned()),
    );
    let reason = "no listeners: the holder's listeners were not had: the holder refused: not held";
    assert_eq!(fixture.agent.add("a").await, reason);
    let (_, pod) = fixture.pod_is(WorkloadCondition::Pending).await;
    assert!(
        pod.reason.starts_with("no listeners") || pod.reason.starts_with("it has not"),
        "{}",
        pod.reason
    );
    wait_for(
        fixture.endpoints.readiness.unwrap(),
        "/healthz/ready",
        "1 pods have no listeners yet",
    )
    .await;

    *fixture.held.lock().unwrap() = listeners;
    assert_eq!(fixture.agent.add("a").await, "");
    fixture.pod_is(WorkloadCondition::Ready).await;
    fixture.stop().await;
}

#[tokio::test]
async fn a_restarted_holders_listeners_are_taken() {
    let fixture = Fixture::start().await;
    assert_eq!(fixture.agent.add("a").await, "");
    fixture.pod_is(WorkloadCondition::Ready).await;
    let client = fixture.control_plane.workload(&identity("client"));
    let web = [identity("web")];
    let before = fixture.listeners();
    let after = Held::new();
    *fixture.held.lock().unwrap() = Ok(after.clone());
    assert_eq!(fixture.agent.add("a").await, "");
    let stream = connect(after.hbone()).await;
    podveil_tls::connect(stream, client.client(&web))
        .await
        .unwrap();
    drop(before);
    fixture.stop().await;
}

#[tokio::test]
async fn the_dump_tells_what_is_known_and_no_key() {
    let fixture = Fixture::start().await;
    assert_eq!(fixture.agent.add("a").await, "");
    fixture.pod_is(WorkloadCondition::Ready).await;
    let answer = get(fixture.endpoints.admin, "/config_dump").await;
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(!body.contains("PRIVATE"), "{body}");
    let dump: serde_json::Value = serde_json::from_str(body).unwrap();
    assert_eq!(dump["workloads"][0]["uid"], "a");
    assert_eq!(dump["workloads"][0]["podveil"]["stage"], "wanted");
    assert_eq!(dump["workloadState"]["a"]["state"], "Up");
    assert_eq!(
        dump["certificates"][0]["identity"],
        "spiffe://cluster.local/ns/shop/sa/web"
    );
    assert_eq!(dump["certificates"][0]["state"], "Available");
    assert_eq!(dump["config"]["node"], "n1");
    fixture.stop().await;
}

#[tokio::test]
async fn the_listeners_outlive_the_proxy() {
    let fixture = Fixture::start().await;
    assert_eq!(fixture.agent.add("a").await, "");
    fixture.pod_is(WorkloadCondition::Ready).await;
    let held = fixture.listeners();
    fixture.stop().await;
    // It waits in the backlog for the next proxy.
    TcpStream::connect(held.plain()).await.unwrap();
}
