// SPDX-License-Identifier: Apache-2.0
use crate::config::Config;
use crate::keeper::{Keeper, Shared};
use crate::metrics::Metrics;
use crate::reports::ReportService;
use crate::saved::{self, SavedError};
use crate::source::Source;
use crate::{backends, caller, events, status, uninstall};
use podveil_ca_client::ProgramCredentials;
use podveil_ca_client::transport::{Refusals, incoming, server_configs};
use podveil_ca_client::verify::Expected;
use podveil_identity::{IdentityError, TrustDomain};
use podveil_index::{Saved, Start};
use podveil_kube::kube::Client;
use podveil_kube::{ClientError, Election};
use podveil_program::http::{self, Answer, Routes};
use podveil_source::{LoadError, SourceConfig};
use podveil_xds_server::{Caller, DiscoveryService, Publisher, delimited};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Of the replica that writes events and status; all of them serve.
const LEASE: &str = "podveil-controller";
/// Events that may wait for the keeper; above it, streams of reports wait.
const QUEUED_EVENTS: usize = 256;
/// A node that vanished is noticed after interval + timeout.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Streams of one connection at once; a program opens two.
const MAX_STREAMS: u32 = 16;
const MAX_HEADER_BYTES: u32 = 16 * 1024;
/// Bytes of a request that may come before they are read: a node that comes back says all that it holds, and nodes come
/// back all at once. One stream of a connection must not stop the other.
const STREAM_WINDOW: u32 = 64 * 1024;
const CONNECTION_WINDOW: u32 = 2 * STREAM_WINDOW;
/// After the stop signal, for streams to end by themselves.
const STOP_DEADLINE: Duration = Duration::from_secs(3);

