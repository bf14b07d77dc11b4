// SPDX-License-Identifier: Apache-2.0
//! From an accepted connection to the far end that carries it.

use crate::accepted::Facts;
use crate::pool::{LeaseError, Pool};
use crate::refused::Refused;
use crate::rules::check_plain;
use crate::tunnels::{Connector, Credentials, TunnelKey};
use http::StatusCode;
use podveil_flow::Protection;
use podveil_hbone::{Baggage, ConnectRequest, Forwarded, HboneStream, StreamError, traceparent};
use podveil_identity::WorkloadIdentity;
use podveil_model::{Answer, Mode, ServiceKey, Unresolved, Upstream, Workload};
use podveil_net::TcpEnd;
use podveil_state::{Affinity, Pin, PodContext, View};
use podveil_tls::ConfigCache;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, timeout, timeout_at};

/// Tunnels tried at once for one endpoint. A second one is worth it because the first may have died unnoticed; further
/// ones come after a pause.
const TUNNELS_AT_ONCE: usize = 2;
/// First and longest pause between two rounds of tries, while a connection is held.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// An endpoint that is reached at all has a tunnel before this: three lost packets' time.
const SHORTEST_TURN: Duration = Duration::from_secs(1);

/// What carries a connection onward.
#[derive(Debug)]
pub(crate) enum Far {
    Plain(TcpEnd),
    Tunnel(HboneStream),
}

/// What is known about the connection's far side so far; complete once it is connected. A refused connection is
/// recorded with what was known by then.
#[derive(Clone, Debug)]
pub(crate) struct Route {
    pub source: Option<Arc<Workload>>,
    pub destination: SocketAddr,
    pub workload: Option<Arc<Workload>>,
    pub service: Option<ServiceKey>,
    pub hbone: Option<SocketAddr>,
    /// What the destination proved.
    pub identity: Option<WorkloadIdentity>,
    pub protection: Protection,
    /// Holds the workload from before it is dialled.
    pub pin: Option<Arc<Pin>>,
}

impl Route {
    pub fn new(facts: &Facts) -> Self {
        Self {
            source: None,
            destination: facts.original.0,
            workload: None,
            service: None,
            hbone: None,
            identity: None,
            protection: Protection::Plain,
            pin: None,
        }
    }

    fn toward(&mut self, upstream: &Upstream, hbone: Option<SocketAddr>, pin: Option<Pin>) {
        self.pin = pin.map(Arc::new);
        self.destination = upstream.address;
        self.workload = Some(upstream.workload.clone());
        self.service = upstream.service.clone();
        self.hbone = hbone;
    }
}

/// The ways out of one pod.
#[derive(Debug)]
pub(crate) struct Ways {
    pub pod: Arc<PodContext>,
    pub pool: Arc<Pool<Connector>>,
    pub tls: ConfigCache,
    /// What this pod keeps of services with session affinity.
    pub affinity: Affinity,
}

impl Ways {
    /// Finds a far end for the connection, holding it while that may still succeed.
    ///
    /// # Errors
    /// [`Refused`], the last one where several ways were tried.
    pub async fn open(
        &self,
        facts: &Facts,
        deadline: Instant,
        route: &mut Route,
    ) -> Result<Far, Refused> {
        let not_known = || Refused::WorkloadNotKnown {
            uid: self.pod.uid.clone(),
        };
        route.source = self.pod.workload(deadline).await;
        let first = route.source.clone().ok_or_else(not_known)?;
        facts.check(&first)?;
        let mut changed = self.pod.state.changed();
        let mut pause = PAUSE.0;
        loop {
            changed.mark_unchanged();
            let view = self.pod.state.view();
            let source = view.by_uid(&self.pod.uid).ok_or_else(not_known)?;
            let refused = match self.round(&view, source, facts, deadline, route).await {
                Ok(far) => {
                    self.keep(&view, route);
                    return Ok(far);
                }
                Err(refused) => {
                    let again =
                        refused.may_change() || self.is_now_enrolled(&refused, &view, facts);
                    if !again || Instant::now() >= deadline {
                        return Err(refused);
                    }
                    refused
                }
            };
            tokio::select! {
                _ = changed.changed() => {}
                () = tokio::time::sleep(pause) => pause = (pause * 2).min(PAUSE.1),
                () = tokio::time::sleep_until(deadline) => return Err(refused),
            }
        }
    }

