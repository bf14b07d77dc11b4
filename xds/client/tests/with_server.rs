// SPDX-License-Identifier: Apache-2.0
//! The client against the real server, over a loopback connection.

use podveil_identity::TrustDomain;
use podveil_model::{
    Balancing, Epoch, External, Health, Locality, Lookup, MeshConfig, Mode, Scope as Share,
    Service, ServiceKey, ServicePort, Stage, Workload,
};
use podveil_policy::{
    Action, Match, Policy, PolicyKey, Rule, Scope, ServiceAccountMatch, StringMatch,
};
use podveil_xds_client::{Batch, Client, Config, NodeInfo, ResourceType, Update};
use podveil_xds_server::{Caller, DiscoveryService, Publisher, Snapshot};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint, Server};

/// Long enough for a loaded machine; no test waits for it to pass.
const DEADLINE: Duration = Duration::from_secs(30);

fn full_workload() -> Workload {
    let service = ServiceKey {
        namespace: "shop".parse().unwrap(),
        hostname: "web.shop.svc.cluster.local".into(),
    };
    Workload {
        uid: "uid-1".into(),
        name: "web-1".into(),
        identity: "spiffe://td.example/ns/shop/sa/web".parse().unwrap(),
        addresses: vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
        node: "n1".parse().unwrap(),
        health: Health::Terminating,
        host_network: false,
        stage: Stage::Mandatory,
        epoch: Epoch {
            resource_version: 12,
            stage: 3,
        },
        mode: Mode::Strict,
        workload_name: "web".into(),
        canonical_name: "web".into(),
        canonical_revision: "v1".into(),
        cluster: "c1".into(),
        services: Arc::new([(service, [(80, 8080), (81, 0)].into())].into()),
        policies: ["shop/p".into()].into(),
        exclude_outbound_ports: [25].into(),
        exclude_inbound_ports: [9999].into(),
        plain_inbound_ports: [9090].into(),
        probe_ports: [8081].into(),
        node_uid: Some("0123456789abcdef0123456789abcdef".into()),
        host_ports: [(443, 8443)].into(),
        locality: Locality {
            region: "r1".into(),
            zone: "z1".into(),
            subzone: "s1".into(),
        },
        external: External::Refuse,
        capacity: 5,
    }
}

fn full_service() -> Service {
    Service {
        key: ServiceKey {
            namespace: "shop".parse().unwrap(),
            hostname: "web.shop.svc.cluster.local".into(),
        },
        name: "web".into(),
        addresses: vec![
            "10.96.0.80".parse().unwrap(),
            "fd00:10:96::80".parse().unwrap(),
        ],
        ports: vec![ServicePort {
            port: 80,
            target: 8080,
        }],
        publish_not_ready: true,
        balancing: Balancing {
            prefer: vec![
                Share::Network,
                Share::Cluster,
                Share::Region,
                Share::Zone,
                Share::Subzone,
                Share::Node,
            ],
            only_preferred: true,
            affinity: Some(Duration::from_secs(10_800)),
        },
        node_ports: [(30080, 80)].into(),
    }
}

