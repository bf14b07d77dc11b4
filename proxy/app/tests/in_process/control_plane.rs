// SPDX-License-Identifier: Apache-2.0
//! A scripted control plane on loopback: xDS from the real server, a CA that signs whatever it is asked, and the reports
//! it got. The gRPC links are without TLS: that is `podveil-ca-client`'s and tested there.

use podveil_ca_client::{Credentials, Key, ProgramCredentials, Svid, TrustBundle};
use podveil_ca_issuer::{Authority, Csr};
use podveil_identity::{ProgramIdentity, SpiffeId, TrustDomain, WorkloadIdentity};
use podveil_node::proxy::Links;
use podveil_proto::istio::v1::auth::istio_certificate_service_server::{
    IstioCertificateService, IstioCertificateServiceServer,
};
use podveil_proto::istio::v1::auth::{IstioCertificateRequest, IstioCertificateResponse};
use podveil_proto::podveil::node::v1::reports_server::{Reports, ReportsServer};
use podveil_proto::podveil::node::v1::{NodeReport, ReportReceived};
use podveil_reports::Replicas;
use podveil_tls::Configs;
use podveil_xds_server::{Caller, DiscoveryService, Publisher};
use prost_types::value::Kind;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};

const LIFE: Duration = Duration::from_secs(3600);

pub struct ControlPlane {
    pub publisher: Publisher,
    pub reports: watch::Receiver<Option<NodeReport>>,
    ca: Arc<Ca>,
    channel: Channel,
    stop: CancellationToken,
}

impl ControlPlane {
    pub async fn start() -> Self {
        let stop = CancellationToken::new();
        let publisher = Publisher::new(7);
        let (reported, reports) = watch::channel(None);
        let ca = Arc::new(Ca::new());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let anyone = |_: &_| Ok(Caller("n1".into()));
        let server = Server::builder()
            .add_service(DiscoveryService::new(
                publisher.clone(),
                anyone,
                stop.child_token(),
            ))
            .add_service(ReportsServer::new(Listener { reported }))
            .add_service(IstioCertificateServiceServer::from_arc(ca.clone()))
            .serve_with_incoming_shutdown(
                TcpListenerStream::new(listener),
                stop.clone().cancelled_owned(),
            );
        tokio::spawn(server);
        let channel = Endpoint::from_shared(format!("http://{address}"))
            .unwrap()
            .connect_lazy();
        Self {
            publisher,
            reports,
            ca,
            channel,
            stop,
        }
    }

    pub fn links(&self) -> Links {
        let id = ProgramIdentity::Node("n1".parse().unwrap()).spiffe_id(&trust_domain());
        let credentials = Credentials {
            svid: Arc::new(self.ca.svid(&id)),
            bundle: self.ca.bundle(),
        };
        Links {
            credentials: ProgramCredentials::fixed(credentials),
            ca: self.channel.clone(),
            controller: self.channel.clone(),
            replicas: Some(Replicas::fixed(vec![self.channel.clone()])),
            mark: None,
        }
    }

    /// What a workload elsewhere has: its own certificate and the same trust.
    pub fn workload(&self, identity: &WorkloadIdentity) -> Configs {
        let svid = Arc::new(self.ca.svid(&identity.spiffe_id()));
        Configs::new(svid, self.ca.bundle())
    }

    /// Waits for a report that holds.
    pub async fn report(&self, holds: impl Fn(&NodeReport) -> bool) -> NodeReport {
        let mut reports = self.reports.clone();
        let waited = reports.wait_for(|report| report.as_ref().is_some_and(&holds));
        match tokio::time::timeout(Duration::from_secs(10), waited).await {
            Ok(report) => report.unwrap().clone().unwrap(),
            Err(_) => panic!("no such report; the last: {:?}", self.reports.borrow()),
        }
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

pub fn trust_domain() -> TrustDomain {
    TrustDomain::new("cluster.local").unwrap()
}

struct Ca {
    root: Authority,
    issuing: Authority,
}

impl Ca {
    fn new() -> Self {
        let now = SystemTime::now();
        let root = Authority::new_root(&trust_domain(), now, LIFE * 2).unwrap();
        let issuing = root.new_issuing(now, LIFE * 2).unwrap();
        Self { root, issuing }
    }

    fn bundle(&self) -> Arc<TrustBundle> {
        let roots = vec![self.root.certificate().clone()];
        Arc::new(TrustBundle::new(trust_domain(), 3, roots, 1).unwrap())
    }

    fn issue(&self, csr: &str, id: &SpiffeId) -> podveil_ca_issuer::Leaf {
        let csr = Csr::from_pem(csr).unwrap();
        self.issuing
            .issue(&csr.key, id, LIFE, SystemTime::now())
            .unwrap()
    }

    fn svid(&self, id: &SpiffeId) -> Svid {
        let key = Key::generate().unwrap();
        let leaf = self.issue(&key.request(id).unwrap(), id);
        let chain = vec![leaf.certificate, self.issuing.certificate().clone()];
        Svid::new(chain, &key, 1).unwrap()
    }
}

#[tonic::async_trait]
impl IstioCertificateService for Ca {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let request = request.into_inner();
        let metadata = request.metadata.unwrap();
        let Some(Kind::StringValue(id)) = &metadata.fields["ImpersonatedIdentity"].kind else {
            return Err(Status::invalid_argument("no identity"));
        };
        let leaf = self.issue(&request.csr, &SpiffeId::new(id).unwrap());
        let cert_chain = podveil_ca_issuer::chain(&leaf, &self.issuing, [&self.root]);
        let mut response = Response::new(IstioCertificateResponse { cert_chain });
        let generation = "1".parse().unwrap();
        response
            .metadata_mut()
            .insert("podveil-certificate-generation", generation);
        Ok(response)
    }
}

struct Listener {
    reported: watch::Sender<Option<NodeReport>>,
}

#[tonic::async_trait]
impl Reports for Listener {
    type ReportStream = ReceiverStream<Result<ReportReceived, Status>>;

    async fn report(
        &self,
        request: Request<Streaming<NodeReport>>,
    ) -> Result<Response<Self::ReportStream>, Status> {
        let (answers, stream) = mpsc::channel(1);
        let reported = self.reported.clone();
        tokio::spawn(async move {
            let mut reports = request.into_inner();
            while let Ok(Some(report)) = reports.message().await {
                let sequence = report.sequence;
                reported.send_replace(Some(report));
                if answers
                    .send(Ok(ReportReceived {
                        sequence,
                        ..ReportReceived::default()
                    }))
                    .await
                    .is_err()
                {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}