    /// Remembers the endpoint, for a service with session affinity.
    fn keep(&self, view: &View, route: &Route) {
        if let (Some(service), Some(workload)) = (&route.service, &route.workload)
            && let Some(service) = view.service(service)
        {
            self.affinity.keep(service, &workload.uid);
        }
    }

    /// Was it refused in plain because the destination began to take tunnels only while it was dialled?
    fn is_now_enrolled(&self, refused: &Refused, then: &Arc<View>, facts: &Facts) -> bool {
        let now = self.pod.state.view();
        matches!(refused, Refused::Connect(_))
            && !Arc::ptr_eq(then, &now)
            && now.by_uid(&self.pod.uid).is_some_and(|source| {
                matches!(now.resolve(source, facts.original), Answer::Enrolled(_))
            })
    }

    /// One look at the state, and one try of what it offers.
    async fn round(
        &self,
        view: &View,
        source: &Arc<Workload>,
        facts: &Facts,
        deadline: Instant,
        route: &mut Route,
    ) -> Result<Far, Refused> {
        self.pod.state.use_all(view.lookups(facts.original.0));
        let answer = view.resolve_with(source, facts.original, &self.affinity);
        check_plain(view, source, facts.original, &answer).map_err(Refused::Plain)?;
        match answer {
            Answer::Enrolled(upstreams) => match self.credentials(source, deadline).await {
                Some(credentials) => {
                    self.tunnel(source, facts, &upstreams, credentials, deadline, route)
                        .await
                }
                // Not announced: nobody expects a tunnel of it, and it may not have had a certificate yet.
                None if !source.stage.is_announced() && source.mode == Mode::Permissive => {
                    self.plain(&upstreams, route).await
                }
                None => Err(Refused::NoCertificate),
            },
            Answer::Plain { upstreams, .. } => self.plain(&upstreams, route).await,
            Answer::Outside => self.dial(facts.original.0).await,
            Answer::NotKnown(unresolved) => {
                if let Unresolved::Address { ip } = unresolved {
                    self.pod.state.ask(ip);
                }
                Err(Refused::Unresolved(unresolved))
            }
        }
    }

    /// Our certificate and trust as they are now. An announced workload's certificate is waited for.
    async fn credentials(&self, source: &Workload, deadline: Instant) -> Option<Credentials> {
        if let Some(current) = self.current() {
            return Some(current);
        }
        if source.stage.is_announced() || source.mode == Mode::Strict {
            self.pod.svid(deadline).await?;
        }
        self.current()
    }

    /// Our certificate and trust, if there is a certificate.
    pub fn current(&self) -> Option<Credentials> {
        let svid = self.pod.svid.borrow().clone()?;
        let bundle = self.pod.bundle.borrow().clone();
        Some(Credentials(self.tls.configs(&svid, &bundle)))
    }

    async fn tunnel(
        &self,
        source: &Workload,
        facts: &Facts,
        upstreams: &[Upstream],
        credentials: Credentials,
        deadline: Instant,
        route: &mut Route,
    ) -> Result<Far, Refused> {
        let mut last = None;
        for (index, upstream) in upstreams.iter().enumerate() {
            let until = turn(Instant::now(), deadline, index + 1 == upstreams.len());
            let target = upstream.hbone();
            route.toward(
                upstream,
                Some(target.tunnel),
                self.pod.state.pin(&upstream.workload.uid),
            );
            let key = TunnelKey {
                uid: upstream.workload.uid.clone(),
                address: target.tunnel,
                expected: upstream.workload.identity.clone(),
                credentials: credentials.clone(),
            };
            for _ in 0..TUNNELS_AT_ONCE {
                let stream = self.stream(&key, source, facts, upstream, until, route);
                let refused = match stream.await {
                    Ok(stream) => return Ok(Far::Tunnel(stream)),
                    Err(refused) => refused,
                };
                let moves = matches!(&refused, Refused::Stream(error) if error.may_move());
                if is_answer(&refused) {
                    return Err(refused);
                }
                last = Some(refused);
                if !moves {
                    break;
                }
            }
        }
        Err(last.expect("an answer has at least one upstream"))
    }