fn full_policy() -> Policy {
    let strings = vec![
        StringMatch::Exact("a".into()),
        StringMatch::Prefix("b".into()),
        StringMatch::Suffix("c".into()),
        StringMatch::Presence,
    ];
    let accounts = vec![ServiceAccountMatch {
        namespace: "shop".into(),
        service_account: "web".into(),
    }];
    let ranges = vec!["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()];
    Policy {
        key: PolicyKey {
            namespace: Some("shop".parse().unwrap()),
            name: "p".into(),
        },
        scope: Scope::WorkloadSelector,
        action: Action::Deny,
        rules: vec![Rule {
            clauses: vec![
                vec![Match {
                    namespaces: strings.clone(),
                    not_namespaces: strings.clone(),
                    principals: strings.clone(),
                    not_principals: strings,
                    service_accounts: accounts.clone(),
                    not_service_accounts: accounts,
                    source_ips: ranges.clone(),
                    not_source_ips: ranges.clone(),
                    destination_ips: ranges.clone(),
                    not_destination_ips: ranges,
                    destination_ports: vec![80],
                    not_destination_ports: vec![81],
                }],
                Vec::new(),
            ],
        }],
        dry_run: true,
    }
}

fn full_mesh() -> MeshConfig {
    MeshConfig {
        trust_domain: TrustDomain::new("td.example").unwrap(),
        pod_ranges: vec!["10.0.0.0/8".parse().unwrap()],
        service_ranges: vec!["10.96.0.0/16".parse().unwrap()],
        ranges_known: true,
        outlying: Some(["198.51.100.7".parse().unwrap()].into()),
        plain_outbound_ranges: vec!["10.96.0.10/32".parse().unwrap()],
        plain_outbound_namespaces: ["kube-system".parse().unwrap()].into(),
        nodes: [(
            "n1".parse().unwrap(),
            vec!["172.18.0.2".parse().unwrap(), "fc00::2".parse().unwrap()],
        )]
        .into(),
        not_enrolled: ["plain".parse().unwrap()].into(),
        epoch: Epoch {
            resource_version: 1,
            stage: 0,
        },
    }
}

fn full_snapshot() -> Snapshot {
    Snapshot {
        workloads: vec![Arc::new(full_workload())],
        services: vec![Arc::new(full_service())],
        policies: vec![Arc::new(full_policy())],
        mesh: Some(Arc::new(full_mesh())),
    }
}

/// A server that can be stopped and started again at its address.
struct TestServer {
    address: SocketAddr,
    /// How many streams were let in.
    streams: watch::Receiver<usize>,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl TestServer {
    async fn start(address: Option<SocketAddr>, publisher: &Publisher) -> Self {
        let listener = TcpListener::bind(address.unwrap_or("127.0.0.1:0".parse().unwrap()))
            .await
            .unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let (streams_in, streams) = watch::channel(0);
        let service = DiscoveryService::new(
            publisher.clone(),
            move |_| {
                streams_in.send_modify(|streams| *streams += 1);
                Ok(Caller("test".into()))
            },
            stop.clone(),
        );
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            Server::builder()
                .add_service(service)
                .serve_with_incoming_shutdown(
                    TcpListenerStream::new(listener),
                    stopped.cancelled_owned(),
                )
                .await
                .unwrap();
        });
        Self {
            address,
            streams,
            stop,
            task,
        }
    }

    /// Also proves that no stream's task keeps the server up.
    async fn stop(self) {
        self.stop.cancel();
        tokio::time::timeout(DEADLINE, self.task)
            .await
            .unwrap()
            .unwrap();
    }

    fn channel(&self) -> Channel {
        Endpoint::from_shared(format!("http://{}", self.address))
            .unwrap()
            .connect_lazy()
    }
}

struct TestClient {
    client: Client,
    _stop: tokio_util::sync::DropGuard,
}

impl TestClient {
    fn start(server: &TestServer, change: impl FnOnce(&mut Config)) -> Self {
        let mut config = Config::new(NodeInfo {
            node: "n1".into(),
            ..Default::default()
        });
        change(&mut config);
        let stop = CancellationToken::new();
        Self {
            client: Client::start(server.channel(), config, stop.clone()),
            _stop: stop.drop_guard(),
        }
    }

    async fn batch(&mut self) -> Batch {
        tokio::time::timeout(DEADLINE, self.client.batches.recv())
            .await
            .expect("a batch comes")
            .expect("the client runs")
    }

    /// Takes batches into use until one has an update; returns its type and updates.
    async fn next_change(&mut self) -> (ResourceType, Vec<Update>) {
        loop {
            let batch = self.batch().await;
            batch.acknowledge.in_use();
            if !batch.updates.is_empty() {
                return (batch.resource_type, batch.updates);
            }
        }
    }

    async fn synced(&mut self) {
        let synced = self.client.status.wait_for(|status| status.synced);
        tokio::time::timeout(DEADLINE, synced)
            .await
            .unwrap()
            .unwrap();
    }
}

