// SPDX-License-Identifier: Apache-2.0
//! A scripted agent at the other end of a real socket pair: each test reads as the conversation.

use super::client::{ConnectionError, serve};
use super::*;
use podveil_model::Uid;
use podveil_netns::seqpacket::Connection;
use podveil_proto::istio::workload::zds as wire;
use podveil_proto::podveil::node::v1::{
    Listener, ListenersRequest, ListenersResponse, listener::Kind,
};
use prost::Message;
use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsFd;
use tokio::sync::watch;
use wire::workload_request::Payload;

#[derive(Debug, Default)]
struct Pods {
    running: BTreeSet<Uid>,
    refuse: bool,
}

impl Workloads for Pods {
    async fn add(&mut self, workload: AddedWorkload) -> Result<(), String> {
        if self.refuse {
            return Err("failure to start proxy".to_owned());
        }
        self.running.insert(workload.uid);
        Ok(())
    }

    async fn delete(&mut self, uid: &Uid) {
        self.running.remove(uid);
    }

    async fn retain(&mut self, named: &BTreeSet<Uid>) {
        self.running.retain(|uid| named.contains(uid));
    }
}

/// The agent's end.
struct Agent(Connection);

impl Agent {
    async fn hello(&self) {
        let packet = self.0.recv(1024).await.unwrap().unwrap();
        let hello = wire::ZdsHello::decode(packet.bytes.as_slice()).unwrap();
        assert_eq!(hello.version(), wire::Version::V1);
    }

    /// Sends one packet and gives the error of its answer.
    async fn send(&self, payload: Option<Payload>, descriptors: usize) -> String {
        self.send_bytes(
            &wire::WorkloadRequest { payload }.encode_to_vec(),
            descriptors,
        )
        .await
    }

    async fn send_bytes(&self, bytes: &[u8], descriptors: usize) -> String {
        let netns = File::open("/proc/self/ns/net").unwrap();
        let fds = vec![netns.as_fd(); descriptors];
        self.0.send(bytes, &fds).await.unwrap();
        let packet = self.0.recv(1024).await.unwrap().unwrap();
        let response = wire::WorkloadResponse::decode(packet.bytes.as_slice()).unwrap();
        match response.payload.unwrap() {
            wire::workload_response::Payload::Ack(ack) => ack.error,
        }
    }

    async fn add(&self, uid: &str) -> String {
        self.send(add(uid), 1).await
    }

    async fn keep(&self, uid: &str) -> String {
        self.send(
            Some(Payload::Keep(wire::KeepWorkload { uid: uid.into() })),
            0,
        )
        .await
    }

    async fn delete(&self, uid: &str) -> String {
        self.send(Some(Payload::Del(wire::DelWorkload { uid: uid.into() })), 0)
            .await
    }

    async fn snapshot_sent(&self) -> String {
        self.send(Some(Payload::SnapshotSent(wire::SnapshotSent {})), 0)
            .await
    }
}

fn add(uid: &str) -> Option<Payload> {
    Some(Payload::Add(wire::AddWorkload {
        uid: uid.into(),
        workload_info: Some(wire::WorkloadInfo {
            addresses: Vec::new(),
            name: "web-1".into(),
            namespace: "shop".into(),
            service_account: "web".into(),
        }),
    }))
}

fn uids(names: &[&str]) -> BTreeSet<Uid> {
    names.iter().map(|name| Uid::from(*name)).collect()
}

/// Runs the script against the client; gives the pods at the end, why the connection ended and what it had reached.
async fn converse(
    mut pods: Pods,
    script: impl AsyncFnOnce(&Agent),
) -> (Pods, ConnectionError, Status) {
    let (agent, client) = Connection::pair().unwrap();
    let (status, seen) = watch::channel(Status::default());
    let conversation = async {
        let agent = Agent(agent);
        agent.hello().await;
        script(&agent).await;
    };
    let (ended, ()) = tokio::join!(serve(&client, false, &mut pods, &status), conversation);
    (pods, ended, *seen.borrow())
}

