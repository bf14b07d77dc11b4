// SPDX-License-Identifier: Apache-2.0
//! Holds the pods' listening sockets, gives the proxy copies, and stands in while there is no proxy.

use crate::kubelet::Kubelets;
use crate::listeners::PodListeners;
use crate::zds::Proxy;
use podveil_model::Uid;
use podveil_netns::cgroup::Membership;
use podveil_netns::seqpacket::{Connection, Listener};
use podveil_proto::podveil::node::v1::{self as wire, ListenersRequest, ListenersResponse};
use prost::Message;
use socket2::SockRef;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;

const MAX_REQUEST_BYTES: usize = 1024;
/// One for each pod that the proxy takes at once, and some to spare.
const MAX_CLIENTS: usize = 64;
const CLIENT_TIMEOUT: Duration = Duration::from_secs(10);

/// The held sockets, by pod.
#[derive(Clone, Debug, Default)]
pub struct Held(Arc<Mutex<BTreeMap<Uid, Arc<PodListeners>>>>);

impl Held {
    pub fn insert(&self, uid: Uid, listeners: Arc<PodListeners>) {
        self.table().insert(uid, listeners);
    }

    pub fn remove(&self, uid: &Uid) {
        self.table().remove(uid);
    }

    fn find(&self, uid: &str) -> Option<Arc<PodListeners>> {
        self.table().get(&Uid::from(uid)).cloned()
    }