/// Why the controller cannot start: always for the operator to mend.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("the API of the cluster cannot be reached")]
    Kubernetes(#[source] ClientError),
    #[error("listening on {address} for {what}")]
    Listen {
        what: &'static str,
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("registering metrics")]
    Metrics(#[source] prometheus::Error),
    #[error("namespace in the configuration")]
    Namespace(#[source] IdentityError),
    #[error("the cluster state in the source is of trust domain {found}, not {configured}")]
    OtherTrustDomain {
        found: TrustDomain,
        configured: TrustDomain,
    },
    #[error("the saved state of enrolment cannot be used")]
    Saved(#[source] SavedError),
    #[error("the source cannot be read")]
    Source(#[source] LoadError),
    #[error("trust_domain in the configuration")]
    TrustDomain(#[source] IdentityError),
}

/// A running controller.
#[derive(Debug)]
pub struct Controller {
    /// Where nodes connect.
    pub address: SocketAddr,
    pub admin_address: SocketAddr,
    pub metrics_address: SocketAddr,
    pub readiness_address: SocketAddr,
    tasks: TaskTracker,
}

impl Controller {
    /// Reads the source once and starts everything. All tasks end with `stop`.
    ///
    /// # Errors
    /// [`StartError`]; tasks already started end with `stop`.
    pub async fn start(
        config: &Config,
        credentials: ProgramCredentials,
        stop: CancellationToken,
    ) -> Result<Self, StartError> {
        Self::start_with(config, credentials, None, stop).await
    }

    /// With this way to the API server, in place of the one that the environment names.
    ///
    /// # Errors
    /// Like [`Controller::start`].
    pub async fn start_with(
        config: &Config,
        credentials: ProgramCredentials,
        client: Option<Client>,
        stop: CancellationToken,
    ) -> Result<Self, StartError> {
        let trust_domain = config.trust_domain()?;
        let saved = saved::read(&config.state_dir).map_err(StartError::Saved)?;
        let source = Source::start(config, client, &stop).await?;
        let listener = TcpListener::bind(config.listen)
            .await
            .map_err(listen_error("nodes", config.listen))?;
        let address = listener
            .local_addr()
            .map_err(listen_error("nodes", config.listen))?;

        let publisher = Publisher::new(unix_millis());
        // A file is there from the start, and so are the nodes' programs in time; on a cluster, who knows.
        let start = if config.source == SourceConfig::Kubernetes && saved == Saved::default() {
            Start::AfterReports
        } else {
            Start::AtOnce
        };
        let index = Shared::new(saved.clone(), start);
        let (events, queued) = mpsc::channel(QUEUED_EVENTS);
        let (saved_tx, saved) = watch::channel(saved);
        let (awaited_tx, awaited) = watch::channel(Arc::default());
        let tasks = TaskTracker::new();
        tasks.spawn(saved::keep(config.state_dir.clone(), saved));
        let keeper = Keeper {
            index: index.clone(),
            trust_domain,
            cluster: source.cluster.clone(),
            events: queued,
            publisher: publisher.clone(),
            saved: saved_tx,
            awaited: awaited_tx,
        };
        let keeping = stop.clone();
        tasks.spawn(async move {
            keeper.run(keeping.clone()).await;
            keeping.cancel();
        });

        if let Some(client) = source.client.clone() {
            let election = Election::start(
                client.clone(),
                &config.namespace,
                LEASE,
                config.replica.clone(),
                stop.clone(),
            );
            let standing = election.standing();
            let telling = uninstall::tell_when_done(
                client.clone(),
                config.namespace.clone(),
                index.clone(),
                source.cluster.clone(),
                standing.clone(),
            );
            let (refused_tx, refused) = watch::channel(Arc::default());
            let looking = backends::look(
                client.clone(),
                source.cluster.clone(),
                standing.clone(),
                refused_tx,
            );
            let writing = events::write(
                client,
                config.replica.clone(),
                index.clone(),
                source.cluster.clone(),
                refused,
                standing,
            );
            let stopped = stop.clone();
            tasks.spawn(async move {
                stopped
                    .run_until_cancelled(async { tokio::join!(telling, looking, writing) })
                    .await;
                election.ended().await;
            });
        }

        let discovery = DiscoveryService::new(
            publisher.clone(),
            |extensions| {
                let node = caller::node(extensions)?;
                Ok(Caller(node.as_str().into()))
            },
            stop.clone(),
        );
        let reports = ReportService::server(
            publisher.clone(),
            events,
            awaited,
            source.cluster.clone(),
            stop.clone(),
        );
        let refusals = Arc::<Refusals>::default();
        let configs = server_configs(&credentials, Expected::AnyProgram, false);
        let serve = tonic::transport::Server::builder()
            .max_concurrent_streams(MAX_STREAMS)
            .http2_max_header_list_size(MAX_HEADER_BYTES)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
            .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
            .add_service(discovery)
            .add_service(reports)
            .serve_with_incoming_shutdown(
                incoming(listener, configs, refusals.clone()),
                stop.clone().cancelled_owned(),
            );
        tasks.spawn(serve_until(serve, stop.clone()));

        let controller = Self {
            address,
            admin_address: config.admin_address,
            metrics_address: config.metrics_address,
            readiness_address: config.readiness_address,
            tasks,
        };
        controller
            .serve_http(index, &source, publisher, refusals, credentials, stop)
            .await
    }

    async fn serve_http(
        mut self,
        index: Shared,
        source: &Source,
        publisher: Publisher,
        refusals: Arc<Refusals>,
        credentials: ProgramCredentials,
        stop: CancellationToken,
    ) -> Result<Self, StartError> {
        let registry = prometheus::Registry::new();
        let seen = source.status.clone();
        let metrics = Metrics::new(index.clone(), seen, publisher.clone(), refusals)
            .map_err(StartError::Metrics)?;
        registry
            .register(Box::new(metrics))
            .map_err(StartError::Metrics)?;
        let metrics = Routes::default().metrics(registry);

        let published = publisher.clone();
        let readiness = Routes::default().readiness(move || {
            let certificate = credentials.current().is_none().then_some("certificate");
            let snapshot = (published.version().number == 0).then_some("first snapshot");
            [certificate, snapshot]
                .into_iter()
                .flatten()
                .map(str::to_owned)
                .collect()
        });

        let source = source.status.clone();
        let published = publisher.clone();
        let admin = Routes::default()
            .get("/status", move || {
                let source = source.borrow().clone();
                Answer::json(status::json(index.status(), &source, publisher.version()))
            })
            // What a node that holds a part would be told.
            .get("/resources", move || {
                Answer::protobuf(delimited(published.responses()))
            });

        for (what, address, routes) in [
            ("administration", &mut self.admin_address, admin),
            ("metrics", &mut self.metrics_address, metrics),
            ("readiness", &mut self.readiness_address, readiness),
        ] {
            *address = http::serve(*address, routes, stop.clone())
                .await
                .map_err(listen_error(what, *address))?;
        }
        self.tasks.close();
        Ok(self)
    }

    /// Waits until all tasks have ended: after the stop token, or because one failed that the others need. The state
    /// of enrolment is saved then.
    pub async fn ended(&self) {
        self.tasks.wait().await;
    }
}

/// Serves until `stop`, and a little longer for the streams' own ends. A server that ends by itself stops the rest.
async fn serve_until(
    serve: impl Future<Output = Result<(), tonic::transport::Error>>,
    stop: CancellationToken,
) {
    let late = async {
        stop.cancelled().await;
        tokio::time::sleep(STOP_DEADLINE).await;
    };
    tokio::select! {
        served = serve => if let Err(error) = served {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "the server for nodes failed"
            );
        },
        () = late => tracing::warn!("nodes did not let go of their streams in time"),
    }
    stop.cancel();
}

fn listen_error(what: &'static str, address: SocketAddr) -> impl FnOnce(io::Error) -> StartError {
    move |source| StartError::Listen {
        what,
        address,
        source,
    }
}

fn unix_millis() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|age| u64::try_from(age.as_millis()).ok())
        .unwrap_or_default()
}
