// SPDX-License-Identifier: Apache-2.0
use arc_swap::ArcSwapOption;
use podveil_ca_client::{Svid, TrustBundle, verify};
use podveil_identity::WorkloadIdentity;
use rustls::client::Resumption;
use rustls::server::NoServerSessionStorage;
use rustls::sign::SingleCertAndKey;
use rustls::{ClientConfig, ServerConfig};
use std::sync::Arc;

const ALPN: &[u8] = b"h2";

/// TLS configuration of one workload for both sides, made once for a pair of SVID and trust bundle.
#[derive(Debug)]
pub struct Configs {
    svid: Arc<Svid>,
    bundle: Arc<TrustBundle>,
    server: Arc<ServerConfig>,
    /// Trusts nobody yet: [`Configs::client`] names the peer.
    client: ClientConfig,
}

impl Configs {
    pub fn new(svid: Arc<Svid>, bundle: Arc<TrustBundle>) -> Self {
        let resolver = Arc::new(SingleCertAndKey::from(svid.certified_key()));
        let verifier = |expected| Arc::new(verify::Verifier::new(bundle.clone(), expected));

        let mut server = ServerConfig::builder_with_provider(verify::provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("the provider has the suites of TLS 1.3")
            .with_client_cert_verifier(verifier(verify::Expected::AnyWorkload))
            .with_cert_resolver(resolver.clone());
        server.alpn_protocols = vec![ALPN.to_vec()];
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;

        let mut client = ClientConfig::builder_with_provider(verify::provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("the provider has the suites of TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(verifier(verify::Expected::Exactly(Vec::new())))
            .with_client_cert_resolver(resolver);
        client.alpn_protocols = vec![ALPN.to_vec()];
        client.enable_sni = false;
        client.resumption = Resumption::disabled();

        Self {
            svid,
            bundle,
            server: Arc::new(server),
            client,
        }
    }

    pub fn svid(&self) -> &Arc<Svid> {
        &self.svid
    }

    pub fn bundle(&self) -> &Arc<TrustBundle> {
        &self.bundle
    }

    /// Takes any workload of our trust domain as a client: which of them may connect is for policy to say.
    pub fn server(&self) -> Arc<ServerConfig> {
        self.server.clone()
    }

    /// Takes exactly these workloads as the server. A server with another identity is refused inside the handshake,
    /// before it sees our certificate. An empty list takes nobody.
    pub fn client(&self, expected: &[WorkloadIdentity]) -> Arc<ClientConfig> {
        let ids = expected.iter().map(WorkloadIdentity::spiffe_id).collect();
        let mut config = self.client.clone();
        config
            .dangerous()
            .set_certificate_verifier(Arc::new(verify::Verifier::new(
                self.bundle.clone(),
                verify::Expected::Exactly(ids),
            )));
        Arc::new(config)
    }
}

/// The newest [`Configs`] of one workload. Reading takes no lock.
#[derive(Debug, Default)]
pub struct ConfigCache {
    newest: ArcSwapOption<Configs>,
}

impl ConfigCache {
    /// The configuration for this pair, made now if the pair is new.
    pub fn configs(&self, svid: &Arc<Svid>, bundle: &Arc<TrustBundle>) -> Arc<Configs> {
        if let Some(configs) = &*self.newest.load()
            && Arc::ptr_eq(&configs.svid, svid)
            && Arc::ptr_eq(&configs.bundle, bundle)
        {
            return configs.clone();
        }
        let configs = Arc::new(Configs::new(svid.clone(), bundle.clone()));
        self.newest.store(Some(configs.clone()));
        configs
    }
}