#[tokio::test]
async fn everything_arrives_as_it_was_published() {
    let publisher = Publisher::new(7);
    assert_eq!(publisher.publish(full_snapshot()), 1);
    let server = TestServer::start(None, &publisher).await;
    let mut node = TestClient::start(&server, |_| {});
    let mut updates = Vec::new();
    for _ in ResourceType::ALL {
        let batch = node.batch().await;
        assert_eq!(&*batch.version, "7-1");
        assert_eq!(batch.rejected, []);
        updates.extend(batch.updates);
        batch.acknowledge.in_use();
    }
    node.synced().await;
    for resource_type in ResourceType::ALL {
        assert_eq!(node.client.counts.messages(resource_type), 1);
        assert!(node.client.counts.message_bytes(resource_type) > 0);
    }
    let expected = [
        Update::Mesh(Arc::new(full_mesh())),
        Update::Policy {
            name: "shop/p".into(),
            policy: Arc::new(full_policy()),
        },
        Update::Service(Arc::new(full_service())),
        Update::Workload(Arc::new(full_workload())),
    ];
    for one in &expected {
        assert!(updates.contains(one), "{one:?} is missing in {updates:?}");
    }
    assert_eq!(updates.len(), expected.len());
    server.stop().await;
}

/// Behind one address there may be a replica that cannot read the cluster and one that can.
#[tokio::test]
async fn a_server_without_anything_to_tell_sends_its_subscribers_away() {
    let publisher = Publisher::new(7);
    let server = TestServer::start(None, &publisher).await;
    let mut node = TestClient::start(&server, |_| {});
    let sent_away = node.client.status.wait_for(|status| {
        let error = status.last_error.as_deref();
        error.is_some_and(|error| error.contains("the cluster has not been read yet"))
    });
    tokio::time::timeout(DEADLINE, sent_away)
        .await
        .unwrap()
        .unwrap();
    publisher.publish(full_snapshot());
    for _ in ResourceType::ALL {
        node.next_change().await;
    }
    node.synced().await;
    server.stop().await;
}

#[tokio::test]
async fn a_change_is_pushed_to_every_subscriber_as_a_difference() {
    let publisher = Publisher::new(7);
    publisher.publish(full_snapshot());
    let server = TestServer::start(None, &publisher).await;
    let mut nodes = [
        TestClient::start(&server, |_| {}),
        TestClient::start(&server, |config| config.mesh_config = false),
    ];
    for (node, types) in nodes.iter_mut().zip([3, 2]) {
        for _ in 0..types {
            node.next_change().await;
        }
        node.synced().await;
    }
    let second = Workload {
        uid: "uid-2".into(),
        ..full_workload()
    };
    let mut snapshot = full_snapshot();
    snapshot.workloads.push(Arc::new(second.clone()));
    publisher.publish(snapshot);
    for node in &mut nodes {
        let (resource_type, updates) = node.next_change().await;
        assert_eq!(resource_type, ResourceType::Address);
        assert_eq!(updates, [Update::Workload(Arc::new(second.clone()))]);
    }
    publisher.publish(full_snapshot());
    for node in &mut nodes {
        let (_, updates) = node.next_change().await;
        assert_eq!(updates, [Update::AddressRemoved("uid-2".into())]);
    }
    server.stop().await;
}

#[tokio::test]
async fn a_reconnecting_client_is_sent_only_the_differences() {
    let publisher = Publisher::new(7);
    publisher.publish(full_snapshot());
    let server = TestServer::start(None, &publisher).await;
    let mut node = TestClient::start(&server, |_| {});
    for _ in ResourceType::ALL {
        node.next_change().await;
    }
    node.synced().await;
    let address = server.address;
    server.stop().await;

    // Another replica takes over: the same content but for one policy more and the service gone.
    let publisher = Publisher::new(8);
    let server = TestServer::start(Some(address), &publisher).await;
    let other = Policy {
        dry_run: false,
        ..full_policy()
    };
    publisher.publish(Snapshot {
        services: Vec::new(),
        policies: vec![Arc::new(other.clone())],
        ..full_snapshot()
    });
    let mut seen = Vec::new();
    for _ in ResourceType::ALL {
        let batch = node.batch().await;
        assert_eq!(&*batch.version, "8-1");
        seen.extend(batch.updates);
        batch.acknowledge.in_use();
    }
    let expected = [
        Update::Policy {
            name: "shop/p".into(),
            policy: Arc::new(other),
        },
        Update::AddressRemoved("shop/web.shop.svc.cluster.local".into()),
    ];
    assert_eq!(seen, expected);
    assert!(node.client.status.borrow().synced);
    server.stop().await;
}

