// SPDX-License-Identifier: Apache-2.0
use crate::PluginState;
use crate::cni::{self, InstallError, Installation, Namespaces};
use crate::config::RedirectConfig;
use crate::ending::outlast_the_proxy;
use crate::finder::{FindError, Finder};
use crate::holder::{self, Answers, Held};
use crate::reconcile::{Links, Reconciler};
use crate::reports::{InUse, Reporter};
use crate::status::{PodCondition, PodStatus, Status};
use crate::work::chain;
use crate::zds::{self, Proxy};
use podveil_apply::{ApplyError, BackEndError, BackEnds, Backend, NodeError};
use podveil_ca_client::{ProgramCredentials, transport};
use podveil_cni::NotEnrolled;
use podveil_identity::ProgramIdentity;
use podveil_netns::Lease;
use podveil_netns::cgroup::{CgroupError, Membership};
use podveil_netns::seqpacket;
use podveil_proto::{TAKES, TAKES_CAPTURED};
use podveil_reports::{Controllers, Replicas};
use podveil_xds_client::{Client, NodeInfo};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// A controller that is back is found within this: new pods wait for it.
const XDS_LAST_RETRY: Duration = Duration::from_secs(5);

/// Sandboxes that start at once wait in their plugins beyond this.
const MAX_ASKS: usize = 64;
/// How long the fence may keep a pod's address after its namespace has ended: an address is rarely given anew so soon.
const FORGET: Duration = Duration::from_secs(2);

