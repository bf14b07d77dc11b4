// SPDX-License-Identifier: Apache-2.0
use crate::accepted::{Accepted, Facts};
use crate::connect::{Far, Route, Ways};
use crate::pool::Pool;
use crate::refused::Refused;
use crate::tunnels::Connector;
use podveil_flow::{CloseReason, ConnectionRecord, Direction, End, Verdict};
use podveil_model::{OriginalDst, PeerAddr, is_verification};
use podveil_net::{Broken, Counters, Duplex, Ended, Side, TcpEnd, prepare_application, relay};
use podveil_state::{Affinity, PodContext, serve};
use podveil_tls::ConfigCache;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// How often idle tunnels are looked for.
const SWEEP: Duration = Duration::from_secs(5);

/// The path of one pod's captured connections.
#[derive(Debug)]
pub struct Outbound {
    pod: Arc<PodContext>,
    ways: Ways,
    /// Connections accepted and not yet joined to a far end.
    held: Arc<Semaphore>,
    /// All connections.
    living: Arc<Semaphore>,
    tasks: TaskTracker,
}

impl Outbound {
    /// Serves captured connections until `drain` or `stop`; returns when the last connection and tunnel are over.
    pub async fn run(pod: Arc<PodContext>, listeners: Vec<TcpListener>) {
        let tunnels = TaskTracker::new();
        let outbound = Arc::new(Self::new(pod.clone(), &tunnels));
        let closing = CancellationToken::new();
        let maintenance = tokio::spawn(outbound.clone().maintain(closing.clone()));

        let taking = outbound.clone();
        serve(&pod, listeners, &outbound.tasks, move |stream, peer| {
            taking.take(stream, peer);
        })
        .await;

        // No connection is left to use a tunnel.
        closing.cancel();
        let _ended = maintenance.await;
        drop(outbound);
        tunnels.close();
        tunnels.wait().await;
    }

    pub(crate) fn new(pod: Arc<PodContext>, tunnels: &TaskTracker) -> Self {
        let limits = &pod.limits;
        let connector = Connector {
            pod: pod.clone(),
            tasks: tunnels.clone(),
        };
        let pool = Pool::new(
            connector,
            limits.max_tunnels,
            limits.tunnel_idle,
            tunnels.clone(),
            pod.stop.clone(),
        );
        Self {
            held: Arc::new(Semaphore::new(limits.max_held)),
            living: Arc::new(Semaphore::new(limits.max_connections)),
            tasks: TaskTracker::new(),
            ways: Ways {
                pod: pod.clone(),
                pool,
                tls: ConfigCache::default(),
                affinity: Affinity::default(),
            },
            pod,
        }
    }

