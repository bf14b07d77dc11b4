// SPDX-License-Identifier: Apache-2.0
//! The `proxy` module: everything that lives as long as the process, and the order in which it ends.
//!
//! | task | reads | writes |
//! |---|---|---|
//! | program credentials | the CA | SVID and bundle in use (`watch`) |
//! | workload certificates | the CA | each identity's SVID (`watch`) |
//! | replicas | the name server | connections to the controller (`watch`) |
//! | xDS client | the controller | batches (bounded `mpsc`) |
//! | state | batches, questions of connections | the view, the version in use (`watch`) |
//! | prefetch | the view | holds on certificates |
//! | ZDS client | the agent | pods |
//! | retry | pending pods | pods |
//! | reports | pods, view, version, bundle | the controller |
//! | sweep | the view | metrics of workloads that are gone |
//! | HTTP endpoints | all of these | nothing |
//!
//! On SIGTERM the agent is let go first, so that a successor may have it; then pods stop accepting and their
//! connections are given the drain bound; everything else ends last, because connections under drain still need state
//! and certificates. Once Podveil is uninstalled and no pod is left, the process leaves nothing on its node.

use crate::admin::Facts;
use crate::config::{NodeConfig, ProxySection};
use crate::endpoints::Endpoints;
use crate::kubelet::NodeKubelet;
use crate::metrics::{LiveWorkloads, NodeMetrics, ProcessMetrics, TrafficMetrics, XdsMetrics};
use crate::pods::{ListenerSource, Pods, Shared};
use crate::reports::Reporter;
use crate::{prefetch, process, remains, zds};
use anyhow::Context;
use podveil_ca_client::{
    Module, ProgramConfig, ProgramCredentials, WorkloadCertificates, WorkloadLimits, transport,
};
use podveil_identity::ProgramIdentity;
use podveil_inbound::{Kubelet, NoKubelet};
use podveil_model::{Epoch, MeshConfig};
use podveil_net::MARK;
use podveil_program::http::Routes;
use podveil_reports::{Controllers, Replicas};
use podveil_state::{Limits, OnDemand, StateHandle, StateTask};
use podveil_xds_client as xds;
use prometheus::Registry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::Channel;

pub use crate::endpoints::Bound;

/// Between two looks for series of workloads that are gone.
const SWEEP: Duration = Duration::from_secs(30);
/// A controller that is back is found within this: new pods wait for it. Peers wait up to 15 s.
const XDS_LAST_RETRY: Duration = Duration::from_secs(5);
/// What tasks that only wait are given to end.
const END_BOUND: Duration = Duration::from_secs(5);

/// The links to the control plane, which a test may bring itself.
#[derive(Clone, Debug)]
pub struct Links {
    pub credentials: ProgramCredentials,
    pub ca: Channel,
    pub controller: Channel,
    /// `None` in mode A, whose control planes take no reports.
    pub replicas: Option<Replicas>,
    /// On sockets made in pods; `None` makes them without privileges.
    pub mark: Option<u32>,
}

impl Links {
    /// The real ones, which connect when they are first used and again whenever they must.
    pub fn start(config: &NodeConfig, stop: &CancellationToken) -> Self {
        let credentials =
            ProgramCredentials::start(program(config, Module::Proxy), stop.child_token());
        let channel = |address: &str, server| transport::channel(address, &credentials, server);
        let controller = channel(config.xds_address.as_str(), ProgramIdentity::Controller);
        Self {
            ca: channel(config.ca_address.as_str(), ProgramIdentity::Ca),
            replicas: config.holder().map(|_| {
                Replicas::named(
                    config.reports_address().to_string(),
                    credentials.clone(),
                    controller.clone(),
                    stop.child_token(),
                )
            }),
            controller,
            mark: Some(MARK),
            credentials,
        }
    }
}

/// Whom the CA gives this process its own certificate as.
pub fn program(config: &NodeConfig, module: Module) -> ProgramConfig {
    ProgramConfig {
        trust_domain: config.trust_domain.clone(),
        identity: ProgramIdentity::Node(config.node.clone()),
        ca_address: config.ca_address.to_string(),
        token_path: config.token.clone(),
        bootstrap_bundle: config.bootstrap_bundle.clone(),
        state_dir: config.state_dir.clone(),
        module,
    }
}