/// Why the module cannot start.
#[derive(Debug, thiserror::Error)]
pub enum RedirectError {
    #[error("pods cannot be captured on this node")]
    BackEnd(#[from] BackEndError),
    #[error("the proxy's cgroup cannot be joined")]
    Cgroup(#[from] CgroupError),
    #[error("cannot have {path}, by which one process at a time serves the node")]
    Lease {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot listen at {path}")]
    Socket {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// How the module came to its end.
#[derive(Debug)]
pub enum Ended {
    /// Capture stands for the module's next start.
    Stopped,
    /// Podveil is being uninstalled, and no pod has anything of ours any more. Until the lease is let go, no other process of
    /// this module begins.
    Uninstalled(Lease),
}

/// Why something may be left behind.
#[derive(Debug, thiserror::Error)]
pub enum TeardownError {
    #[error("capture could not be removed from {place}")]
    Apply {
        place: String,
        #[source]
        source: ApplyError,
    },
    #[error("eBPF programs and maps cannot be removed")]
    BackEnd(#[from] NodeError),
    #[error("what has captured pods cannot be told")]
    Left(#[from] BackEndError),
    #[error("the proxy's cgroup cannot be removed")]
    Cgroup(#[from] CgroupError),
    #[error("{path} cannot be removed")]
    Lease {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the pods of this node cannot be listed")]
    List(#[source] FindError),
    #[error("the CNI plugin cannot be removed")]
    Plugin(#[from] InstallError),
    #[error("the folder of {path} cannot be removed")]
    Socket {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Runs the module until it is asked to stop and the proxy has gone, publishing its state in `status`; as long as another
/// process of it serves this node, stands by. Joins the proxy's cgroup first, since every socket made here is the proxy's.
/// Capture stays where it stands when this ends; where none is to come back, the caller goes on with [`purge`].
/// # Errors
/// [`RedirectError`], before anything was started.
pub async fn run(
    config: RedirectConfig,
    credentials: ProgramCredentials,
    status: watch::Sender<Status>,
    asked_to_stop: CancellationToken,
) -> Result<Ended, RedirectError> {
    config.cgroup.join()?;
    // Let go last, of all that is here: the next process makes the same sockets.
    let Some(lease) = take_turn(&config.lease(), &status, &asked_to_stop).await? else {
        return Ok(Ended::Stopped);
    };
    let bind = |path: &PathBuf| {
        seqpacket::Listener::bind(path).map_err(|source| RedirectError::Socket {
            path: path.clone(),
            source,
        })
    };
    let zds_socket = bind(&config.zds_socket)?;
    let listeners_socket = bind(&config.listeners_socket)?;
    let cni_socket = match config.cni.enabled {
        true => Some(bind(&config.cni.socket)?),
        false => None,
    };
    // After them: whoever cannot have the sockets changes nothing that stands.
    let backend = BackEnds::open(config.back_end, &config.bpf_dir, config.cgroup.locate()?).await?;
    let own_uid = nix::unistd::geteuid().as_raw();

    let (offers, offered) = watch::channel(None);
    let (proxy_in, proxy) = watch::channel(Proxy::default());
    let (orphaned_in, orphaned) = watch::channel(false);
    let (asks, asked) = mpsc::channel(MAX_ASKS);
    let (plugin_in, plugin) = watch::channel(PluginState::Off);
    let not_enrolled = NotEnrolled::path(&config.cni.socket);
    let (namespaces, namespaces_now) = watch::channel(Namespaces::read(&not_enrolled).into());
    let held = Held::default();
    let in_use = InUse::default();
    let controller = transport::channel(
        &config.xds_address,
        &credentials,
        ProgramIdentity::Controller,
    );
    let info = NodeInfo {
        node: config.node.to_string(),
        name: format!("podveil-redirect-{}", config.node),
        // Nothing here asks whether a pod is ready or which services it is behind.
        metadata: [(TAKES.to_owned(), TAKES_CAPTURED.to_owned())].into(),
        ..NodeInfo::default()
    };
    let stop = CancellationToken::new();
    let replicas = Replicas::named(
        config.reports_address.clone(),
        credentials.clone(),
        controller,
        stop.clone(),
    );
    let watched = proxy.clone();
    let links = Links {
        xds: Client::start(
            replicas.clone(),
            podveil_xds_client::Config {
                backoff_max: XDS_LAST_RETRY,
                ..podveil_xds_client::Config::new(info)
            },
            stop.clone(),
        ),
        offers,
        proxy,
        orphaned,
        held: held.clone(),
        status: status.clone(),
        in_use: in_use.clone(),
        chosen: Some(Arc::new(backend.chosen().clone())),
        asks: asked,
        plugin,
        namespaces,
    };
    let reporter = Reporter {
        node: config.node.clone(),
        bundle: credentials.bundle(),
        credentials,
        status: status.subscribe(),
        in_use,
    };
    let controllers = Controllers::default();
    let installation = Installation::new(&config.cni);
    let drain_bound = config.drain_bound;
    let (hold_bound, membership) = (config.hold_bound, config.cgroup.clone());
    let backend = Arc::new(backend);
    let reconciler = Reconciler::new(config, backend.clone(), links, stop.clone());

    let tasks = TaskTracker::new();
    tasks.spawn({
        let (proxy, offered) = (watched.clone(), offered.clone());
        let (asked, stop) = (asked_to_stop.clone(), stop.clone());
        async move {
            if stop.run_until_cancelled(asked.cancelled()).await.is_some() {
                outlast_the_proxy(proxy, offered, drain_bound).await;
                stop.cancel();
            }
        }
    });
    tasks.spawn(keep_forgetting(backend, stop.clone()));
    let proxies = membership.clone();
    tasks.spawn(zds::serve(
        zds_socket,
        offered,
        proxy_in,
        own_uid,
        move |peer| proxies.contains(peer.pid).unwrap_or(false),
        (asked_to_stop, stop.clone()),
    ));
    let answers = Answers {
        held,
        kubelets: Arc::default(),
    };
    tasks.spawn(holder::serve(
        listeners_socket,
        answers,
        own_uid,
        membership,
        stop.clone(),
    ));
    tasks.spawn(holder::watch_proxy(watched, hold_bound, orphaned_in));
    match cni_socket {
        Some(socket) => {
            tasks.spawn(cni::serve(socket, asks, own_uid, stop.clone()));
            tasks.spawn(cni::tell(not_enrolled, namespaces_now));
            let unwanted = controllers.uninstalling.subscribe();
            tasks.spawn(cni::keep(installation, unwanted, plugin_in, stop.clone()));
        }
        // Of a start with other settings.
        None => {
            if let Err(error) = remove_plugin(&installation, &not_enrolled) {
                tracing::warn!(error = chain(&error), "the CNI plugin cannot be taken out");
            }
        }
    }
    tasks.spawn(podveil_reports::run(
        replicas,
        reporter,
        controllers.clone(),
        stop.clone(),
    ));
    tasks.close();
    reconciler.run().await;
    stop.cancel();
    tasks.wait().await;
    let released = |pod: &PodStatus| pod.condition == PodCondition::Released;
    let nothing_stands = status.borrow().pods.iter().all(released);
    Ok(match *controllers.uninstalling.borrow() && nothing_stands {
        true => Ended::Uninstalled(lease),
        false => Ended::Stopped,
    })
}

/// Waits until no other process of this module serves the node; `None`: asked to stop before.
async fn take_turn(
    path: &Path,
    status: &watch::Sender<Status>,
    asked: &CancellationToken,
) -> Result<Option<Lease>, RedirectError> {
    let failed = |source| RedirectError::Lease {
        path: path.to_owned(),
        source,
    };
    if let Some(lease) = Lease::try_take(path).map_err(failed)? {
        return Ok(Some(lease));
    }
    tracing::info!("another process of this module serves the node: this one follows when it ends");
    status.send_modify(|status| status.stands_by = true);
    let taken = asked.run_until_cancelled(Lease::take(path)).await;
    status.send_modify(|status| status.stands_by = false);
    taken.transpose().map_err(failed)
}

/// With what only it reads.
fn remove_plugin(installation: &Installation, not_enrolled: &Path) -> Result<(), InstallError> {
    installation.remove()?;
    cni::remove_file(not_enrolled)
}

/// Drops what is kept for namespaces that have ended, soon after they have: the kernel takes one apart in its own time.
async fn keep_forgetting(backend: Arc<BackEnds>, stop: CancellationToken) {
    let mut due = tokio::time::interval(FORGET);
    due.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while stop.run_until_cancelled(due.tick()).await.is_some() {
        if let Err(error) = backend.forget_gone() {
            tracing::warn!(
                error = chain(&error),
                "what was captured of ended pods cannot be forgotten; it is tried again"
            );
        }
    }
}

/// Removes what outlasts the module beside the pods' rules: the CNI plugin, pins of eBPF, the folders of the sockets, the
/// cgroup unless another process is still in it. For [`Ended::Uninstalled`].
/// # Errors
/// What could not be removed.
pub fn purge(config: &RedirectConfig) -> Result<(), TeardownError> {
    let not_enrolled = NotEnrolled::path(&config.cni.socket);
    remove_plugin(&Installation::new(&config.cni), &not_enrolled)?;
    BackEnds::purge(&config.bpf_dir)?;
    let remove_folder = |socket: &PathBuf| {
        seqpacket::remove_folder(socket).map_err(|source| TeardownError::Socket {
            path: socket.clone(),
            source,
        })
    };
    remove_folder(&config.listeners_socket)?;
    remove_folder(&config.cni.socket)?;
    config.cgroup.leave()?;
    // Last: whoever waits for it begins anew.
    let lease = config.lease();
    Lease::remove(&lease).map_err(|source| TeardownError::Lease {
        path: lease,
        source,
    })?;
    remove_folder(&config.zds_socket)
}

/// Removes capture from every pod's namespace on this node, and what [`purge`] does. Connections that the proxy carries
/// break. For uninstalling, with both node processes stopped: asks neither of them, nor the control plane.
/// # Errors
/// The first thing that could not be removed, after everything else has been.
pub async fn teardown(config: &RedirectConfig) -> Result<usize, TeardownError> {
    let cgroup = config.cgroup.locate()?;
    let backend = BackEnds::left(&config.bpf_dir, cgroup)?;
    let finder = Finder::new(&config.find);
    let mut removed = 0;
    let mut first_error = None;
    for (place, found) in finder.all().await.map_err(TeardownError::List)? {
        let netns = &found.netns;
        let ours = match config.cgroup {
            // Simulated nodes see each other's pods.
            Membership::Folder(_) => backend.owns(netns).await,
            // The pod that wrote the rules may have been another one than ours.
            Membership::Pod => backend.stands(netns).await,
        };
        let result = match ours {
            Ok(true) => backend.remove(netns).await.map(|()| true),
            other => other,
        };
        match result {
            Ok(true) => removed += 1,
            Ok(false) => {}
            Err(source) => {
                first_error.get_or_insert(TeardownError::Apply { place, source });
            }
        }
    }
    purge(config)?;
    match first_error {
        Some(error) => Err(error),
        None => Ok(removed),
    }
}