    /// Holds the tunnels against every change of the state, the certificate and the trust bundle.
    async fn maintain(self: Arc<Self>, closing: CancellationToken) {
        let mut changed = self.pod.state.changed();
        let mut svid = self.pod.svid.clone();
        let mut bundle = self.pod.bundle.clone();
        let mut sweep = tokio::time::interval(SWEEP);
        sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            // A sender that is gone changes nothing any more.
            tokio::select! {
                () = closing.cancelled() => return,
                Ok(()) = changed.changed() => {}
                Ok(()) = svid.changed() => {}
                Ok(()) = bundle.changed() => {}
                now = sweep.tick() => self.ways.pool.sweep(now),
            }
            let view = self.pod.state.view();
            let current = self.ways.current();
            self.ways
                .pool
                .review(|key| key.fate(&view, &self.pod.uid, current.as_ref()));
        }
    }

    fn take(self: &Arc<Self>, stream: TcpStream, peer: SocketAddr) {
        let (living, held) = match self.places() {
            Ok(places) => places,
            Err(refused) => {
                // Prepared, so that dropping it is a reset.
                let _dropped_anyway = prepare_application(&stream);
                self.record_early(peer, &refused);
                return;
            }
        };
        match Accepted::from_listener(stream, peer) {
            // Reset: that it came here is all that was to be known.
            Ok(accepted) if is_verification(accepted.facts.original.0) => {}
            Ok(accepted) => {
                let outbound = self.clone();
                self.tasks.spawn(async move {
                    let _living = living;
                    outbound.carry(accepted, held).await;
                });
            }
            Err(refused) => self.record_early(peer, &refused),
        }
    }

    /// One among all connections, and one among those that are held.
    ///
    /// # Errors
    /// [`Refused::Limit`], with the key of the bound.
    fn places(&self) -> Result<(OwnedSemaphorePermit, OwnedSemaphorePermit), Refused> {
        let place = |places: &Arc<Semaphore>, what| {
            let place = places.clone().try_acquire_owned();
            place.map_err(|_| Refused::Limit { what })
        };
        Ok((
            place(&self.living, "connections (max_connections_per_pod)")?,
            place(&self.held, "held connections (max_held_per_pod)")?,
        ))
    }

    pub(crate) async fn carry(&self, accepted: Accepted, held: OwnedSemaphorePermit) {
        let Accepted { mut end, facts } = accepted;
        let mut route = Route::new(&facts);
        let deadline = facts.at + self.pod.limits.hold_bound;
        let opened = tokio::select! {
            biased;
            () = self.pod.stop.cancelled() => Err(Some(Refused::Stopping)),
            // The application gave up while it was held.
            _ = poll_fn(|cx| end.poll_broken(cx)) => Err(None),
            opened = self.ways.open(&facts, deadline, &mut route) => opened.map_err(Some),
        };
        drop(held);
        let far = match opened {
            Ok(far) => far,
            Err(refused) => {
                drop(end);
                let (verdict, close) = match refused {
                    Some(refused) => (refused.verdict(), CloseReason::Dropped),
                    None => (Verdict::Allowed { rule: None }, CloseReason::Abandoned),
                };
                let record = self.record(&facts, &route, verdict, close, &Counters::default());
                self.pod.recorder.closed(&record, None);
                return;
            }
        };
        let counters = Arc::new(Counters::default());
        let allowed = Verdict::Allowed { rule: None };
        let record = self.record(&facts, &route, allowed, CloseReason::Clean, &counters);
        let open = self.pod.recorder.opened(&record, &counters);
        let ended = match far {
            Far::Plain(far) => self.join(end, far, &counters).await,
            Far::Tunnel(far) => self.join(end, far, &counters).await,
        };
        let close = self.close_reason(ended, &route);
        let ended = ConnectionRecord {
            close,
            received_bytes: counters.a_to_b(),
            sent_bytes: counters.b_to_a(),
            duration: facts.at.elapsed(),
            ..record
        };
        self.pod.recorder.closed(&ended, Some(open));
    }

    async fn join(&self, near: TcpEnd, far: impl Duplex, counters: &Counters) -> Ended<()> {
        relay(near, far, counters, self.pod.stop.cancelled()).await
    }

    fn close_reason(&self, ended: Ended<()>, route: &Route) -> CloseReason {
        let gone = || {
            let view = self.pod.state.view();
            let known = |uid| view.by_uid(uid).is_some();
            let destination = route.workload.as_ref();
            !known(&self.pod.uid) || destination.is_some_and(|workload| !known(&workload.uid))
        };
        match ended {
            Ended::Clean => CloseReason::Clean,
            Ended::Stopped(()) if gone() => CloseReason::WorkloadGone,
            Ended::Stopped(()) => CloseReason::Drained,
            Ended::Broken { side: Side::A, .. } => CloseReason::ResetBySource,
            Ended::Broken {
                side: Side::B,
                cause: Broken::TunnelLost,
            } if gone() => CloseReason::WorkloadGone,
            Ended::Broken {
                side: Side::B,
                cause: Broken::TunnelLost,
            } => CloseReason::TunnelLost,
            Ended::Broken { side: Side::B, .. } => CloseReason::ResetByDestination,
        }
    }

    fn record(
        &self,
        facts: &Facts,
        route: &Route,
        verdict: Verdict,
        close: CloseReason,
        counters: &Counters,
    ) -> ConnectionRecord {
        let in_tunnel = route.identity.is_some();
        ConnectionRecord {
            direction: Direction::Outbound,
            source: End {
                address: Some(facts.peer.0),
                workload: route.source.clone(),
                identity: in_tunnel.then(|| self.pod.identity.clone()),
            },
            destination: End {
                address: Some(route.destination),
                workload: route.workload.clone(),
                identity: route.identity.clone(),
            },
            hbone: route.hbone,
            service: route.service.clone(),
            protection: route.protection.clone(),
            verdict,
            close,
            received_bytes: counters.a_to_b(),
            sent_bytes: counters.b_to_a(),
            duration: facts.at.elapsed(),
        }
    }

    /// Records a connection that was refused before anything but its peer was known.
    fn record_early(&self, peer: SocketAddr, refused: &Refused) {
        let facts = Facts {
            peer: PeerAddr(peer),
            original: OriginalDst(peer),
            at: Instant::now(),
        };
        let mut record = self.record(
            &facts,
            &Route::new(&facts),
            refused.verdict(),
            CloseReason::Dropped,
            &Counters::default(),
        );
        record.destination.address = None;
        self.pod.recorder.closed(&record, None);
    }
}

#[cfg(test)]
#[path = "path_tests.rs"]
mod tests;
