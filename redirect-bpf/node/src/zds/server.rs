// SPDX-License-Identifier: Apache-2.0
use super::session::{Next, Offer, Session, SessionError};
use podveil_model::Uid;
use podveil_netns::seqpacket::{Connection, Listener, Packet, Peer};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Longest packet a client may send, as the peers have it.
const MAX_PACKET_BYTES: usize = 1024;
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// A second client says in its first packet what it wants; nobody else is accepted meanwhile.
const TAKE_OVER_TIMEOUT: Duration = Duration::from_millis(200);
/// A proxy takes a pod in milliseconds; after this it hangs, and a new connection starts over.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Every pod that the proxy should have; `None` until that is known, so that no snapshot drops a pod by accident.
pub type Offers = Option<Arc<BTreeMap<Uid, Offer>>>;

/// What the connected proxy said to each pod: the offer's generation and its error.
pub type Acknowledged = Arc<BTreeMap<Uid, (u64, Result<(), Arc<str>>)>>;

/// The proxy that is connected.
#[derive(Clone, Debug, Default)]
pub struct Proxy {
    pub peer: Option<Arc<Peer>>,
    /// It had waited for another one, or came when the module had been asked to stop.
    pub is_follower: bool,
    /// Another one waits to follow it.
    pub is_awaited: bool,
    pub acknowledged: Acknowledged,
}

