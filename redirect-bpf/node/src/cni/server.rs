// SPDX-License-Identifier: Apache-2.0
use crate::finder::is_hosts;
use crate::work::chain;
use podveil_cni::wire::{About, Answer, CAPTURE_BOUND, MAX_PACKET_BYTES, Request};
use podveil_netns::seqpacket::{Connection, Listener, Packet, Peer};
use podveil_netns::{NetNs, NetNsError};
use std::fs;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

/// More than the pods that a node starts at once.
const MAX_CLIENTS: usize = 512;
const REQUEST_BOUND: Duration = Duration::from_secs(1);
/// The loop answers by the bound; this is for the case that it does not.
const ANSWER_BOUND: Duration = CAPTURE_BOUND.saturating_add(Duration::from_secs(2));
/// Namespaces in which a process of the node itself is, and none of a container is in all of them.
const NODES_OWN: [&str; 3] = ["net", "pid", "user"];

/// A question of the plugin, on its way to whoever knows.
#[derive(Debug)]
pub struct Ask {
    pub request: Request,
    /// Of a sandbox that starts.
    pub netns: Option<Arc<NetNs>>,
    pub reply: oneshot::Sender<Answer>,
}

#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("its network namespace cannot be used")]
    NetNs(#[from] NetNsError),
    #[error("it comes without a network namespace")]
    NoNetNs,
    #[error("it is in the node's own network namespace")]
    Nodes,
    #[error(
        "podveil-cni and podveil-node do not understand each other: they are of different versions"
    )]
    Request(#[from] serde_json::Error),
}

/// Answers the plugin until `stop`. Only processes of `uid` in the node's own namespaces are answered.
pub async fn serve(listener: Listener, asks: mpsc::Sender<Ask>, uid: u32, stop: CancellationToken) {
    let clients = Arc::new(Semaphore::new(MAX_CLIENTS));
    let accept = async {
        loop {
            let permit = clients.clone().acquire_owned().await;
            let connection = match listener.accept().await {
                Ok(connection) => connection,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept on the CNI plugin's socket");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            if let Err(reason) = connection.peer().and_then(|peer| check(&peer, uid)) {
                tracing::warn!(%reason, "refused a client of the CNI plugin's socket");
                continue;
            }
            let (asks, stop) = (asks.clone(), stop.clone());
            tokio::spawn(async move {
                let _permit = permit;
                if let Some(Err(error)) = stop.run_until_cancelled(answer(&connection, &asks)).await
                {
                    tracing::debug!(%error, "lost a client of the CNI plugin's socket");
                }
            });
        }
    };
    let _stopped: Option<()> = stop.run_until_cancelled(accept).await;
}

/// A container runtime is root on the node itself. A container's root is not, whatever socket it was given.
fn check(peer: &Peer, uid: u32) -> io::Result<()> {
    let refuse = |why: String| Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
    if peer.uid != uid {
        return refuse(format!("user {} is not {uid}", peer.uid));
    }
    for name in NODES_OWN {
        let own = fs::read_link(format!("/proc/self/ns/{name}"))?;
        if fs::read_link(format!("/proc/{}/ns/{name}", peer.pid))? != own {
            return refuse(format!(
                "process {} has a {name} namespace of its own",
                peer.pid
            ));
        }
    }
    match peer.is_alive() {
        true => Ok(()),
        // It was its own number that was looked at only if it lives afterwards.
        false => refuse(format!("process {} has ended", peer.pid)),
    }
}

async fn answer(connection: &Connection, asks: &mpsc::Sender<Ask>) -> io::Result<()> {
    let packet = tokio::time::timeout(REQUEST_BOUND, connection.recv(MAX_PACKET_BYTES)).await??;
    let Some(packet) = packet else { return Ok(()) };
    let answer = match read(packet) {
        Ok((request, netns)) => ask(request, netns, asks).await,
        Err(refused) => Answer::Refused {
            reason: chain(&refused),
        },
    };
    connection.send(&answer.encode(), &[]).await
}

fn read(mut packet: Packet) -> Result<(Request, Option<Arc<NetNs>>), Refused> {
    let request = Request::decode(&packet.bytes)?;
    if request.about != About::Start {
        return Ok((request, None));
    }
    let netns = NetNs::from_fd(packet.fds.pop().ok_or(Refused::NoNetNs)?)?;
    match is_hosts(netns.id())? {
        true => Err(Refused::Nodes),
        false => Ok((request, Some(Arc::new(netns)))),
    }
}

async fn ask(request: Request, netns: Option<Arc<NetNs>>, asks: &mpsc::Sender<Ask>) -> Answer {
    let (reply, replied) = oneshot::channel();
    let ask = Ask {
        request,
        netns,
        reply,
    };
    let asked = async {
        asks.send(ask).await.ok()?;
        replied.await.ok()
    };
    match tokio::time::timeout(ANSWER_BOUND, asked).await {
        Ok(Some(answer)) => answer,
        Ok(None) => refused("the node program is stopping"),
        Err(_) => refused("the node program is too busy to answer"),
    }
}

fn refused(reason: &str) -> Answer {
    let reason = reason.to_owned();
    Answer::Refused { reason }
}
