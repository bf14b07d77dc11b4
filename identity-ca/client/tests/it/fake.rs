// SPDX-License-Identifier: Apache-2.0
//! A scripted CA behind the real transport: real sockets, real TLS, answers that a test decides.

use crate::ca::{CA, LeafSpec, NODE, TestCa, bundle, leaf};
use podveil_ca_client::transport::{Peer, incoming, server_config};
use podveil_ca_client::verify::Expected;
use podveil_ca_client::{Credentials, GENERATION_HEADER, Svid, TrustBundle};
use podveil_proto::istio::v1::auth::istio_certificate_service_server::{
    IstioCertificateService, IstioCertificateServiceServer,
};
use podveil_proto::istio::v1::auth::{IstioCertificateRequest, IstioCertificateResponse};
use podveil_proto::podveil::ca::v1::programs_server::{Programs, ProgramsServer};
use podveil_proto::podveil::ca::v1::{ProgramSvidRequest, ProgramSvidResponse};
use podveil_proto::podveil::node::v1 as wire;
use podveil_proto::podveil::node::v1::trust_bundles_server::{TrustBundles, TrustBundlesServer};
use prost_types::value::Kind;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc, watch};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

pub const TOKEN: &str = "token-of-n1";

#[derive(Clone)]
pub struct FakeCa(Arc<Inner>);

struct Inner {
    address: SocketAddr,
    issuing: Mutex<Issuing>,
    bundle: watch::Sender<Arc<TrustBundle>>,
    log: watch::Sender<Log>,
    end_streams: Notify,
}

struct Issuing {
    ca: Arc<TestCa>,
    svid: Arc<Svid>,
    generation: u64,
    life: Duration,
    refuse_workloads: bool,
}

/// What the CA was asked and told.
#[derive(Clone, Debug, Default)]
pub struct Log {
    /// The ID proved by TLS, and whether a token was shown.
    pub programs: Vec<(Option<String>, bool)>,
    pub workloads: Vec<String>,
    pub in_use: Vec<wire::BundleInUse>,
    /// Sequences of the bundles sent.
    pub sent: Vec<u64>,
}

impl FakeCa {
    pub async fn start(ca: Arc<TestCa>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let this = Self(Arc::new(Inner {
            address: listener.local_addr().unwrap(),
            issuing: Mutex::new(Issuing {
                svid: ca.svid(CA),
                generation: 1,
                life: Duration::from_secs(24 * 3600),
                refuse_workloads: false,
                ca: ca.clone(),
            }),
            bundle: watch::Sender::new(bundle(1, &[&ca], 1)),
            log: watch::Sender::new(Log::default()),
            end_streams: Notify::new(),
        }));
        let config = {
            let this = this.clone();
            move || {
                let credentials = Credentials {
                    svid: this.0.issuing.lock().unwrap().svid.clone(),
                    bundle: this.0.bundle.borrow().clone(),
                };
                Some(server_config(&credentials, Expected::AnyProgram, true))
            }
        };
        let server = tonic::transport::Server::builder()
            .add_service(ProgramsServer::new(this.clone()))
            .add_service(TrustBundlesServer::new(this.clone()))
            .add_service(IstioCertificateServiceServer::new(this.clone()))
            .serve_with_incoming(incoming(listener, config, Arc::default()));
        tokio::spawn(server);
        this
    }

    pub fn address(&self) -> String {
        self.0.address.to_string()
    }

    pub fn send_bundle(&self, bundle: Arc<TrustBundle>) {
        self.0.bundle.send_replace(bundle);
    }

    /// As when the CA is restarted.
    pub fn end_bundle_streams(&self) {
        self.0.end_streams.notify_waiters();
    }

    pub fn issue_from(&self, ca: &Arc<TestCa>, generation: u64) {
        let mut issuing = self.0.issuing.lock().unwrap();
        issuing.ca = ca.clone();
        issuing.svid = ca.svid(CA);
        issuing.generation = generation;
    }

    pub fn issue_for(&self, life: Duration) {
        self.0.issuing.lock().unwrap().life = life;
    }

    pub fn refuse_workloads(&self, refuse: bool) {
        self.0.issuing.lock().unwrap().refuse_workloads = refuse;
    }

