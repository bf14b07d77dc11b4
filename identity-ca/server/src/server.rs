// SPDX-License-Identifier: Apache-2.0
use crate::admission::Admission;
use crate::anonymous::{self, Bounded};
use crate::cluster;
use crate::config::{Config, StoreConfig};
use crate::consumers::{Consumers, Module, Name};
use crate::drill::{Drills, Replicas};
use crate::issuance::Issuance;
use crate::kubernetes::{Api, first_contact, needs_api, source};
use crate::ledger::{Ledger, Lives};
use crate::metrics::{Metrics, describe};
use crate::own::OwnSvid;
use crate::reading::Reading;
use crate::refusal::with_sources;
use crate::service::{AdminService, BundlesService, CertificatesService};
use crate::shared::Told;
use crate::store::{Directory, Store, socket_folder};
use crate::waiting;
use anyhow::Context;
use podveil_ca_client::transport;
use podveil_ca_client::verify::Expected;
use podveil_identity::{ProgramIdentity, TrustDomain};
use podveil_kube::Election;
use podveil_kube::kube::Client;
use podveil_program::http::{self, Routes};
use podveil_proto::istio::v1::auth::istio_certificate_service_server::IstioCertificateServiceServer;
use podveil_proto::podveil::ca::v1::admin_server::AdminServer;
use podveil_proto::podveil::ca::v1::programs_server::ProgramsServer;
use podveil_proto::podveil::node::v1::trust_bundles_server::TrustBundlesServer;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::net::{TcpListener, UnixListener};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

/// Requests of one connection at once; a node's program fetches 8.
const MAX_STREAMS: u32 = 128;
/// A request with a CSR of the greatest size, and room.
const MAX_MESSAGE_BYTES: usize = 64 * 1024;
const KEEPALIVE: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
const MAX_HEADER_BYTES: u32 = 16 * 1024;
/// While the record cannot be read.
const RETRY: Duration = Duration::from_millis(500);
/// For answers under way when the CA is told to stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(3);

/// A CA that serves. It ends with the token given to [`start`](Self::start).
#[derive(Debug)]
pub struct RunningCa {
    /// Where programs reach it.
    pub address: SocketAddr,
    pub metrics_address: SocketAddr,
    pub readiness_address: SocketAddr,
    servers: JoinSet<anyhow::Result<()>>,
    election: Option<Election>,
    stop: CancellationToken,
}

impl RunningCa {
    /// Opens the record (making a root on first start) and serves `config` until `stop`.
    ///
    /// # Errors
    /// For the operator, in one chain: a directory, address or socket that cannot be used, a record that is damaged.
    pub async fn start(config: Config, stop: CancellationToken) -> anyhow::Result<Self> {
        let client = match needs_api(&config) {
            true => Some(podveil_kube::client().await?),
            false => None,
        };
        Self::start_with(config, client, stop).await
    }

