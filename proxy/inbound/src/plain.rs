// SPDX-License-Identifier: Apache-2.0
use crate::joined::{About, Connected, Permitted};
use crate::registry::Registry;
use crate::rules::{Facts, Source};
use crate::target::{self, NotOurs};
use podveil_flow::DropReason;
use podveil_model::{INBOUND_PORT, LocalAddr, OriginalDst, PeerAddr, Workload};
use podveil_net::{ConnectError, Duplex, NoOriginalDst, TcpEnd, original_dst, prepare_application};
use podveil_state::{PodContext, serve};
use std::fmt;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::task::TaskTracker;

/// Tells the kubelet's own connections from all others.
pub trait Kubelet: fmt::Debug + Send + Sync + 'static {
    /// Is the connection from `peer` to `local` (the pod's own address and port, as they were dialled) one that this node's
    /// own kubelet opened? Asked once for each plain connection to a port that the pod's spec names for probes, on the
    /// connection's task: a few system calls, no waiting. Where it cannot be told the answer is no.
    fn is_probe(&self, peer: SocketAddr, local: SocketAddr) -> bool;
}

/// Recognises no kubelet: where there is none, or nobody can tell.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoKubelet;

impl Kubelet for NoKubelet {
    fn is_probe(&self, _: SocketAddr, _: SocketAddr) -> bool {
        false
    }
}

/// The path of plain connections to one pod, captured to 15006.
#[derive(Debug)]
pub struct PlainInbound {
    pod: Arc<PodContext>,
    kubelet: Arc<dyn Kubelet>,
    registry: Arc<Registry>,
    held: Arc<Semaphore>,
    living: Arc<Semaphore>,
    tasks: TaskTracker,
}

/// A captured connection. From here on dropping it is a reset.
#[derive(Debug)]
pub(crate) struct Accepted {
    end: TcpEnd,
    ends: Ends,
}

/// What the kernel says about it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ends {
    pub peer: PeerAddr,
    pub local: LocalAddr,
    pub original: OriginalDst,
}

