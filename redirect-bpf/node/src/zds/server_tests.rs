// SPDX-License-Identifier: Apache-2.0
use super::super::session::Taking;
use super::*;
use podveil_netns::NetNs;
use podveil_proto::istio::workload::zds as wire;
use prost::Message;
use std::path::PathBuf;
use wire::workload_request::Payload;

struct World {
    path: PathBuf,
    offers: watch::Sender<Offers>,
    proxy: watch::Receiver<Proxy>,
    asked: CancellationToken,
    stop: CancellationToken,
    _directory: tempfile::TempDir,
}

impl World {
    fn new(uid: u32) -> Self {
        Self::with(uid, true)
    }

    /// `ours`: whoever connects may be served.
    fn with(uid: u32, ours: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("zds/zds.sock");
        let listener = Listener::bind(&path).unwrap();
        let (offers, offered) = watch::channel(None);
        let (proxy_in, proxy) = watch::channel(Proxy::default());
        let (asked, stop) = (CancellationToken::new(), CancellationToken::new());
        tokio::spawn(serve(
            listener,
            offered,
            proxy_in,
            uid,
            move |_| ours,
            (asked.clone(), stop.clone()),
        ));
        Self {
            path,
            offers,
            proxy,
            asked,
            stop,
            _directory: directory,
        }
    }

    fn offer(&self, list: &[&str]) {
        let offers = list.iter().map(|uid| {
            let offer = Offer::Take(Taking {
                name: "web-1".into(),
                namespace: "shop".into(),
                service_account: "web".into(),
                netns: Arc::new(NetNs::current().unwrap()),
                addresses: Arc::default(),
                generation: 1,
            });
            (Uid::from(*uid), offer)
        });
        self.offers.send_replace(Some(Arc::new(offers.collect())));
    }

    async fn client(&self) -> Connection {
        self.client_saying(false).await
    }

