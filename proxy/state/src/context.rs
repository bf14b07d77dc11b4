// SPDX-License-Identifier: Apache-2.0
use crate::{Limits, Recorder, StateHandle, View};
use podveil_ca_client::{Svid, TrustBundle};
use podveil_identity::WorkloadIdentity;
use podveil_model::{Uid, Workload};
use podveil_net::{ConnectError, PodSockets};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// A connection being made.
pub type Dialing<'a> = Pin<Box<dyn Future<Output = Result<TcpStream, ConnectError>> + Send + 'a>>;

/// Makes connections that start in one pod's network namespace.
pub trait Dial: fmt::Debug + Send + Sync + 'static {
    /// Connects to `to`, from the address `from` if it is given: a peer's address is kept towards the application.
    fn dial(&self, from: Option<IpAddr>, to: SocketAddr, within: Duration) -> Dialing<'_>;
}

impl Dial for PodSockets {
    fn dial(&self, from: Option<IpAddr>, to: SocketAddr, within: Duration) -> Dialing<'_> {
        Box::pin(async move {
            match from {
                Some(source) => self.connect_as(source, to, within).await,
                None => self.connect(to, within).await,
            }
        })
    }
}

/// Everything that the paths of one pod are given.
#[derive(Clone, Debug)]
pub struct PodContext {
    pub uid: Uid,
    /// Whom this pod's certificate names.
    pub identity: WorkloadIdentity,
    pub sockets: Arc<dyn Dial>,
    pub state: StateHandle,
    /// This pod's certificate, `None` until the first has been issued.
    pub svid: watch::Receiver<Option<Arc<Svid>>>,
    pub bundle: watch::Receiver<Arc<TrustBundle>>,
    pub limits: Limits,
    pub recorder: Arc<dyn Recorder>,
    /// Stop accepting, let connections end.
    pub drain: CancellationToken,
    /// Close everything now, by reset.
    pub stop: CancellationToken,
}

impl PodContext {
    /// When a connection that is accepted now has been held long enough.
    pub fn hold_deadline(&self) -> Instant {
        Instant::now() + self.limits.hold_bound
    }

    /// This pod's workload, waited for until the deadline: until its addresses are known, where they are told in time.
    pub async fn workload(&self, deadline: Instant) -> Option<Arc<Workload>> {
        let known = |view: &View| view.by_uid(&self.uid).cloned();
        let whole = |view: &View| known(view).filter(|workload| !workload.addresses.is_empty());
        let whole = self.state.wait(deadline, whole).await;
        whole.or_else(|| known(&self.state.view()))
    }

    /// This pod's certificate, waited for until the deadline.
    pub async fn svid(&self, deadline: Instant) -> Option<Arc<Svid>> {
        let mut svid = self.svid.clone();
        let held = tokio::time::timeout_at(deadline, svid.wait_for(Option::is_some)).await;
        held.ok()?.ok()?.clone()
    }
}