/// The running proxy.
#[derive(Debug)]
pub struct Proxy {
    config: Arc<NodeConfig>,
    pods: Pods,
    bound: Bound,
    zds: watch::Receiver<zds::Status>,
    uninstalling: watch::Receiver<bool>,
    tasks: TaskTracker,
    stop: CancellationToken,
    /// No new connection is taken any more.
    retired: CancellationToken,
    end: CancellationToken,
}

/// Runs the proxy until `stop`, then drains.
///
/// # Errors
/// As [`Proxy::start`].
pub async fn run(config: NodeConfig, stop: CancellationToken) -> anyhow::Result<()> {
    // Ends what must outlive the drain.
    let end = CancellationToken::new();
    let links = Links::start(&config, &end);
    let (cgroup, program) = (config.cgroup()?, program(&config, Module::Proxy));
    match Proxy::start(config, links, stop, end).await?.run().await {
        Ended::Stopped => Ok(()),
        Ended::Uninstalled => {
            tracing::info!("Podveil is uninstalled: nothing of the proxy is left on this node");
            remains::remove_state(&program)?;
            cgroup.leave().context("the proxy's cgroup cannot be left")
        }
    }
}

/// How the proxy came to its end.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Ended {
    Stopped,
    /// Podveil is being uninstalled, and no pod was served any more.
    Uninstalled,
}

impl Proxy {
    /// Starts every task. `stop` begins the drain; `end` is cancelled after it, and ends what drains need.
    ///
    /// # Errors
    /// An endpoint's address cannot be had: for the operator.
    pub async fn start(
        config: NodeConfig,
        links: Links,
        stop: CancellationToken,
        end: CancellationToken,
    ) -> anyhow::Result<Self> {
        let config = Arc::new(config);
        let registry = Registry::new();
        ProcessMetrics::register(&registry);
        let metrics = NodeMetrics::new(&registry);
        let section = &config.proxy;
        let traffic = Arc::new(TrafficMetrics::new(
            &registry,
            section.max_traffic_series,
            section.gone_series_kept.0,
        ));
        let certificates = WorkloadCertificates::new(
            links.ca.clone(),
            links.credentials.clone(),
            WorkloadLimits::default(),
            end.child_token(),
        );
        let tasks = TaskTracker::new();
        let (state, in_use, xds_status) = start_state(&config, &links, &registry, &tasks, &end);
        let pods = Pods::new(Shared {
            trust_domain: config.trust_domain.clone(),
            listeners: listeners(&config, links.mark),
            mark: links.mark,
            kubelet: kubelet(&config),
            limits: limits(section),
            state: state.clone(),
            certificates: certificates.clone(),
            bundle: links.credentials.bundle(),
            traffic: traffic.clone(),
            metrics: metrics.clone(),
            drain: CancellationToken::new(),
            stop: CancellationToken::new(),
        });
        let zds_status = watch::Sender::default();
        let zds_now = zds_status.subscribe();
        let facts = Facts {
            config: config.clone(),
            pods: pods.clone(),
            state: state.clone(),
            credentials: links.credentials.clone(),
            certificates: certificates.clone(),
            zds: zds_status.subscribe(),
            xds: xds_status,
        };
        let readiness = {
            let facts = facts.clone();
            Routes::default().readiness(move || facts.pending())
        };
        let endpoints = Endpoints {
            admin: facts.routes(),
            metrics: Routes::default().metrics(registry),
            readiness,
        };
        let bound = endpoints.serve(&config, &end).await?;
        tasks.spawn(prefetch::run(
            config.node.clone(),
            state.clone(),
            certificates.clone(),
            end.child_token(),
        ));
        tasks.spawn(sweep(traffic, state.clone(), end.child_token()));
        let controllers = Controllers::default();
        let uninstalling = controllers.uninstalling.subscribe();
        tasks.spawn(show_links(
            metrics.clone(),
            facts,
            controllers.connected.subscribe(),
            end.child_token(),
        ));
        let retired = CancellationToken::new();
        if let Some(replicas) = links.replicas {
            let reporter = Reporter::new(
                config.node.clone(),
                pods.clone(),
                state,
                in_use,
                links.credentials,
                certificates,
            );
            let (mut zds, retired) = (zds_status.subscribe(), retired.clone());
            let follows = config.take_over;
            tasks.spawn(async move {
                // Until it has followed, another proxy speaks for this node's pods.
                let has_followed = zds.wait_for(|now| !follows || *now == zds::Status::Live);
                let has_followed = retired.run_until_cancelled(has_followed).await;
                if has_followed.is_some_and(|told| told.is_ok()) {
                    podveil_reports::run(replicas, reporter, controllers, retired.clone()).await;
                }
            });
        }
        tasks.spawn({
            let (mut pods, config, retired) = (pods.clone(), config.clone(), retired.clone());
            async move {
                let (socket, take_over) = (&config.zds_socket, config.take_over);
                zds::run(socket, take_over, &mut pods, &zds_status, &retired).await;
            }
        });
        tasks.spawn({
            let (pods, retired) = (pods.clone(), retired.clone());
            async move { pods.retry(&retired).await }
        });
        Ok(Self {
            config,
            pods,
            bound,
            zds: zds_now,
            uninstalling,
            tasks,
            stop,
            retired,
            end,
        })
    }