#[tokio::test]
async fn a_snapshot_starts_keeps_and_ends_pods() {
    let known = Pods {
        running: uids(&["kept", "forgotten"]),
        ..Pods::default()
    };
    let (pods, ended, status) = converse(known, async |agent| {
        assert_eq!(agent.add("a").await, "");
        assert_eq!(agent.add("b").await, "");
        assert_eq!(agent.keep("kept").await, "");
        assert_eq!(agent.delete("b").await, "");
        assert_eq!(agent.snapshot_sent().await, "");
    })
    .await;
    assert_eq!(pods.running, uids(&["a", "kept"]));
    assert!(matches!(ended, ConnectionError::Closed), "{ended:?}");
    assert_eq!(status, Status::Live);
}

#[tokio::test]
async fn nothing_ends_before_the_snapshot_does() {
    let known = Pods {
        running: uids(&["known"]),
        ..Pods::default()
    };
    let (pods, _, status) = converse(known, async |agent| {
        assert_eq!(agent.add("a").await, "");
    })
    .await;
    assert_eq!(pods.running, uids(&["a", "known"]));
    assert_eq!(status, Status::Snapshot);
}

#[tokio::test]
async fn pods_come_and_go_after_the_snapshot() {
    let (pods, ..) = converse(Pods::default(), async |agent| {
        assert_eq!(agent.snapshot_sent().await, "");
        assert_eq!(agent.add("a").await, "");
        assert_eq!(agent.add("a").await, "");
        assert_eq!(agent.add("b").await, "");
        assert_eq!(agent.delete("a").await, "");
        assert_eq!(
            agent.delete("never there").await,
            "the uid of a pod is 1 to 253 visible ASCII characters"
        );
        assert_eq!(agent.delete("never-there").await, "");
        assert_eq!(agent.keep("b").await, "a keep came after the snapshot");
    })
    .await;
    assert_eq!(pods.running, uids(&["b"]));
}

#[tokio::test]
async fn a_pod_that_cannot_be_served_is_refused_and_the_next_one_is_not() {
    let refusing = Pods {
        refuse: true,
        ..Pods::default()
    };
    let (pods, ended, _) = converse(refusing, async |agent| {
        assert_eq!(agent.add("a").await, "failure to start proxy");
        assert_eq!(agent.snapshot_sent().await, "");
    })
    .await;
    assert_eq!(pods.running, uids(&[]));
    assert!(matches!(ended, ConnectionError::Closed), "{ended:?}");
}

#[tokio::test]
async fn the_wrong_number_of_descriptors_is_refused() {
    let (pods, ended, _) = converse(Pods::default(), async |agent| {
        assert_eq!(
            agent.send(add("a"), 0).await,
            "add with 0 descriptors instead of 1"
        );
        assert_eq!(
            agent.send(add("a"), 2).await,
            "add with 2 descriptors instead of 1"
        );
        let delete = Payload::Del(wire::DelWorkload { uid: "a".into() });
        assert_eq!(
            agent.send(Some(delete), 1).await,
            "delete with 1 descriptors instead of 0"
        );
    })
    .await;
    assert_eq!(pods.running, uids(&[]));
    assert!(matches!(ended, ConnectionError::Closed), "{ended:?}");
}

#[tokio::test]
async fn an_add_without_information_is_refused() {
    let (pods, ..) = converse(Pods::default(), async |agent| {
        let bare = wire::AddWorkload {
            uid: "a".into(),
            workload_info: None,
        };
        let error = agent.send(Some(Payload::Add(bare)), 1).await;
        assert_eq!(error, "an add without workload information");
    })
    .await;
    assert_eq!(pods.running, uids(&[]));
}

#[tokio::test]
async fn a_request_of_a_newer_agent_is_refused_by_name() {
    let (_, ended, _) = converse(Pods::default(), async |agent| {
        // Field 15, a message: nothing that this version knows.
        let error = agent.send_bytes(&[0x7a, 0x00], 0).await;
        assert_eq!(error, "a request that this version does not know");
    })
    .await;
    assert!(matches!(ended, ConnectionError::Closed), "{ended:?}");
}