/// Why a plain connection is refused, apart from the rules.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("the accepted socket failed")]
    Socket(#[source] io::Error),
    #[error("no original destination")]
    NoOriginalDst(#[source] NoOriginalDst),
    #[error("this pod is at its bound of connections")]
    Limit,
    #[error("this pod's workload is not known here")]
    WorkloadNotKnown,
    #[error("not for this pod")]
    NotOurs(#[source] NotOurs),
    #[error(transparent)]
    Rules(crate::rules::Refused),
    #[error("the application did not take the connection")]
    Connect(#[source] ConnectError),
}

impl Refused {
    fn reason(&self) -> DropReason {
        match self {
            Self::Socket(_) | Self::Connect(_) => DropReason::ConnectFailed,
            Self::NoOriginalDst(_) => DropReason::NoOriginalDestination,
            Self::Limit => DropReason::LimitReached,
            Self::WorkloadNotKnown => DropReason::WorkloadNotKnown,
            Self::NotOurs(_) => DropReason::BadTarget,
            Self::Rules(refused) => refused.reason(),
        }
    }
}

impl Accepted {
    fn from_listener(stream: TcpStream, peer: SocketAddr) -> Result<Self, Refused> {
        prepare_application(&stream).map_err(Refused::Socket)?;
        let local = LocalAddr(stream.local_addr().map_err(Refused::Socket)?);
        let original = original_dst(&stream, INBOUND_PORT).map_err(Refused::NoOriginalDst)?;
        let ends = Ends {
            peer: PeerAddr(peer),
            local,
            original,
        };
        Ok(Self::new(stream, ends))
    }

    /// `stream` is prepared.
    pub fn new(stream: TcpStream, ends: Ends) -> Self {
        Self {
            end: TcpEnd::new(stream),
            ends,
        }
    }
}

impl PlainInbound {
    /// Serves captured plain connections until `drain` or `stop`; returns when the last connection is over.
    pub async fn run(pod: Arc<PodContext>, kubelet: Arc<dyn Kubelet>, listeners: Vec<TcpListener>) {
        let inbound = Arc::new(Self::new(pod.clone(), kubelet));
        let taking = inbound.clone();
        let accepting = serve(&pod, listeners, &inbound.tasks, move |stream, peer| {
            taking.take(stream, peer);
        });
        inbound.registry.watch_while(&pod.state, accepting).await;
    }

    pub(crate) fn new(pod: Arc<PodContext>, kubelet: Arc<dyn Kubelet>) -> Self {
        Self {
            kubelet,
            registry: Arc::default(),
            held: Arc::new(Semaphore::new(pod.limits.max_held)),
            living: Arc::new(Semaphore::new(pod.limits.max_connections)),
            tasks: TaskTracker::new(),
            pod,
        }
    }

    fn take(self: &Arc<Self>, stream: TcpStream, peer: SocketAddr) {
        let permits = (
            self.living.clone().try_acquire_owned(),
            self.held.clone().try_acquire_owned(),
        );
        let accepted = match permits {
            (Ok(living), Ok(held)) => {
                Accepted::from_listener(stream, peer).map(|accepted| (accepted, living, held))
            }
            _ => {
                // Prepared, so that dropping it is a reset.
                let _dropped_anyway = prepare_application(&stream);
                Err(Refused::Limit)
            }
        };
        match accepted {
            Ok((accepted, living, held)) => {
                let inbound = self.clone();
                self.tasks.spawn(async move {
                    let _living = living;
                    inbound.serve(accepted, held).await;
                });
            }
            Err(refused) => {
                let about = About::new(&self.pod, PeerAddr(peer));
                about.refused(&self.pod, refused.reason(), &refused);
            }
        }
    }

    pub(crate) async fn serve(&self, accepted: Accepted, held: OwnedSemaphorePermit) {
        let pod = &*self.pod;
        let Accepted { mut end, ends } = accepted;
        let mut about = About::new(pod, ends.peer);
        about.destination = Some(ends.original.0);
        // Whether it may, or only who it is.
        (pod.state).use_all(pod.state.view().lookup_of_peer(ends.peer.ip()));
        let connected = tokio::select! {
            biased;
            () = pod.stop.cancelled() => return,
            // The client gave up while it was held.
            _ = poll_fn(|cx| end.poll_broken(cx)) => return about.abandoned(pod),
            connected = self.connect(ends) => connected,
        };
        drop(held);
        match connected {
            Ok(connected) => connected.carry(pod, about, end).await,
            Err(refused) => {
                drop(end);
                about.refused(pod, refused.reason(), &refused);
            }
        }
    }

    fn source(&self, peer: PeerAddr, destination: SocketAddr, workload: &Workload) -> Source {
        let is_probe = workload.probe_ports.contains(&destination.port())
            && self.kubelet.is_probe(peer.0, destination);
        if is_probe {
            Source::Kubelet
        } else {
            Source::Plain
        }
    }

    async fn connect(&self, ends: Ends) -> Result<Connected, Refused> {
        let pod = &*self.pod;
        let deadline = pod.hold_deadline();
        let workload = pod.workload(deadline).await;
        let workload = workload.ok_or(Refused::WorkloadNotKnown)?;
        let destination =
            target::of_plain(ends.original, ends.local, &workload).map_err(Refused::NotOurs)?;
        let facts = Facts {
            uid: pod.uid.clone(),
            source_ip: ends.peer.ip(),
            source: self.source(ends.peer, destination, &workload),
            destination,
        };
        let permitted = Permitted::wait(pod, &self.registry, facts, deadline)
            .await
            .map_err(Refused::Rules)?;
        permitted.connect(pod).await.map_err(Refused::Connect)
    }
}

#[cfg(test)]
#[path = "plain_tests.rs"]
mod tests;
