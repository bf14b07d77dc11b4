// SPDX-License-Identifier: Apache-2.0
use super::Shared;
use crate::metrics::Shown;
use crate::recorder::PodRecorder;
use crate::zds::{PodListeners, WorkloadInfo};
use podveil_ca_client::Held;
use podveil_identity::WorkloadIdentity;
use podveil_inbound::{Inbound, PlainInbound};
use podveil_model::Uid;
use podveil_net::PodSockets;
use podveil_netns::NetNs;
use podveil_outbound::Outbound;
use podveil_state::PodContext;
use std::collections::BTreeSet;
use std::io;
use std::net::TcpListener;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Connections end by reset, which waits for nobody; this bounds what a bug could keep.
const END_BOUND: Duration = Duration::from_secs(5);

/// A pod as reports and the admin page show it.
#[derive(Clone, Debug)]
pub struct PodState {
    pub uid: Uid,
    pub info: WorkloadInfo,
    pub identity: WorkloadIdentity,
    /// Listeners are served and a certificate is held; or why not.
    pub ready: Result<(), Arc<str>>,
    /// Connections open now.
    pub carried: u32,
}

/// One pod that is served.
#[derive(Debug)]
pub(super) struct Pod {
    shared: Arc<Shared>,
    uid: Uid,
    info: WorkloadInfo,
    netns: Arc<NetNs>,
    certificate: Held,
    recorder: Arc<PodRecorder>,
    tasks: TaskTracker,
    stop: CancellationToken,
    serving: Mutex<Serving>,
}

/// The listeners that new connections are taken from.
#[derive(Debug)]
struct Serving {
    sockets: BTreeSet<u64>,
    drain: CancellationToken,
}

impl Pod {
    pub fn start(
        shared: Arc<Shared>,
        uid: Uid,
        info: WorkloadInfo,
        identity: WorkloadIdentity,
        netns: Arc<NetNs>,
        listeners: PodListeners,
        changes: watch::Sender<u64>,
    ) -> Self {
        let certificate = shared.certificates.hold(&identity);
        let serving = Serving {
            sockets: BTreeSet::new(),
            drain: shared.drain.child_token(),
        };
        let pod = Self {
            recorder: Arc::new(PodRecorder::new(shared.traffic.clone())),
            stop: shared.stop.child_token(),
            tasks: TaskTracker::new(),
            serving: Mutex::new(serving),
            certificate,
            shared,
            uid,
            info,
            netns,
        };
        pod.serve_anew(listeners);
        pod.tell_certificates(changes);
        pod
    }

    pub fn is_in(&self, netns: &NetNs) -> bool {
        self.netns.id() == netns.id()
    }

    pub fn identity(&self) -> &WorkloadIdentity {
        self.certificate.identity()
    }

    pub fn carried(&self) -> u32 {
        u32::try_from(self.recorder.live().count()).unwrap_or(u32::MAX)
    }

    /// At most `limit` of the open connections.
    pub fn connections(&self, limit: usize) -> Vec<Shown> {
        self.recorder.live().shown(limit)
    }

    pub fn state(&self) -> PodState {
        let ready = if self.certificate.svid().borrow().is_some() {
            Ok(())
        } else {
            Err("its certificate has not been issued yet".into())
        };
        PodState {
            uid: self.uid.clone(),
            info: self.info.clone(),
            identity: self.identity().clone(),
            ready,
            carried: self.carried(),
        }
    }

    /// Takes new connections from these listeners, and no more from those before, unless they are the same sockets.
    /// Connections that were taken go on.
    pub fn serve_anew(&self, listeners: PodListeners) {
        let mut serving = self.serving.lock().unwrap_or_else(PoisonError::into_inner);
        let sockets = listeners.sockets();
        if sockets == serving.sockets {
            return;
        }
        let before = std::mem::replace(
            &mut *serving,
            Serving {
                sockets,
                drain: self.shared.drain.child_token(),
            },
        );
        before.drain.cancel();
        let context = Arc::new(self.context(serving.drain.clone()));
        let PodListeners {
            outbound,
            inbound_plain,
            inbound_hbone,
        } = listeners;
        let spawn = |listeners: Vec<TcpListener>| self.registered(listeners);
        let (outbound, plain, hbone) =
            (spawn(outbound), spawn(inbound_plain), spawn(inbound_hbone));
        self.tasks.spawn(Outbound::run(context.clone(), outbound));
        let kubelet = self.shared.kubelet.clone();
        self.tasks
            .spawn(PlainInbound::run(context.clone(), kubelet, plain));
        self.tasks.spawn(Inbound::run(context, hbone));
    }

    /// Resolves when the last connection has ended; after a drain.
    pub async fn ended(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Ends every connection now.
    pub async fn end(&self) {
        self.stop.cancel();
        if tokio::time::timeout(END_BOUND, self.ended()).await.is_err() {
            tracing::error!(uid = %self.uid, "a pod's tasks did not end");
        }
    }

    fn context(&self, drain: CancellationToken) -> PodContext {
        let shared = &self.shared;
        PodContext {
            uid: self.uid.clone(),
            identity: self.identity().clone(),
            sockets: Arc::new(PodSockets::new(self.netns.clone(), shared.mark)),
            state: shared.state.clone(),
            svid: self.certificate.svid(),
            bundle: shared.bundle.clone(),
            limits: shared.limits.clone(),
            recorder: self.recorder.clone(),
            drain,
            stop: self.stop.clone(),
        }
    }

    /// Gives the listeners to the runtime. One that it cannot watch is left out, and said so.
    fn registered(&self, listeners: Vec<TcpListener>) -> Vec<tokio::net::TcpListener> {
        let register = |listener: TcpListener| -> io::Result<tokio::net::TcpListener> {
            listener.set_nonblocking(true)?;
            tokio::net::TcpListener::from_std(listener)
        };
        let log = |error: &io::Error| tracing::error!(uid = %self.uid, %error, "a listener cannot be watched");
        listeners
            .into_iter()
            .filter_map(|listener| register(listener).inspect_err(log).ok())
            .collect()
    }

    /// A pod becomes ready when its certificate is there, and reports are made on changes.
    fn tell_certificates(&self, changes: watch::Sender<u64>) {
        let mut svid = self.certificate.svid();
        let stop = self.stop.clone();
        let drain = self.shared.drain.clone();
        self.tasks.spawn(async move {
            let tell = async {
                while svid.changed().await.is_ok() {
                    changes.send_modify(|number| *number += 1);
                }
                std::future::pending::<()>().await;
            };
            tokio::select! {
                () = stop.cancelled() => {}
                () = drain.cancelled() => {}
                () = tell => {}
            }
        });
    }
}