#[tokio::test]
async fn a_packet_that_is_no_message_ends_the_connection() {
    let (_, ended, _) = converse(Pods::default(), async |agent| {
        let error = agent.send_bytes(&[0xff; 7], 0).await;
        assert_eq!(error, "the packet is not a WorkloadRequest");
    })
    .await;
    assert!(
        matches!(
            ended,
            ConnectionError::Protocol(PacketError::NotDecodable(_))
        ),
        "{ended:?}"
    );
}

#[tokio::test]
async fn a_second_snapshot_ends_the_connection() {
    let (_, ended, _) = converse(Pods::default(), async |agent| {
        assert_eq!(agent.snapshot_sent().await, "");
        assert_eq!(
            agent.snapshot_sent().await,
            "a second snapshot on one connection"
        );
    })
    .await;
    assert!(
        matches!(
            ended,
            ConnectionError::Protocol(PacketError::SecondSnapshot)
        ),
        "{ended:?}"
    );
}

#[tokio::test]
async fn a_packet_longer_than_allowed_ends_the_connection() {
    let (agent, client) = Connection::pair().unwrap();
    let (status, _seen) = watch::channel(Status::default());
    let mut pods = Pods::default();
    agent.send(&[0; 2000], &[]).await.unwrap();
    let ended = serve(&client, false, &mut pods, &status).await;
    assert!(matches!(ended, ConnectionError::Receive(_)), "{ended:?}");
}

fn response(kinds: &[Kind]) -> ListenersResponse {
    ListenersResponse {
        error: String::new(),
        listeners: kinds
            .iter()
            .map(|kind| Listener {
                kind: (*kind).into(),
                ipv6: false,
            })
            .collect(),
        ..Default::default()
    }
}

/// Answers one listeners request with `response` and `descriptors` listening sockets.
async fn hold(
    response: ListenersResponse,
    descriptors: usize,
) -> Result<PodListeners, ListenersError> {
    let (holder, client) = Connection::pair().unwrap();
    let answer = async {
        let packet = holder.recv(1024).await.unwrap().unwrap();
        let request = ListenersRequest::decode(packet.bytes.as_slice()).unwrap();
        assert_eq!(request.uid, "a");
        let sockets: Vec<_> = (0..descriptors)
            .map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap())
            .collect();
        let fds: Vec<_> = sockets.iter().map(AsFd::as_fd).collect();
        holder.send(&response.encode_to_vec(), &fds).await.unwrap();
    };
    let uid = Uid::from("a");
    tokio::join!(listeners::ask(&client, &uid), answer).0
}

#[tokio::test]
async fn listeners_come_by_descriptor_in_the_order_told() {
    let kinds = [
        Kind::InboundHbone,
        Kind::Outbound,
        Kind::InboundPlain,
        Kind::Outbound,
    ];
    let listeners = hold(response(&kinds), 4).await.unwrap();
    assert_eq!(listeners.outbound.len(), 2);
    assert_eq!(listeners.inbound_plain.len(), 1);
    assert_eq!(listeners.inbound_hbone.len(), 1);
}

#[tokio::test]
async fn an_incomplete_answer_of_the_holder_is_refused() {
    let all = [Kind::Outbound, Kind::InboundPlain, Kind::InboundHbone];
    let error = hold(response(&all), 2).await.unwrap_err();
    assert!(
        matches!(
            error,
            ListenersError::Count {
                descriptors: 2,
                listeners: 3
            }
        ),
        "{error}"
    );
    let error = hold(response(&all[..2]), 2).await.unwrap_err();
    assert!(
        matches!(error, ListenersError::Missing(Kind::InboundHbone)),
        "{error}"
    );
    let refusal = ListenersResponse {
        error: "not held".to_owned(),
        ..Default::default()
    };
    let error = hold(refusal, 0).await.unwrap_err();
    assert_eq!(error.to_string(), "the holder refused: not held");
}