    pub fn log(&self) -> Log {
        self.0.log.borrow().clone()
    }

    /// Waits until the log is as the test wants it.
    pub async fn until(&self, what: impl FnMut(&Log) -> bool) -> Log {
        let mut log = self.0.log.subscribe();
        let done = tokio::time::timeout(Duration::from_secs(20), log.wait_for(what)).await;
        match done {
            Ok(log) => log.unwrap().clone(),
            Err(_) => panic!("not within 20 s; the log holds {:?}", self.log()),
        }
    }

    fn issue(&self, csr: &str, uri: &'static str) -> (Vec<String>, u64) {
        let issuing = self.0.issuing.lock().unwrap();
        let plain = leaf(uri);
        let spec = LeafSpec {
            not_before: plain
                .not_before
                .max(std::time::SystemTime::now() - issuing.life / 10),
            not_after: std::time::SystemTime::now() + issuing.life,
            ..plain
        };
        (issuing.ca.answer(csr, &spec), issuing.generation)
    }
}

fn peer<T>(request: &Request<T>) -> Option<String> {
    let peer = request.extensions().get::<Peer>().unwrap();
    peer.id.as_ref().map(ToString::to_string)
}

#[tonic::async_trait]
impl Programs for FakeCa {
    async fn issue_program_svid(
        &self,
        request: Request<ProgramSvidRequest>,
    ) -> Result<Response<ProgramSvidResponse>, Status> {
        let id = peer(&request);
        let token = request.metadata().get("authorization").cloned();
        self.0
            .log
            .send_modify(|log| log.programs.push((id.clone(), token.is_some())));
        let by_token = token.is_some_and(|token| token == format!("Bearer {TOKEN}").as_str());
        if id.as_deref() != Some(NODE) && !by_token {
            return Err(Status::unauthenticated("neither token nor SVID"));
        }
        let (cert_chain, certificate_generation) = self.issue(&request.get_ref().csr, NODE);
        Ok(Response::new(ProgramSvidResponse {
            cert_chain,
            certificate_generation,
        }))
    }
}

#[tonic::async_trait]
impl IstioCertificateService for FakeCa {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        if peer(&request).as_deref() != Some(NODE) {
            return Err(Status::unauthenticated("not a node"));
        }
        let request = request.into_inner();
        let metadata = request.metadata.unwrap();
        let Some(Kind::StringValue(uri)) = &metadata.fields["ImpersonatedIdentity"].kind else {
            return Err(Status::invalid_argument("no identity"));
        };
        self.0
            .log
            .send_modify(|log| log.workloads.push(uri.clone()));
        if self.0.issuing.lock().unwrap().refuse_workloads {
            return Err(Status::permission_denied("no such workload on this node"));
        }
        let (cert_chain, generation) = self.issue(&request.csr, uri.clone().leak());
        let mut response = Response::new(IstioCertificateResponse { cert_chain });
        response
            .metadata_mut()
            .insert(GENERATION_HEADER, generation.to_string().parse().unwrap());
        Ok(response)
    }
}

#[tonic::async_trait]
impl TrustBundles for FakeCa {
    type StreamStream = ReceiverStream<Result<wire::TrustBundle, Status>>;

    async fn stream(
        &self,
        request: Request<Streaming<wire::BundleInUse>>,
    ) -> Result<Response<Self::StreamStream>, Status> {
        assert_eq!(peer(&request).as_deref(), Some(NODE));
        let this = self.clone();
        let mut said = request.into_inner();
        let (bundles, answer) = mpsc::channel(1);
        let mut bundle = self.0.bundle.subscribe();
        bundle.mark_changed();
        tokio::spawn(async move {
            let end = this.0.end_streams.notified();
            tokio::pin!(end);
            loop {
                tokio::select! {
                    () = &mut end => return,
                    message = said.next() => match message {
                        Some(Ok(message)) => this.0.log.send_modify(|log| log.in_use.push(message)),
                        _ => return,
                    },
                    _ = bundle.changed() => {
                        let bundle = bundle.borrow_and_update().to_wire();
                        let sequence = bundle.sequence;
                        let _ = bundles.send(Ok(bundle)).await;
                        this.0.log.send_modify(|log| log.sent.push(sequence));
                    }
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(answer)))
    }
}