    async fn stream(
        &self,
        key: &TunnelKey,
        source: &Workload,
        facts: &Facts,
        upstream: &Upstream,
        until: Instant,
        route: &mut Route,
    ) -> Result<HboneStream, Refused> {
        // The steps of making a tunnel have bounds of their own, and go on for others when this connection is given up.
        let began = Instant::now();
        let leased = timeout_at(until, self.pool.lease(key)).await;
        let (tunnel, slot) = match leased {
            Ok(Ok(leased)) => leased,
            Ok(Err(LeaseError::Failed(error))) => return Err(Refused::Tunnel(error)),
            Ok(Err(LeaseError::Limit)) => {
                return Err(Refused::Limit {
                    what: "tunnels (max_tunnels_per_pod)",
                });
            }
            Ok(Err(LeaseError::Stopped)) => return Err(Refused::Stopping),
            Err(_) => {
                let after = began.elapsed();
                return Err(Refused::NoTunnel { after });
            }
        };
        let peer = tunnel.peer.clone();
        route.identity = Some(peer.identity.clone());
        route.protection = Protection::MutualTls {
            cipher: peer.cipher,
            key_exchange: peer.key_exchange,
        };
        let service = upstream.service.as_ref();
        let request = ConnectRequest {
            authority: upstream.address,
            baggage: Baggage::from(source).to_header(),
            forwarded: Forwarded {
                source: Some(facts.peer.0),
                host: service.map(|service| service.hostname.to_string()),
            }
            .to_header(),
            traceparent: Some(traceparent(rand::random(), rand::random())),
        };
        let after = self.pod.limits.connect_response_timeout;
        match timeout(after, tunnel.tunnel().connect(slot, request)).await {
            Ok(Ok((stream, _headers))) => Ok(stream),
            Ok(Err(error)) => Err(Refused::Stream(error)),
            Err(_) => Err(Refused::NoAnswer { after }),
        }
    }

    async fn plain(&self, upstreams: &[Upstream], route: &mut Route) -> Result<Far, Refused> {
        let mut last = None;
        for upstream in upstreams {
            route.toward(upstream, None, self.pod.state.pin(&upstream.workload.uid));
            match self.dial(upstream.address).await {
                Ok(far) => return Ok(far),
                Err(refused) => last = Some(refused),
            }
        }
        Err(last.expect("an answer has at least one upstream"))
    }

    async fn dial(&self, destination: SocketAddr) -> Result<Far, Refused> {
        let within = self.pod.limits.connect_timeout;
        let dialled = self.pod.sockets.dial(None, destination, within).await;
        Ok(Far::Plain(TcpEnd::new(dialled.map_err(Refused::Connect)?)))
    }
}

/// Until when one endpoint's tunnel is waited for: half of what is left of the hold bound, so that one that is silent
/// leaves time for the others; all of it for the last.
fn turn(now: Instant, deadline: Instant, is_last: bool) -> Instant {
    let left = deadline.saturating_duration_since(now);
    match is_last {
        true => deadline,
        false => now + (left / 2).max(SHORTEST_TURN).min(left),
    }
}

/// The destination has spoken: another endpoint of the service would not be asked after it. 503 is the one answer that
/// says only that this endpoint cannot.
fn is_answer(refused: &Refused) -> bool {
    match refused {
        Refused::Limit { .. } | Refused::Stopping => true,
        Refused::Stream(StreamError::Refused { status }) => {
            *status != StatusCode::SERVICE_UNAVAILABLE
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_endpoint_leaves_time_for_the_others_within_the_hold_bound() {
        let began = Instant::now();
        let deadline = began + Duration::from_secs(5);
        let at = |millis| began + Duration::from_millis(millis);
        assert_eq!(turn(at(0), deadline, false), at(2500));
        assert_eq!(turn(at(2500), deadline, false), at(3750));
        assert_eq!(turn(at(3750), deadline, false), at(4750));
        assert_eq!(turn(at(4750), deadline, false), deadline);
        assert_eq!(turn(at(4750), deadline, true), deadline);
        assert_eq!(turn(at(6000), deadline, false), at(6000));
    }
}