    /// As [`start`](Self::start), where `client` leads to the API server; for a CA that has nothing on Kubernetes it is
    /// not looked at.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub async fn start_with(
        config: Config,
        client: Option<Client>,
        stop: CancellationToken,
    ) -> anyhow::Result<Self> {
        let trust_domain = TrustDomain::new(&config.trust_domain)
            .with_context(|| format!("trust_domain {:?}", config.trust_domain))?;
        check_leaf_lives(&config)?;
        let api = Api::new(&config, client)?;
        let waiting = waiting::List::default();
        let metrics = Metrics::new();
        let (metrics_address, readiness_address) =
            serve_http(&config, &metrics, waiting.clone(), &stop).await?;

        let ledger = open_ledger(&config, api.as_ref(), &trust_domain, &waiting, &stop).await?;
        let consumers = Consumers::new();
        let refusals = Arc::<transport::Refusals>::default();
        metrics.observe(ledger.clone(), consumers.clone(), refusals.clone());
        let now = Instant::now().into_std();
        let own = OwnSvid::new(ledger.clone(), config.program_ttl.0)?;
        let credentials = own.credentials();
        let itself = Name {
            program: ProgramIdentity::Ca,
            module: Module::None,
        };
        tokio::spawn(own.run(consumers.connect(itself, now)?, stop.clone()));

        let reading = Reading::new(cluster::follow(
            source(&config, api.as_ref())?,
            trust_domain,
            config.defaults,
            waiting.add("cluster", ""),
            stop.clone(),
        ));
        let issuance = Arc::new(Issuance {
            ledger: ledger.clone(),
            reading: reading.clone(),
            first_contact: first_contact(&config, api.as_ref(), &reading)?,
            admission: Admission::new(config.limits, now),
            metrics,
            leaf_life: config.leaf_ttl.0,
            program_life: config.program_ttl.0,
        });
        let (replicas, election) = match (config.store(), &api) {
            (StoreConfig::Kubernetes, Some(api)) => {
                let (replicas, election) =
                    api.share(&ledger, &consumers, &reading, config.replica.clone(), &stop)?;
                (replicas, Some(election))
            }
            _ => (Replicas::none(), None),
        };
        let drills = Drills::start(
            ledger.clone(),
            consumers.clone(),
            replicas,
            config.rotation.timeout.0,
            config.rotation.absent_after.0,
            stop.clone(),
        );

        let listener = TcpListener::bind(config.listen)
            .await
            .with_context(|| format!("listening on {}", config.listen))?;
        let address = listener.local_addr()?;
        let admin_listener = bind_admin(&config.admin_socket)?;

        let mut servers = JoinSet::new();
        let bundles = BundlesService {
            ledger: ledger.clone(),
            consumers: consumers.clone(),
            stop: stop.clone(),
        };
        let configs = transport::server_configs(&credentials, Expected::AnyProgram, true);
        servers.spawn(serve(
            anonymous::bound(transport::incoming(listener, configs, refusals)),
            CertificatesService(issuance),
            bundles,
            stop.clone(),
        ));
        let admin = AdminService {
            ledger,
            consumers,
            drills,
        };
        servers.spawn(serve_admin(admin_listener, admin, stop.clone()));
        tracing::info!(%address, admin = %config.admin_socket.display(), "serving");
        Ok(Self {
            address,
            metrics_address,
            readiness_address,
            servers,
            election,
            stop,
        })
    }

    /// Waits until it was told to stop and has stopped.
    ///
    /// # Errors
    /// If a server ended by itself.
    pub async fn ended(mut self) -> anyhow::Result<()> {
        tokio::select! {
            () = self.stop.cancelled() => {}
            first = self.servers.join_next() => {
                let early = !self.stop.is_cancelled();
                self.stop.cancel();
                first.context("there is no server")???;
                anyhow::ensure!(!early, "a server ended by itself");
            }
        }
        let rest = async {
            while self.servers.join_next().await.is_some() {}
            // Given back, the lease is free for the next replica at once.
            if let Some(election) = self.election {
                election.ended().await;
            }
        };
        if tokio::time::timeout(STOP_TIMEOUT, rest).await.is_err() {
            tracing::debug!("connections were still open at the end");
        }
        Ok(())
    }
}

/// Runs a CA until `stop`.
///
/// # Errors
/// As [`RunningCa::start`] and [`RunningCa::ended`].
pub async fn run(config: Config, stop: CancellationToken) -> anyhow::Result<()> {
    match stop
        .run_until_cancelled(RunningCa::start(config, stop.clone()))
        .await
    {
        Some(running) => running?.ended().await,
        None => Ok(()),
    }
}

async fn open_ledger(
    config: &Config,
    api: Option<&Api>,
    trust_domain: &TrustDomain,
    waiting: &waiting::List,
    stop: &CancellationToken,
) -> anyhow::Result<Arc<Ledger>> {
    let waiting = waiting.add("record", "the CA's record has not been read yet");
    let lives = Lives {
        root: config.root_ttl.0,
        issuing: config.issuing_ttl.0,
    };
    let mut told = Told::default();
    let ledger = loop {
        let store = match (config.store(), api) {
            (StoreConfig::Kubernetes, Some(api)) => Store::Secret(Box::new(api.secret())),
            _ => Store::Directory(Arc::new(Directory::open(&config.data_dir)?)),
        };
        match Ledger::open(store, trust_domain, lives, SystemTime::now()).await {
            Ok(ledger) => break ledger,
            // The API server is away, or another replica makes the first root.
            Err(error) if error.is_passing() => {
                const WHAT: &str = "the CA's record has not been read yet";
                waiting.set(format!("{WHAT}: {}", with_sources(&error)));
                told.failure(WHAT, &error);
            }
            Err(error) => return Err(error.into()),
        }
        tokio::select! {
            () = stop.cancelled() => anyhow::bail!("stopped before the record could be read"),
            () = tokio::time::sleep(RETRY) => {}
        }
    };
    waiting.done();
    let snapshot = ledger.current();
    for authority in snapshot.authorities() {
        tracing::info!(
            authority = describe(authority),
            sequence = snapshot.sequence,
            generation = snapshot.certificate_generation,
            "authority"
        );
    }
    Ok(Arc::new(ledger))
}

