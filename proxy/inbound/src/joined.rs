// SPDX-License-Identifier: Apache-2.0
//! The last stages, common to tunnels and plain connections: permitted, connected, carried, recorded.

use crate::registry::{Entered, Registry};
use crate::rules::{self, Allowed, Facts, Moment, Refused};
use podveil_flow::{
    CloseReason, ConnectionRecord, Direction, DropReason, End, Protection, Verdict,
};
use podveil_model::{PeerAddr, ServiceKey, Workload};
use podveil_net::{Broken, ConnectError, Counters, Duplex, Ended, Side, TcpEnd, relay};
use podveil_state::{PodContext, View};
use std::error::Error;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::time::Instant;

/// What a record says of a connection apart from its outcome.
#[derive(Clone, Debug)]
pub(crate) struct About {
    pub at: Instant,
    pub source: End,
    pub destination: Option<SocketAddr>,
    pub workload: Option<Arc<Workload>>,
    pub hbone: Option<SocketAddr>,
    pub service: Option<ServiceKey>,
    pub protection: Protection,
}

impl About {
    /// A plain connection or a tunnel of which only the peer is known.
    pub fn new(pod: &PodContext, peer: PeerAddr) -> Self {
        let view = pod.state.view();
        Self {
            at: Instant::now(),
            source: End {
                address: Some(peer.0),
                workload: view.by_address(peer.ip()).cloned(),
                identity: None,
            },
            destination: None,
            workload: view.by_uid(&pod.uid).cloned(),
            hbone: None,
            service: None,
            protection: Protection::Plain,
        }
    }

    pub fn record(
        &self,
        pod: &PodContext,
        verdict: Verdict,
        close: CloseReason,
        counters: &Counters,
    ) -> ConnectionRecord {
        let in_tunnel = self.source.identity.is_some();
        ConnectionRecord {
            direction: Direction::Inbound,
            source: self.source.clone(),
            destination: End {
                address: self.destination,
                workload: self.workload.clone(),
                identity: in_tunnel.then(|| pod.identity.clone()),
            },
            hbone: self.hbone,
            service: self.service.clone(),
            protection: self.protection.clone(),
            verdict,
            close,
            received_bytes: counters.a_to_b(),
            sent_bytes: counters.b_to_a(),
            duration: self.at.elapsed(),
        }
    }

    /// Records a connection whose client gave up before it was connected.
    pub fn abandoned(&self, pod: &PodContext) {
        let verdict = Verdict::Allowed { rule: None };
        let close = CloseReason::Abandoned;
        let record = self.record(pod, verdict, close, &Counters::default());
        pod.recorder.closed(&record, None);
    }

    /// Records a connection that was refused.
    pub fn refused(&self, pod: &PodContext, reason: DropReason, error: &dyn Error) {
        let verdict = Verdict::Dropped {
            reason,
            detail: chain(error),
        };
        let record = self.record(pod, verdict, CloseReason::Dropped, &Counters::default());
        pod.recorder.closed(&record, None);
    }
}

/// An error and all its causes as one sentence.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// Looks at the state, and again at each change while that may change the answer, until the deadline.
///
/// # Errors
/// The last refusal.
pub(crate) async fn wait_for<T>(
    pod: &PodContext,
    deadline: Instant,
    look: impl Fn(&View) -> Result<T, Refused>,
) -> Result<T, Refused> {
    let mut last = None;
    let found = pod.state.wait(deadline, |view| match look(view) {
        Ok(found) => Some(Ok(found)),
        Err(refused) if refused.may_change() => {
            if let Some(ip) = refused.asks_for()
                && last.is_none()
            {
                pod.state.ask(ip);
            }
            last = Some(refused);
            None
        }
        Err(refused) => Some(Err(refused)),
    });
    match found.await {
        Some(found) => found,
        None => Err(last.expect("only a refusal is waited on")),
    }
}

/// A connection that the rules allow, and that is told when they no longer do.
#[derive(Debug)]
pub(crate) struct Permitted {
    facts: Facts,
    allowed: Allowed,
    entered: Entered,
}

