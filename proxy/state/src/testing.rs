// SPDX-License-Identifier: Apache-2.0
//! What tests of the paths stand on: certificates made at test time, a network that is loopback, records kept.

use crate::{
    ConnectionId, Dial, Dialing, Limits, PodContext, Recorder, StateHandle, StateWriter, channel,
};
use podveil_ca_client::{Svid, TrustBundle};
use podveil_flow::ConnectionRecord;
use podveil_identity::{TrustDomain, WorkloadIdentity};
use podveil_model::Workload;
use podveil_net::{ConnectError, Counters, prepare_application};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls_pki_types::PrivateKeyDer;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// A CA with its key in memory.
#[derive(Debug)]
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pub bundle: Arc<TrustBundle>,
}

impl Authority {
    pub fn new() -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let root = params.self_signed(&key).expect("a root").der().clone();
        let trust_domain = TrustDomain::new("cluster.local").expect("a legal trust domain");
        let bundle = TrustBundle::new(trust_domain, 1, vec![root], 1).expect("a bundle");
        Self {
            issuer: Issuer::new(params, key),
            bundle: Arc::new(bundle),
        }
    }

    pub fn svid(&self, identity: &WorkloadIdentity) -> Arc<Svid> {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        let uri = identity.to_string().try_into().expect("an ASCII name");
        params.subject_alt_names = vec![SanType::URI(uri)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let leaf = params.signed_by(&key, &self.issuer).expect("a leaf");
        let key = PrivateKeyDer::try_from(key.serialize_der()).expect("a PKCS#8 key");
        Arc::new(Svid::from_der(vec![leaf.der().clone()], &key, 1).expect("an SVID"))
    }
}

impl Default for Authority {
    fn default() -> Self {
        Self::new()
    }
}

/// A network in which every address is a listener on loopback, or nobody's. Keeps what was dialled.
#[derive(Debug, Default)]
pub struct Loopback {
    routes: Mutex<HashMap<SocketAddr, SocketAddr>>,
    dialled: Mutex<Vec<(Option<IpAddr>, SocketAddr)>>,
}

impl Loopback {
    /// Listens on loopback in the place of `address`.
    pub async fn listen(&self, address: &str) -> TcpListener {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let actual = listener.local_addr().expect("a bound socket");
        self.routes
            .lock()
            .expect("no test panicked while it held this")
            .insert(address.parse().expect("an address"), actual);
        listener
    }

    /// From which address, and to which, so far.
    pub fn dialled(&self) -> Vec<(Option<IpAddr>, SocketAddr)> {
        self.dialled
            .lock()
            .expect("no test panicked while it held this")
            .clone()
    }
}

impl Dial for Loopback {
    fn dial(&self, from: Option<IpAddr>, to: SocketAddr, _within: Duration) -> Dialing<'_> {
        let unheld = "no test panicked while it held this";
        self.dialled.lock().expect(unheld).push((from, to));
        let route = self.routes.lock().expect(unheld).get(&to).copied();
        Box::pin(async move {
            let refused = |source| ConnectError::Refused {
                destination: to,
                source,
            };
            let actual = route.ok_or_else(|| {
                refused(std::io::Error::from(std::io::ErrorKind::ConnectionRefused))
            })?;
            let stream = TcpStream::connect(actual).await.map_err(refused)?;
            prepare_application(&stream).map_err(refused)?;
            Ok(stream)
        })
    }
}

/// Two ends of one TCP connection: the application's, and the accepted one, prepared as a path would.
pub async fn connection() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("a bound socket");
    let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
    let (far, _) = far.expect("a connection");
    prepare_application(&far).expect("socket options");
    (near.expect("a connection"), far)
}

/// Keeps every record.
#[derive(Debug, Default)]
pub struct Records {
    opened: watch::Sender<usize>,
    closed: watch::Sender<Vec<ConnectionRecord>>,
}

impl Records {
    /// The records of connections that are over, once there are so many.
    pub async fn closed(&self, count: usize) -> Vec<ConnectionRecord> {
        let mut closed = self.closed.subscribe();
        let enough = closed.wait_for(|records| records.len() >= count).await;
        enough.expect("the sender is ours").clone()
    }

    /// Waits until so many connections were opened.
    pub async fn opened(&self, count: usize) {
        let mut opened = self.opened.subscribe();
        let enough = opened.wait_for(|opened| *opened >= count).await;
        enough.expect("the sender is ours");
    }
}

impl Recorder for Records {
    fn opened(&self, _: &ConnectionRecord, _: &Arc<Counters>) -> ConnectionId {
        self.opened.send_modify(|count| *count += 1);
        ConnectionId(0)
    }

    fn closed(&self, connection: &ConnectionRecord, opened: Option<ConnectionId>) {
        assert_eq!(opened.is_some(), connection.was_opened());
        self.closed
            .send_modify(|records| records.push(connection.clone()));
    }
}

/// One pod, with everything about it in the test's hand.
#[derive(Debug)]
pub struct Rig {
    pub authority: Authority,
    pub pod: Arc<PodContext>,
    pub network: Arc<Loopback>,
    pub records: Arc<Records>,
    pub state: StateWriter,
    pub svid: watch::Sender<Option<Arc<Svid>>>,
    pub bundle: watch::Sender<Arc<TrustBundle>>,
}

impl Rig {
    /// The pod of this workload, which holds a certificate.
    pub fn new(workload: &Arc<Workload>, limits: Limits) -> Self {
        let authority = Authority::new();
        let (state, handle, _questions): (StateWriter, StateHandle, _) = channel(false);
        state.update(|view| {
            view.insert_workload(workload.clone());
        });
        let held = authority.svid(&workload.identity);
        let (svid, svid_seen) = watch::channel(Some(held));
        let (bundle, bundle_seen) = watch::channel(authority.bundle.clone());
        let network = Arc::new(Loopback::default());
        let records = Arc::new(Records::default());
        let pod = PodContext {
            uid: workload.uid.clone(),
            identity: workload.identity.clone(),
            sockets: network.clone(),
            state: handle,
            svid: svid_seen,
            bundle: bundle_seen,
            limits,
            recorder: records.clone(),
            drain: CancellationToken::new(),
            stop: CancellationToken::new(),
        };
        Self {
            authority,
            pod: Arc::new(pod),
            network,
            records,
            state,
            svid,
            bundle,
        }
    }
}