/// Before the first certificate is to be made of them.
fn check_leaf_lives(config: &Config) -> anyhow::Result<()> {
    for (what, life) in [
        ("leaf_ttl", config.leaf_ttl),
        ("program_ttl", config.program_ttl),
    ] {
        Lives::check_one(what, life.0, SystemTime::now())?;
    }
    Ok(())
}

/// One server where both addresses are the same.
async fn serve_http(
    config: &Config,
    metrics: &Metrics,
    waiting: waiting::List,
    stop: &CancellationToken,
) -> anyhow::Result<(SocketAddr, SocketAddr)> {
    let serve = async |address: SocketAddr, routes| {
        http::serve(address, routes, stop.clone())
            .await
            .with_context(|| format!("listening on {address}"))
    };
    let pending = move || waiting.lines();
    let shared =
        config.metrics_address == config.readiness_address && config.metrics_address.port() != 0;
    let routes = Routes::default().metrics(metrics.registry());
    if shared {
        let address = serve(config.metrics_address, routes.readiness(pending)).await?;
        return Ok((address, address));
    }
    Ok((
        serve(config.metrics_address, routes).await?,
        serve(
            config.readiness_address,
            Routes::default().readiness(pending),
        )
        .await?,
    ))
}

async fn serve<C>(
    incoming: C,
    certificates: CertificatesService,
    bundles: BundlesService,
    stop: CancellationToken,
) -> anyhow::Result<()>
where
    C: tokio_stream::Stream<Item = io::Result<Bounded<transport::TlsConnection>>> + Send,
{
    Server::builder()
        .max_concurrent_streams(MAX_STREAMS)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .http2_max_header_list_size(MAX_HEADER_BYTES)
        .add_service(
            IstioCertificateServiceServer::new(certificates.clone())
                .max_decoding_message_size(MAX_MESSAGE_BYTES),
        )
        .add_service(ProgramsServer::new(certificates).max_decoding_message_size(MAX_MESSAGE_BYTES))
        .add_service(TrustBundlesServer::new(bundles).max_decoding_message_size(MAX_MESSAGE_BYTES))
        .serve_with_incoming_shutdown(incoming, stop.cancelled())
        .await
        .context("the gRPC server ended")
}

async fn serve_admin(
    listener: UnixListener,
    admin: AdminService,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    // The socket's mode lets nobody else in; this holds in the moment before it is set, too.
    let ours = nix::unistd::geteuid().as_raw();
    let incoming = UnixListenerStream::new(listener).filter(move |stream| {
        stream.as_ref().map_or(true, |stream| {
            stream
                .peer_cred()
                .is_ok_and(|peer| peer.uid() == ours || peer.uid() == 0)
        })
    });
    Server::builder()
        .max_concurrent_streams(MAX_STREAMS)
        .add_service(AdminServer::new(admin).max_decoding_message_size(MAX_MESSAGE_BYTES))
        .serve_with_incoming_shutdown(incoming, stop.cancelled())
        .await
        .context("the admin server ended")
}

fn bind_admin(path: &Path) -> anyhow::Result<UnixListener> {
    let folder = path.parent().context("admin_socket has no directory")?;
    socket_folder(folder)?;
    // The data directory is locked, so a socket that is still here belongs to a CA that is gone.
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("removing {}", path.display()));
        }
        _ => {}
    }
    let listener =
        UnixListener::bind(path).with_context(|| format!("listening on {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
        .with_context(|| format!("closing {} to others", path.display()))?;
    Ok(listener)
}