impl Permitted {
    /// Asks the rules, and again at each change while the answer may be on its way, until the deadline.
    ///
    /// # Errors
    /// The last refusal.
    pub async fn wait(
        pod: &PodContext,
        registry: &Arc<Registry>,
        facts: Facts,
        deadline: Instant,
    ) -> Result<Self, Refused> {
        loop {
            wait_for(pod, deadline, |view| {
                rules::check(view, &facts, Moment::Opening)
            })
            .await?;
            let entered = registry.enter(facts.clone());
            // A change since the answer was not told to the registry for this connection.
            match rules::check(&pod.state.view(), &facts, Moment::Opening) {
                Ok(allowed) => {
                    return Ok(Self {
                        facts,
                        allowed,
                        entered,
                    });
                }
                Err(refused) if refused.may_change() => drop(entered),
                Err(refused) => return Err(refused),
            }
        }
    }

    /// Dials the application, from the peer's address.
    ///
    /// # Errors
    /// Of the dial.
    pub async fn connect(self, pod: &PodContext) -> Result<Connected, ConnectError> {
        let (from, to) = (self.facts.source_ip, self.facts.destination);
        // A pod that reaches itself comes from its own address anyway.
        let from = Some(from).filter(|from| *from != to.ip());
        let application = pod
            .sockets
            .dial(from, to, pod.limits.connect_timeout)
            .await?;
        Ok(Connected {
            application: TcpEnd::new(application),
            allowed: self.allowed,
            entered: self.entered,
        })
    }
}

/// A connection with both its ends.
#[derive(Debug)]
pub(crate) struct Connected {
    application: TcpEnd,
    allowed: Allowed,
    entered: Entered,
}

impl Connected {
    /// The workload that was connected to.
    pub fn workload(&self) -> &Arc<Workload> {
        &self.allowed.workload
    }

    /// Carries bytes until both sides have ended, one breaks, or the rules no longer allow it.
    pub async fn carry(mut self, pod: &PodContext, mut about: About, peer: impl Duplex) {
        about.workload = Some(self.allowed.workload.clone());
        if let (None, Some(peer)) = (&about.source.workload, about.source.address) {
            // It may have been told of since.
            about.source.workload = pod.state.view().by_address(peer.ip()).cloned();
        }
        let counters = Arc::new(Counters::default());
        let verdict = self.allowed.verdict();
        let record = about.record(pod, verdict, CloseReason::Clean, &counters);
        let open = pod.recorder.opened(&record, &counters);
        let revoked = self.entered.revoked();
        let stop = async {
            tokio::select! {
                biased;
                refused = revoked => Some(refused),
                () = pod.stop.cancelled() => None,
            }
        };
        let ended = relay(peer, self.application, &counters, stop).await;
        let close = match ended {
            Ended::Clean => CloseReason::Clean,
            Ended::Broken {
                side: Side::A,
                cause: Broken::TunnelLost,
            } => {
                let view = pod.state.view();
                match (&about.source.workload, about.source.identity.is_some()) {
                    (Some(source), true) if view.by_uid(&source.uid).is_none() => {
                        CloseReason::WorkloadGone
                    }
                    _ => CloseReason::TunnelLost,
                }
            }
            Ended::Broken { side: Side::A, .. } => CloseReason::ResetBySource,
            Ended::Broken { side: Side::B, .. } => CloseReason::ResetByDestination,
            Ended::Stopped(Some(ref refused)) => refused.close(),
            Ended::Stopped(None) if pod.state.view().by_uid(&pod.uid).is_none() => {
                CloseReason::WorkloadGone
            }
            Ended::Stopped(None) => CloseReason::Drained,
        };
        let verdict = match ended {
            Ended::Stopped(Some(refused)) => refused.verdict(),
            _ => record.verdict,
        };
        let ended = ConnectionRecord {
            verdict,
            close,
            received_bytes: counters.a_to_b(),
            sent_bytes: counters.b_to_a(),
            duration: about.at.elapsed(),
            ..record
        };
        pod.recorder.closed(&ended, Some(open));
    }
}