    async fn client_saying(&self, take_over: bool) -> Connection {
        let client = Connection::connect(&self.path).unwrap();
        let hello = wire::ZdsHello {
            version: wire::Version::V1.into(),
            take_over,
        };
        // One that is refused may be refused before it has spoken.
        let _ = client.send(&hello.encode_to_vec(), &[]).await;
        client
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn own_uid() -> u32 {
    nix::unistd::geteuid().as_raw()
}

/// Takes one request, checks its descriptors, answers it, and names it.
async fn take(client: &Connection, error: &str) -> String {
    let packet = client.recv(1024).await.unwrap().expect("a request");
    let request = wire::WorkloadRequest::decode(packet.bytes.as_slice()).unwrap();
    let (name, descriptors) = match request.payload.unwrap() {
        Payload::Add(add) => {
            let info = add.workload_info.unwrap();
            assert_eq!(
                (info.name.as_str(), info.namespace.as_str()),
                ("web-1", "shop")
            );
            (format!("add {}", add.uid), 1)
        }
        Payload::Del(del) => (format!("del {}", del.uid), 0),
        Payload::SnapshotSent(_) => ("snapshot".to_owned(), 0),
        Payload::Keep(keep) => (format!("keep {}", keep.uid), 0),
    };
    assert_eq!(packet.fds.len(), descriptors);
    for fd in packet.fds {
        NetNs::from_fd(fd).unwrap();
    }
    let ack = wire::WorkloadResponse {
        payload: Some(wire::workload_response::Payload::Ack(wire::Ack {
            error: error.to_owned(),
        })),
    };
    client.send(&ack.encode_to_vec(), &[]).await.unwrap();
    name
}

#[tokio::test]
async fn a_proxy_gets_the_snapshot_then_what_changes() {
    let mut world = World::new(own_uid());
    let client = world.client().await;
    world.offer(&["a", "b"]);
    assert_eq!(take(&client, "").await, "add a");
    assert_eq!(take(&client, "cannot").await, "add b");
    assert_eq!(take(&client, "").await, "snapshot");
    let wanted = [
        ("a".into(), (1, Ok(()))),
        ("b".into(), (1, Err("cannot".into()))),
    ];
    world
        .proxy
        .wait_for(|proxy| *proxy.acknowledged == wanted.clone().into())
        .await
        .unwrap();
    world.offer(&["a", "c"]);
    assert_eq!(take(&client, "").await, "del b");
    assert_eq!(take(&client, "").await, "add c");

    // It comes back: everything again.
    drop(client);
    world
        .proxy
        .wait_for(|proxy| proxy.peer.is_none())
        .await
        .unwrap();
    let client = world.client().await;
    assert_eq!(take(&client, "").await, "add a");
    assert_eq!(take(&client, "").await, "add c");
    assert_eq!(take(&client, "").await, "snapshot");
}

#[tokio::test]
async fn nothing_is_sent_before_the_pods_are_known() {
    let world = World::new(own_uid());
    let client = world.client().await;
    let mut proxy = world.proxy.clone();
    proxy.wait_for(|proxy| proxy.peer.is_some()).await.unwrap();
    world.offer(&[]);
    assert_eq!(take(&client, "").await, "snapshot");
}

#[tokio::test]
async fn a_second_client_is_refused_until_the_first_is_gone() {
    let world = World::new(own_uid());
    world.offer(&["a"]);
    let first = world.client().await;
    assert_eq!(take(&first, "").await, "add a");
    assert_eq!(take(&first, "").await, "snapshot");
    let second = world.client().await;
    assert_sent_nothing(&second).await;
    world.offer(&["a", "b"]);
    assert_eq!(take(&first, "").await, "add b");
    drop(first);
    let third = world.client().await;
    assert_eq!(take(&third, "").await, "add a");
}

#[tokio::test]
async fn a_client_that_asks_to_take_over_follows_when_the_first_lets_go() {
    let world = World::new(own_uid());
    world.offer(&["a"]);
    let first = world.client().await;
    assert_eq!(take(&first, "").await, "add a");
    assert_eq!(take(&first, "").await, "snapshot");
    let second = world.client_saying(true).await;
    // One may wait; another that asks for the same is refused, and the first goes on being served.
    let third = world.client_saying(true).await;
    assert_sent_nothing(&third).await;
    world.offer(&["a", "b"]);
    assert_eq!(take(&first, "").await, "add b");
    drop(first);
    assert_eq!(take(&second, "").await, "add a");
    assert_eq!(take(&second, "").await, "add b");
    assert_eq!(take(&second, "").await, "snapshot");
}

#[tokio::test]
async fn a_client_of_another_user_is_refused() {
    let world = World::new(own_uid() + 1);
    world.offer(&["a"]);
    let client = world.client().await;
    assert_sent_nothing(&client).await;
    assert!(world.proxy.borrow().peer.is_none());
}

#[tokio::test]
async fn a_client_of_another_version_is_sent_nothing() {
    let world = World::new(own_uid());
    world.offer(&["a"]);
    let client = Connection::connect(&world.path).unwrap();
    let hello = wire::ZdsHello {
        version: 9,
        take_over: false,
    };
    client.send(&hello.encode_to_vec(), &[]).await.unwrap();
    assert_sent_nothing(&client).await;
}

/// Closed, or reset because our own hello was not read.
async fn assert_sent_nothing(client: &Connection) {
    let received = client.recv(1024).await;
    assert!(!matches!(received, Ok(Some(_))), "it was sent something");
}

/// Neither refused nor sent anything, for longer than either takes.
async fn waits(client: &Connection) -> bool {
    tokio::time::timeout(2 * TAKE_OVER_TIMEOUT, client.recv(64))
        .await
        .is_err()
}

#[tokio::test]
async fn who_waited_and_is_gone_keeps_nobody_out() {
    let world = World::new(own_uid());
    world.offer(&["a"]);
    let first = world.client().await;
    assert_eq!(take(&first, "").await, "add a");
    let gone = world.client_saying(true).await;
    assert!(waits(&gone).await);
    drop(gone);
    let third = loop {
        let third = world.client_saying(true).await;
        // Until the end of the one before it is seen, it is refused.
        if waits(&third).await {
            break third;
        }
    };
    drop(first);
    assert_eq!(take(&third, "").await, "add a");
}

#[tokio::test]
async fn asked_to_stop_the_module_hands_over_to_who_waits() {
    let mut world = World::new(own_uid());
    world.offer(&["a"]);
    let first = world.client().await;
    assert_eq!(take(&first, "").await, "add a");
    assert_eq!(take(&first, "").await, "snapshot");
    let second = world.client_saying(true).await;
    assert!(waits(&second).await);
    world.asked.cancel();
    assert_eq!(take(&second, "").await, "add a");
    let now = world.proxy.wait_for(|proxy| proxy.is_follower);
    assert!(now.await.unwrap().peer.is_some());
    assert!(first.recv(64).await.unwrap().is_none());
}

#[tokio::test]
async fn who_may_not_have_the_listeners_waits_for_another_module() {
    let world = World::with(own_uid(), false);
    world.offer(&["a"]);
    let client = world.client_saying(true).await;
    assert!(waits(&client).await);
    world.asked.cancel();
    assert!(waits(&client).await);
    world.stop.cancel();
    assert!(client.recv(64).await.unwrap().is_none());
}
