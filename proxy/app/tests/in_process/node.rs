// SPDX-License-Identifier: Apache-2.0
//! The other processes of the node: an agent and a holder of listeners, over real sockets in a folder of their own.

use podveil_model::INBOUND_PORT;
use podveil_netns::seqpacket::{Connection, Listener};
use podveil_node::config::NodeConfig;
use podveil_proto::istio::workload::zds as wire;
use podveil_proto::podveil::node::v1 as node;
use prost::Message;
use std::fs::File;
use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use tempfile::TempDir;
use wire::workload_request::Payload;

pub struct Folder(TempDir);

impl Folder {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> String {
        let path = self.0.path().join("private").join(name);
        path.to_str().unwrap().to_owned()
    }

    pub fn config(&self) -> NodeConfig {
        serde_json::from_value(serde_json::json!({
            "node": "n1",
            "zds_socket": self.path("zds.sock"),
            "listeners_socket": self.path("listeners.sock"),
            "admin_address": "127.0.0.1:0",
            "metrics_address": "127.0.0.1:0",
            "readiness_address": "127.0.0.1:0",
            "proxy": { "drain_bound": "5s" },
        }))
        .unwrap()
    }
}

/// The agent, once the proxy has connected and said hello.
pub struct Agent(
    Connection,
    #[expect(dead_code, reason = "removes the socket's file at the end")] Listener,
);

impl Agent {
    pub fn listen(folder: &Folder) -> Listener {
        Listener::bind(folder.path("zds.sock")).unwrap()
    }

    pub async fn accept(listener: Listener) -> Self {
        let connection = listener.accept().await.unwrap();
        let packet = connection.recv(1024).await.unwrap().unwrap();
        wire::ZdsHello::decode(packet.bytes.as_slice()).unwrap();
        Self(connection, listener)
    }

    /// The error of the answer.
    pub async fn add(&self, uid: &str) -> String {
        self.add_in(uid, &File::open("/proc/thread-self/ns/net").unwrap())
            .await
    }

    pub async fn add_in(&self, uid: &str, netns: &File) -> String {
        let add = wire::AddWorkload {
            uid: uid.to_owned(),
            workload_info: Some(wire::WorkloadInfo {
                addresses: Vec::new(),
                name: uid.to_owned(),
                namespace: "shop".to_owned(),
                service_account: "web".to_owned(),
            }),
        };
        self.send(Payload::Add(add), Some(netns)).await
    }

    pub async fn delete(&self, uid: &str) -> String {
        let uid = uid.to_owned();
        self.send(Payload::Del(wire::DelWorkload { uid }), None)
            .await
    }

    pub async fn snapshot_sent(&self) -> String {
        self.send(Payload::SnapshotSent(wire::SnapshotSent {}), None)
            .await
    }

    async fn send(&self, payload: Payload, netns: Option<&File>) -> String {
        let payload = Some(payload);
        let bytes = wire::WorkloadRequest { payload }.encode_to_vec();
        let fds: Vec<_> = netns.into_iter().map(AsFd::as_fd).collect();
        self.0.send(&bytes, &fds).await.unwrap();
        let packet = self.0.recv(1024).await.unwrap().unwrap();
        let response = wire::WorkloadResponse::decode(packet.bytes.as_slice()).unwrap();
        match response.payload.unwrap() {
            wire::workload_response::Payload::Ack(ack) => ack.error,
        }
    }
}

/// A network namespace of its own, as a replaced pod's is; gone with its descriptor.
pub fn new_netns() -> File {
    let mut child = Command::new("unshare")
        .args(["--net", "sh", "-c", "echo made; exec cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut made = [0; 5];
    child.stdout.take().unwrap().read_exact(&mut made).unwrap();
    let netns = File::open(format!("/proc/{}/ns/net", child.id())).unwrap();
    // Its input ends, and so does it.
    drop(child.stdin.take());
    child.wait().unwrap();
    netns
}

/// Listeners on loopback, which the holder keeps: a plain and an HBONE one matter here.
pub struct Held {
    sockets: [TcpListener; 3],
}

impl Held {
    pub fn new() -> Arc<Self> {
        let any = || TcpListener::bind("127.0.0.1:0").unwrap();
        // On the real port, by which a socket that was given to the listener is told from one that dialled it; an address
        // for each test.
        static NEXT: AtomicU8 = AtomicU8::new(1);
        let [.., high, low] = std::process::id().to_be_bytes();
        let own = Ipv4Addr::new(127, high | 1, low, NEXT.fetch_add(1, Ordering::Relaxed));
        let plain = TcpListener::bind((own, INBOUND_PORT)).unwrap();
        Arc::new(Self {
            sockets: [any(), plain, any()],
        })
    }

    pub fn plain(&self) -> SocketAddr {
        self.sockets[1].local_addr().unwrap()
    }

    pub fn hbone(&self) -> SocketAddr {
        self.sockets[2].local_addr().unwrap()
    }
}

/// What the holder answers for the pod `a`, changed by the test: listeners, or a refusal.
pub type Answer = Arc<Mutex<Result<Arc<Held>, String>>>;

pub fn holder(folder: &Folder, answer: Answer) {
    let listener = Listener::bind(folder.path("listeners.sock")).unwrap();
    tokio::spawn(async move {
        loop {
            let connection = listener.accept().await.unwrap();
            while let Ok(Some(packet)) = connection.recv(1024).await {
                node::ListenersRequest::decode(packet.bytes.as_slice()).unwrap();
                let held = answer.lock().unwrap().clone();
                respond(&connection, held).await;
            }
        }
    });
}

async fn respond(connection: &Connection, held: Result<Arc<Held>, String>) {
    let kinds = [
        node::listener::Kind::Outbound,
        node::listener::Kind::InboundPlain,
        node::listener::Kind::InboundHbone,
    ];
    let listeners = kinds.map(|kind| node::Listener {
        kind: kind.into(),
        ipv6: false,
    });
    let response = match &held {
        Ok(_) => node::ListenersResponse {
            error: String::new(),
            listeners: listeners.into(),
            ..Default::default()
        },
        Err(error) => node::ListenersResponse {
            error: error.clone(),
            ..Default::default()
        },
    };
    let fds: Vec<_> = held
        .iter()
        .flat_map(|held| held.sockets.iter().map(AsFd::as_fd))
        .collect();
    connection
        .send(&response.encode_to_vec(), &fds)
        .await
        .unwrap();
}