#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("the proxy closed the connection")]
    Closed,
    #[error("the connection broke")]
    Io(#[from] io::Error),
    #[error("the proxy breaks the protocol")]
    Session(#[from] SessionError),
    #[error("the module stops")]
    Stopped,
    #[error("the proxy did not answer in time")]
    TimedOut,
}

/// Serves one proxy at a time until `stop`. A client of another user than `uid` is refused. So is a second one while the
/// first is connected and its process lives, unless its hello asks to take over: then it waits, alone, until the first
/// lets go or is gone, or the module is asked to stop. Nothing is sent to a client that is refused or waits.
///
/// `is_ours`: who may have the holder's listeners. Anybody else may wait, and is served by another process of this module
/// when this one has ended.
pub async fn serve(
    listener: Listener,
    offers: watch::Receiver<Offers>,
    proxy: watch::Sender<Proxy>,
    uid: u32,
    is_ours: impl Fn(&Peer) -> bool,
    (asked, stop): (CancellationToken, CancellationToken),
) {
    let mut current: Option<(JoinHandle<()>, Arc<Peer>)> = None;
    let mut successor: Option<Client> = None;
    let start = |client: Client, has_waited: bool| {
        let is_follower = has_waited || asked.is_cancelled();
        tracing::info!(client.peer.pid, is_follower, "a proxy has connected");
        let peer = client.peer.clone();
        proxy.send_replace(Proxy {
            peer: Some(peer.clone()),
            is_follower,
            is_awaited: false,
            acknowledged: Acknowledged::default(),
        });
        let task = tokio::spawn(one(client, offers.clone(), proxy.clone(), stop.clone()));
        (task, peer)
    };
    let mut handed_over = false;
    let accept = async {
        loop {
            let may_follow = successor
                .as_ref()
                .is_some_and(|client| is_ours(&client.peer));
            let client = tokio::select! {
                accepted = accept(&listener, uid) => match accepted {
                    Some(client) => client,
                    None => continue,
                },
                () = has_closed(&successor) => {
                    successor = None;
                    continue;
                }
                () = has_ended(&mut current), if may_follow => {
                    current = successor.take().map(|client| start(client, true));
                    continue;
                }
                () = asked.cancelled(), if may_follow && !handed_over => {
                    handed_over = true;
                    if let Some((task, _)) = current.take() {
                        task.abort();
                        let _ended = task.await;
                    }
                    current = successor.take().map(|client| start(client, true));
                    continue;
                }
            };
            if let Some((task, first)) = current.take() {
                if !task.is_finished() && first.is_alive() && !closes(&proxy).await {
                    successor = wait_in_turn(client, successor).await;
                    current = Some((task, first));
                    continue;
                }
                task.abort();
                let _ended = task.await;
            }
            match is_ours(&client.peer) {
                true => current = Some(start(client, false)),
                false => successor = wait_in_turn(client, successor).await,
            }
        }
    };
    let _stopped: Option<()> = stop.run_until_cancelled(accept).await;
    if let Some((task, _)) = current {
        let _ended = task.await;
    }
}

/// Somebody who has connected and may speak.
struct Client {
    connection: Connection,
    peer: Arc<Peer>,
    /// The first packet, if it has been read already.
    hello: Option<Packet>,
}

/// The next client of the right user.
async fn accept(listener: &Listener, uid: u32) -> Option<Client> {
    let connection = match listener.accept().await {
        Ok(connection) => connection,
        Err(error) => {
            tracing::warn!(%error, "cannot accept on the ZDS socket");
            tokio::time::sleep(Duration::from_millis(100)).await;
            return None;
        }
    };
    match connection.peer() {
        Ok(peer) if peer.uid == uid => Some(Client {
            connection,
            peer: Arc::new(peer),
            hello: None,
        }),
        Ok(peer) => {
            tracing::warn!(peer.uid, peer.pid, "refused a ZDS client of another user");
            None
        }
        Err(error) => {
            tracing::warn!(%error, "refused a ZDS client that cannot be told");
            None
        }
    }
}

/// Lets a client wait if its hello asks to take over and nobody else waits; refuses it otherwise.
async fn wait_in_turn(mut client: Client, waits: Option<Client>) -> Option<Client> {
    let second = client.peer.pid;
    let hello = client.connection.recv(MAX_PACKET_BYTES);
    if waits.is_none()
        && let Ok(Ok(Some(packet))) = tokio::time::timeout(TAKE_OVER_TIMEOUT, hello).await
        && Session::asks_to_take_over(&packet.bytes)
    {
        tracing::info!(second, "a proxy waits to take over");
        client.hello = Some(packet);
        return Some(client);
    }
    tracing::warn!(second, "refused a second ZDS client");
    waits
}

/// Resolves when the client that waits is gone, or says anything: it has not been asked.
async fn has_closed(waits: &Option<Client>) {
    match waits {
        Some(client) => drop(client.connection.recv(MAX_PACKET_BYTES).await),
        None => std::future::pending().await,
    }
}

/// Resolves when the first client's conversation is over.
async fn has_ended(current: &mut Option<(JoinHandle<()>, Arc<Peer>)>) {
    if let Some((task, _)) = current {
        let _ended = task.await;
    }
}

/// A first client that has closed is seen by its own task, perhaps a moment after the second has connected.
async fn closes(proxy: &watch::Sender<Proxy>) -> bool {
    let mut proxy = proxy.subscribe();
    let gone = proxy.wait_for(|proxy| proxy.peer.is_none());
    tokio::time::timeout(Duration::from_millis(50), gone)
        .await
        .is_ok()
}

async fn one(
    client: Client,
    offers: watch::Receiver<Offers>,
    proxy: watch::Sender<Proxy>,
    stop: CancellationToken,
) {
    /// However the conversation ends, nobody is connected afterwards.
    struct Disconnect(watch::Sender<Proxy>);
    impl Drop for Disconnect {
        fn drop(&mut self) {
            self.0.send_modify(|proxy| {
                *proxy = Proxy {
                    is_awaited: proxy.is_awaited,
                    ..Proxy::default()
                };
            });
        }
    }
    let disconnect = Disconnect(proxy);
    let ended = tokio::select! {
        ended = converse(client, offers, &disconnect.0) => ended,
        () = stop.cancelled() => Ended::Stopped,
    };
    tracing::info!(reason = %ended, "the proxy has gone");
}

async fn converse(
    client: Client,
    mut offers: watch::Receiver<Offers>,
    proxy: &watch::Sender<Proxy>,
) -> Ended {
    match talk(client, &mut offers, proxy).await {
        Ok(never) => match never {},
        Err(ended) => ended,
    }
}

async fn talk(
    client: Client,
    offers: &mut watch::Receiver<Offers>,
    proxy: &watch::Sender<Proxy>,
) -> Result<std::convert::Infallible, Ended> {
    let mut session = Session::default();
    let connection = client.connection;
    let hello = match client.hello {
        Some(hello) => hello,
        None => tokio::time::timeout(HELLO_TIMEOUT, connection.recv(MAX_PACKET_BYTES))
            .await
            .map_err(|_| Ended::TimedOut)??
            .ok_or(Ended::Closed)?,
    };
    session.hello(&hello.bytes)?;
    loop {
        let offered = offers.borrow_and_update().clone();
        let next = match &offered {
            Some(offered) => session.next(now(), offered),
            None => Next::Idle,
        };
        let again = match next {
            Next::Send { bytes, netns } => {
                let netns = netns.as_ref().map(|netns| netns.as_fd());
                connection.send(&bytes, netns.as_slice()).await?;
                let packet =
                    tokio::time::timeout(ANSWER_TIMEOUT, connection.recv(MAX_PACKET_BYTES))
                        .await
                        .map_err(|_| Ended::TimedOut)??
                        .ok_or(Ended::Closed)?;
                session.answer(now(), &packet.bytes)?;
                proxy.send_modify(|proxy| proxy.acknowledged = Arc::new(session.acknowledged()));
                continue;
            }
            Next::At(at) => at,
            Next::Idle => now() + Duration::from_secs(3600),
        };
        tokio::select! {
            changed = offers.changed() => changed.map_err(|_| Ended::Stopped)?,
            () = tokio::time::sleep_until(again.into()) => {}
            // Not asked for anything: only an end can come.
            packet = connection.recv(MAX_PACKET_BYTES) => match packet? {
                None => return Err(Ended::Closed),
                Some(packet) => session.answer(now(), &packet.bytes)?,
            },
        }
    }
}

/// The one clock, which tests may pause.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