#[tokio::test]
async fn nothing_is_answered_before_the_first_snapshot() {
    let publisher = Publisher::new(7);
    publisher.publish(full_snapshot());
    let server = TestServer::start(None, &publisher).await;
    let mut node = TestClient::start(&server, |_| {});
    for _ in ResourceType::ALL {
        node.next_change().await;
    }
    let address = server.address;
    server.stop().await;

    // A restarted controller that knows nothing yet must not make the node forget.
    let publisher = Publisher::new(8);
    let mut server = TestServer::start(Some(address), &publisher).await;
    let came = server.streams.wait_for(|streams| *streams > 0);
    tokio::time::timeout(DEADLINE, came).await.unwrap().unwrap();
    assert!(!node.client.status.borrow().connected);
    assert!(node.client.batches.try_recv().is_err());
    publisher.publish(full_snapshot());
    for _ in ResourceType::ALL {
        let batch = node.batch().await;
        assert_eq!((&*batch.version, batch.updates.len()), ("8-1", 0));
        batch.acknowledge.in_use();
    }
    server.stop().await;
}

#[tokio::test]
async fn a_question_is_answered_either_way() {
    let publisher = Publisher::new(7);
    publisher.publish(full_snapshot());
    let server = TestServer::start(None, &publisher).await;
    let key = |ip: &str| Lookup::Address(ip.parse().unwrap());
    for on_demand in [false, true] {
        let mut node = TestClient::start(&server, |config| config.on_demand = on_demand);
        let before = if on_demand { 2 } else { 3 };
        for _ in 0..before {
            node.next_change().await;
        }
        node.client.demand.ask(key("10.0.0.9")).unwrap();
        let (_, updates) = node.next_change().await;
        assert_eq!(updates, [Update::NotFound(key("10.0.0.9"))]);
        node.client.demand.ask(key("fd00::1")).unwrap();
        let (_, updates) = node.next_change().await;
        assert_eq!(updates[0], Update::Workload(Arc::new(full_workload())));
        let kept_up_to_date = Update::Found(key("fd00::1"));
        assert_eq!(
            updates[1..],
            Vec::from_iter(on_demand.then_some(kept_up_to_date))
        );
    }
    server.stop().await;
}

#[tokio::test]
async fn a_batch_dropped_by_the_consumer_is_rejected_and_sent_again_to_the_next_stream() {
    let publisher = Publisher::new(7);
    publisher.publish(full_snapshot());
    let server = TestServer::start(None, &publisher).await;
    let mut node = TestClient::start(&server, |_| {});
    for _ in ResourceType::ALL {
        drop(node.batch().await);
    }
    let mut status = node.client.status.clone();
    let said = tokio::time::timeout(DEADLINE, status.wait_for(|one| one.last_error.is_some()));
    let said = said.await.unwrap().unwrap().clone();
    assert_eq!(
        said.last_error.as_deref(),
        Some("dropped before it was in use")
    );
    assert!(!said.synced);
    let address = server.address;
    server.stop().await;
    let server = TestServer::start(Some(address), &publisher).await;
    for _ in ResourceType::ALL {
        node.next_change().await;
    }
    node.synced().await;
    server.stop().await;
}

#[tokio::test]
async fn a_caller_without_permission_is_refused() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let service = DiscoveryService::new(
        Publisher::new(1),
        |_| Err(tonic::Status::permission_denied("not one of ours")),
        stop.clone(),
    );
    let task = tokio::spawn(async move {
        Server::builder()
            .add_service(service)
            .serve_with_incoming(TcpListenerStream::new(listener))
            .await
    });
    let channel = Endpoint::from_shared(format!("http://{address}"))
        .unwrap()
        .connect_lazy();
    let mut client = Client::start(channel, Config::new(NodeInfo::default()), stop.clone());
    let refused = client.status.wait_for(|status| status.last_error.is_some());
    let refused = tokio::time::timeout(DEADLINE, refused)
        .await
        .unwrap()
        .unwrap()
        .clone();
    assert!(refused.last_error.unwrap().contains("not one of ours"));
    stop.cancel();
    task.abort();
}