    pub fn endpoints(&self) -> Bound {
        self.bound
    }

    /// Waits for the stop signal, drains, and ends every task.
    pub async fn run(self) -> Ended {
        self.stop.cancelled().await;
        let ended = match *self.uninstalling.borrow() && self.pods.states().is_empty() {
            true => Ended::Uninstalled,
            false => Ended::Stopped,
        };
        let bound = self.config.proxy.drain_bound.0;
        let bound_ms = bound.as_millis() as u64;
        let deadline = tokio::time::Instant::now() + bound;
        // Until the next process follows, new connections have nobody else. In mode A it is there already.
        if self.config.holder().is_some() || !self.config.take_over {
            tracing::info!(
                bound_ms,
                "stopping once no connection is open or another proxy follows"
            );
            let mut zds = self.zds;
            tokio::select! {
                () = self.pods.quiet(bound) => {}
                _ = zds.wait_for(|now| self.config.take_over && *now != zds::Status::Live) => {}
            }
        }
        tracing::info!("stopping: no new connection is accepted");
        self.retired.cancel();
        let left = deadline.saturating_duration_since(tokio::time::Instant::now());
        self.pods.drain(left).await;
        self.end.cancel();
        self.tasks.close();
        if tokio::time::timeout(END_BOUND, self.tasks.wait())
            .await
            .is_err()
        {
            tracing::error!("some tasks did not end");
        }
        ended
    }
}

/// Starts the xDS client and the one writer of the state.
fn start_state(
    config: &NodeConfig,
    links: &Links,
    registry: &Registry,
    tasks: &TaskTracker,
    end: &CancellationToken,
) -> (
    StateHandle,
    watch::Receiver<podveil_state::Version>,
    watch::Receiver<xds::Status>,
) {
    let node = xds::NodeInfo {
        node: config.node.to_string(),
        name: format!("podveil-node-{}", config.node),
        namespace: "podveil-system".to_owned(),
        ..xds::NodeInfo::default()
    };
    let on_demand = config.proxy.on_demand;
    let mut settings = xds::Config {
        mesh_config: config.holder().is_some(),
        on_demand,
        backoff_max: XDS_LAST_RETRY,
        ..xds::Config::new(node)
    };
    if on_demand {
        settings.max_asked = OnDemand::MAX_ASKED;
    }
    let stop = end.child_token();
    let client = match links.replicas.clone() {
        Some(replicas) => xds::Client::start(replicas, settings, stop),
        None => xds::Client::start(links.controller.clone(), settings, stop),
    };
    XdsMetrics::register(registry, client.counts);
    let (writer, state, words) = podveil_state::channel(on_demand);
    if config.holder().is_none() {
        writer.update(|view| {
            view.insert_mesh(Arc::new(foreign_mesh(config)));
        });
    }
    let (in_use_sender, in_use) = watch::channel(None);
    let task = StateTask {
        writer,
        batches: client.batches,
        demand: client.demand,
        words,
        in_use: in_use_sender,
        on_demand: on_demand.then(|| OnDemand {
            node: config.node.clone(),
            keep: config.proxy.forget_after.0,
            status: client.status.clone(),
        }),
    };
    tasks.spawn(task.run(end.child_token()));
    (state, in_use, client.status)
}

