// SPDX-License-Identifier: Apache-2.0
mod bundles;
mod files;
mod own_svid;

use crate::{Credentials, Svid, TrustBundle};
use podveil_identity::{ProgramIdentity, TrustDomain};
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Which of Podveil's processes this is, as the CA lists the consumers of a bundle.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Module {
    /// The controller, which is no module of a node.
    Controller,
    Proxy,
    Redirect,
}

#[derive(Clone, Debug)]
pub struct ProgramConfig {
    pub trust_domain: TrustDomain,
    pub identity: ProgramIdentity,
    /// `host:port`
    pub ca_address: String,
    /// Read at each use, so that a projected token may change.
    pub token_path: PathBuf,
    /// PEM. Trusted for first contact, and again when the CA cannot be reached by the bundle in use.
    pub bootstrap_bundle: PathBuf,
    /// `bundle.pem` is kept here: roots only, never a key.
    pub state_dir: PathBuf,
    pub module: Module,
}

/// This program's own SVID and the trust bundle, kept fresh by one task.
#[derive(Clone, Debug)]
pub struct ProgramCredentials {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    trust_domain: TrustDomain,
    credentials: watch::Sender<Option<Arc<Credentials>>>,
    bundle: watch::Sender<Arc<TrustBundle>>,
    /// The lowest among the workloads' certificates, from [`crate::WorkloadCertificates`].
    workload_generation: watch::Sender<Option<u64>>,
    last_error: watch::Sender<Option<String>>,
}

impl ProgramCredentials {
    /// Returns at once; the task tries until it has an SVID, and ends with `stop`.
    pub fn start(config: ProgramConfig, stop: CancellationToken) -> Self {
        let this = Self {
            shared: Arc::new(Shared::new(config.trust_domain.clone())),
        };
        let kept = this.clone();
        // Once, and not whenever something is stored: a folder that was removed at the end of an uninstallation stays so.
        if let Err(error) = std::fs::create_dir_all(&config.state_dir) {
            tracing::error!(%error, "nothing can be stored in the state directory");
        }
        tokio::spawn(async move {
            let keep = async {
                tokio::join!(
                    own_svid::keep(&config, &kept),
                    bundles::keep(&config, &kept)
                )
            };
            tokio::select! {
                () = stop.cancelled() => {}
                _ = keep => {}
            }
        });
        this
    }

    /// Credentials that nobody renews: for tests, and for the CA, which issues its own.
    pub fn fixed(credentials: Credentials) -> Self {
        let this = Self {
            shared: Arc::new(Shared::new(credentials.bundle.trust_domain.clone())),
        };
        this.replace(credentials);
        this
    }

    /// Puts other credentials in use, see [`ProgramCredentials::fixed`].
    pub fn replace(&self, credentials: Credentials) {
        self.shared
            .use_svid(credentials.svid, Some(credentials.bundle));
    }

    /// Waits for the first SVID.
    pub async fn ready(&self) -> Arc<Credentials> {
        let mut credentials = self.subscribe();
        let ready = credentials.wait_for(Option::is_some).await;
        ready
            .expect("the sender is in `self`")
            .clone()
            .expect("waited for it")
    }

    pub fn current(&self) -> Option<Arc<Credentials>> {
        self.shared.credentials.borrow().clone()
    }

    pub fn subscribe(&self) -> watch::Receiver<Option<Arc<Credentials>>> {
        self.shared.credentials.subscribe()
    }

    /// The bundle in use; empty (nobody is trusted) until the first one is known.
    pub fn bundle(&self) -> watch::Receiver<Arc<TrustBundle>> {
        self.shared.bundle.subscribe()
    }

    /// Why the newest attempt to have an SVID failed, with all its causes; `None` inside if it did not.
    pub fn last_error(&self) -> watch::Receiver<Option<String>> {
        self.shared.last_error.subscribe()
    }

    /// The lowest generation among the certificates that this process still serves, its workloads' included.
    pub fn lowest_generation(&self) -> u64 {
        let own = self.current().map(|current| current.svid.generation());
        let workloads = *self.shared.workload_generation.borrow();
        own.into_iter().chain(workloads).min().unwrap_or(0)
    }

    pub(crate) fn report_workload_generation(&self, lowest: Option<u64>) {
        self.shared.workload_generation.send_if_modified(|held| {
            let changed = *held != lowest;
            *held = lowest;
            changed
        });
    }

    pub fn trust_domain(&self) -> &TrustDomain {
        &self.shared.trust_domain
    }
}

impl Shared {
    fn new(trust_domain: TrustDomain) -> Self {
        Self {
            credentials: watch::Sender::new(None),
            bundle: watch::Sender::new(Arc::new(TrustBundle::empty(trust_domain.clone()))),
            workload_generation: watch::Sender::new(None),
            last_error: watch::Sender::new(None),
            trust_domain,
        }
    }

    /// INVARIANT: `bundle` is replaced before `credentials` is looked at, here and in `use_svid`, and pairs are made
    /// under the lock of `credentials` only. So the last pair made has the newest bundle, whichever came first.
    fn use_bundle(&self, bundle: Arc<TrustBundle>) {
        self.bundle.send_replace(bundle);
        self.credentials.send_if_modified(|current| {
            let Some(svid) = current.as_ref().map(|current| current.svid.clone()) else {
                return false;
            };
            *current = Some(self.pair(svid));
            true
        });
    }

    fn use_svid(&self, svid: Arc<Svid>, first_bundle: Option<Arc<TrustBundle>>) {
        if let Some(bundle) = first_bundle
            && *bundle != **self.bundle.borrow()
        {
            self.bundle.send_replace(bundle);
        }
        self.credentials
            .send_modify(|current| *current = Some(self.pair(svid)));
    }

    fn pair(&self, svid: Arc<Svid>) -> Arc<Credentials> {
        let bundle = self.bundle.borrow().clone();
        Arc::new(Credentials { svid, bundle })
    }
}