    fn table(&self) -> std::sync::MutexGuard<'_, BTreeMap<Uid, Arc<PodListeners>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the holder answers from.
#[derive(Clone, Debug, Default)]
pub struct Answers {
    pub held: Held,
    pub kubelets: Arc<Kubelets>,
}

/// Answers requests on the holder's socket until `stop`. Only processes of `uid` in the proxy's cgroup are answered: an
/// application cannot join that, whatever it runs as.
pub async fn serve(
    listener: Listener,
    answers: Answers,
    uid: u32,
    cgroup: Membership,
    stop: CancellationToken,
) {
    let clients = Arc::new(Semaphore::new(MAX_CLIENTS));
    let accept = async {
        loop {
            let permit = clients.clone().acquire_owned().await;
            let connection = match listener.accept().await {
                Ok(connection) => connection,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept on the holder's socket");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            match connection.peer() {
                Ok(peer) if peer.uid != uid => {
                    tracing::warn!(peer.uid, peer.pid, "refused a client of the holder");
                    continue;
                }
                Ok(peer) => match cgroup.contains(peer.pid) {
                    // Alive afterwards, so that it was its own number that was looked at.
                    Ok(true) if peer.is_alive() => {}
                    found => {
                        tracing::warn!(
                            peer.pid,
                            ?found,
                            "refused a client of the holder outside of the proxy's cgroup"
                        );
                        continue;
                    }
                },
                Err(error) => {
                    tracing::warn!(%error, "refused a client of the holder that cannot be told");
                    continue;
                }
            }
            let answers = answers.clone();
            let stop = stop.clone();
            tokio::spawn(async move {
                let _permit = permit;
                let answered = tokio::time::timeout(CLIENT_TIMEOUT, answer(&connection, &answers));
                if let Some(Ok(Err(error))) = stop.run_until_cancelled(answered).await {
                    tracing::debug!(%error, "lost a client of the holder");
                }
            });
        }
    };
    let _stopped: Option<()> = stop.run_until_cancelled(accept).await;
}

/// Requests of one client, until it closes.
pub async fn answer(connection: &Connection, answers: &Answers) -> io::Result<()> {
    while let Some(packet) = connection.recv(MAX_REQUEST_BYTES).await? {
        let found = match ListenersRequest::decode(packet.bytes.as_slice()) {
            Ok(ListenersRequest {
                kubelet_socket: socket @ 1..,
                ..
            }) => {
                let kubelets = answers.kubelets.clone();
                let looked = tokio::task::spawn_blocking(move || kubelets.hold(socket));
                let response = ListenersResponse {
                    is_kubelets: looked.await.unwrap_or(false),
                    ..ListenersResponse::default()
                };
                connection.send(&response.encode_to_vec(), &[]).await?;
                continue;
            }
            Ok(request) => answers
                .held
                .find(&request.uid)
                .ok_or_else(|| format!("no listeners are held for {}", request.uid)),
            Err(error) => Err(error.to_string()),
        };
        match found {
            Ok(listeners) => {
                let response = ListenersResponse {
                    error: String::new(),
                    is_kubelets: false,
                    listeners: (listeners.0.iter())
                        .map(|listener| wire::Listener {
                            kind: listener.kind.into(),
                            ipv6: listener.ipv6,
                        })
                        .collect(),
                };
                let fds: Vec<_> = listeners.0.iter().map(|one| one.socket.as_fd()).collect();
                connection.send(&response.encode_to_vec(), &fds).await?;
            }
            Err(error) => {
                let response = ListenersResponse {
                    error,
                    ..ListenersResponse::default()
                };
                connection.send(&response.encode_to_vec(), &[]).await?;
            }
        }
    }
    Ok(())
}

/// Stands in for a pod while `orphaned` says that no proxy has come back in time: accepts and resets, so that nobody
/// waits in a queue that nobody serves. One task for each socket; they end with `stop`.
pub fn stand_in(
    listeners: &Arc<PodListeners>,
    orphaned: &watch::Receiver<bool>,
    stop: &CancellationToken,
) {
    for index in 0..listeners.0.len() {
        let listeners = listeners.clone();
        let mut orphaned = orphaned.clone();
        let stop = stop.clone();
        tokio::spawn(async move {
            let work = async {
                while orphaned.wait_for(|orphaned| *orphaned).await.is_ok() {
                    let listener = &listeners.0[index].socket;
                    // Registered with the runtime only now: before, each connection would wake this process too.
                    let Ok(listener) = listener.try_clone().and_then(TcpListener::from_std) else {
                        return;
                    };
                    tokio::select! {
                        () = reset_all(&listener) => {}
                        _ = orphaned.wait_for(|orphaned| !orphaned) => {}
                    }
                }
            };
            let _stopped: Option<()> = stop.run_until_cancelled(work).await;
        });
    }
}

async fn reset_all(listener: &TcpListener) {
    loop {
        match listener.accept().await {
            Ok((connection, _)) => {
                // Closed with a reset, never with a clean end.
                let _ = SockRef::from(&connection).set_linger(Some(Duration::ZERO));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

/// Says when no proxy has been connected for `bound`. A proxy that stops lets go of ZDS when it stops accepting, so the
/// connection is the measure and not the process.
pub async fn watch_proxy(
    mut proxy: watch::Receiver<Proxy>,
    bound: Duration,
    orphaned: watch::Sender<bool>,
) {
    let there = |proxy: &Proxy| proxy.peer.is_some();
    loop {
        if proxy.wait_for(|proxy| !there(proxy)).await.is_err() {
            return;
        }
        let back = tokio::time::timeout(bound, proxy.wait_for(there)).await;
        match back.map(|back| back.is_ok()) {
            Ok(true) => continue,
            Ok(false) => return,
            Err(_) => {
                tracing::warn!(
                    ?bound,
                    "no proxy: new connections of captured pods are reset"
                );
                orphaned.send_replace(true);
            }
        }
        if proxy.wait_for(there).await.is_err() {
            return;
        }
        orphaned.send_replace(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::listeners::Listener as PodListener;
    use podveil_proto::podveil::node::v1::listener::Kind;
    use std::io::Read;

    fn listeners() -> Arc<PodListeners> {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        socket.set_nonblocking(true).unwrap();
        Arc::new(PodListeners(vec![PodListener {
            kind: Kind::Outbound,
            ipv6: false,
            socket,
        }]))
    }

    #[tokio::test]
    async fn the_proxy_gets_copies_in_order() {
        let answers = Answers::default();
        let listeners = listeners();
        let address = listeners.0[0].socket.local_addr().unwrap();
        answers.held.insert("u".into(), listeners);
        let (server, client) = Connection::pair().unwrap();
        tokio::spawn(async move { answer(&server, &answers).await });
        for (uid, descriptors) in [("u", 1), ("other", 0)] {
            let request = ListenersRequest {
                uid: uid.into(),
                kubelet_socket: 0,
            };
            client.send(&request.encode_to_vec(), &[]).await.unwrap();
            let packet = client.recv(1024).await.unwrap().unwrap();
            let response = ListenersResponse::decode(packet.bytes.as_slice()).unwrap();
            assert_eq!(response.error.is_empty(), descriptors == 1);
            assert_eq!(response.listeners.len(), descriptors);
            assert_eq!(packet.fds.len(), descriptors);
            for fd in packet.fds {
                let copy = std::net::TcpListener::from(fd);
                assert_eq!(copy.local_addr().unwrap(), address);
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_proxy_that_stays_away_is_noticed_after_the_bound() {
        let (connection, _other) = Connection::pair().unwrap();
        let connected = Proxy {
            peer: Some(Arc::new(connection.peer().unwrap())),
            ..Proxy::default()
        };
        let (proxy, watched) = watch::channel(connected.clone());
        let (orphaned, mut seen) = watch::channel(false);
        tokio::spawn(watch_proxy(watched, Duration::from_secs(5), orphaned));
        let start = tokio::time::Instant::now();
        proxy.send_replace(Proxy::default());
        seen.wait_for(|orphaned| *orphaned).await.unwrap();
        assert_eq!(start.elapsed().as_secs(), 5);
        proxy.send_replace(connected);
        seen.wait_for(|orphaned| !*orphaned).await.unwrap();
        assert_eq!(start.elapsed().as_secs(), 5);
    }

    #[tokio::test]
    async fn an_orphaned_listener_resets() {
        let listeners = listeners();
        let address = listeners.0[0].socket.local_addr().unwrap();
        let (orphaned, receiver) = watch::channel(false);
        let stop = CancellationToken::new();
        stand_in(&listeners, &receiver, &stop);
        let mut client = std::net::TcpStream::connect(address).unwrap();
        orphaned.send_replace(true);
        let read = tokio::task::spawn_blocking(move || client.read(&mut [0]));
        let error = read.await.unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        stop.cancel();
    }
}