/// What stands in for the mesh configuration that a foreign control plane does not have: nobody can say which addresses
/// are inside, so each unknown one is asked for.
fn foreign_mesh(config: &NodeConfig) -> MeshConfig {
    MeshConfig {
        trust_domain: config.trust_domain.clone(),
        pod_ranges: Vec::new(),
        service_ranges: Vec::new(),
        ranges_known: false,
        outlying: None,
        plain_outbound_ranges: Vec::new(),
        plain_outbound_namespaces: BTreeSet::new(),
        nodes: BTreeMap::new(),
        not_enrolled: BTreeSet::new(),
        epoch: Epoch::default(),
    }
}

fn listeners(config: &NodeConfig, mark: Option<u32>) -> ListenerSource {
    match config.holder() {
        Some(path) => ListenerSource::Holder(path.to_owned()),
        None => ListenerSource::Own {
            backlog: config.proxy.backlog,
            mark,
        },
    }
}

/// Nobody can tell without the `redirect` module (mode A).
fn kubelet(config: &NodeConfig) -> Arc<dyn Kubelet> {
    match config.holder() {
        Some(holder) => Arc::new(NodeKubelet {
            holder: holder.to_owned(),
        }),
        None => Arc::new(NoKubelet),
    }
}

fn limits(section: &ProxySection) -> Limits {
    Limits {
        hold_bound: section.hold_bound.0,
        connect_timeout: section.connect_timeout.0,
        tls_timeout: section.tls_timeout.0,
        h2_timeout: section.http2_timeout.0,
        connect_response_timeout: section.connect_response_timeout.0,
        max_held: section.max_held_per_pod,
        max_connections: process::connections_per_pod(section.max_connections_per_pod),
        max_tunnels: section.max_tunnels_per_pod,
        max_streams_per_tunnel: section.max_streams_per_tunnel,
        tunnel_idle: section.tunnel_idle_timeout.0,
    }
}

/// Takes out the metrics of workloads that are gone.
async fn sweep(traffic: Arc<TrafficMetrics>, state: StateHandle, end: CancellationToken) {
    let sweeps = async {
        loop {
            tokio::time::sleep(SWEEP).await;
            let view = state.view();
            // Before the first push nobody is known to be gone.
            if view.is_synced() {
                let live: LiveWorkloads = view
                    .workloads()
                    .map(|workload| {
                        (
                            workload.namespace().to_string(),
                            workload.workload_name.to_string(),
                        )
                    })
                    .collect();
                traffic.sweep(tokio::time::Instant::now(), &live);
            }
        }
    };
    let _ended: Option<()> = end.run_until_cancelled(sweeps).await;
}

/// Keeps the gauges of the control plane's links.
async fn show_links(
    metrics: NodeMetrics,
    mut facts: Facts,
    mut reporting: watch::Receiver<usize>,
    end: CancellationToken,
) {
    let gauge = |part| metrics.connected.with_label_values(&[part]);
    let (xds, zds, ca, reports) = (gauge("xds"), gauge("zds"), gauge("ca"), gauge("reports"));
    let mut credentials = facts.credentials.subscribe();
    let show = async {
        loop {
            xds.set(facts.xds.borrow_and_update().connected.into());
            zds.set((*facts.zds.borrow_and_update() != zds::Status::Disconnected).into());
            ca.set(credentials.borrow_and_update().is_some().into());
            reports.set((*reporting.borrow_and_update() > 0).into());
            tokio::select! {
                Ok(()) = reporting.changed() => {}
                Ok(()) = facts.xds.changed() => {}
                Ok(()) = facts.zds.changed() => {}
                Ok(()) = credentials.changed() => {}
                else => std::future::pending().await,
            }
        }
    };
    let _ended: Option<()> = end.run_until_cancelled(show).await;
}
