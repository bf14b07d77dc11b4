// SPDX-License-Identifier: Apache-2.0
//! gRPC between Podveil's programs: TLS 1.3 on both sides, HTTP/2, the other's exact SPIFFE ID.

mod channel;
mod incoming;
mod sources;

pub use channel::{ConnectError, channel};
pub(crate) use channel::{Shown, lazy};
pub use incoming::{Peer, Refusals, TlsConnection, incoming};
pub use sources::{Place, Places, Sources};

use crate::verify::{self, Expected, Verifier};
use crate::{Credentials, ProgramCredentials, Svid, TrustBundle};
use rustls::client::Resumption;
use rustls::server::NoServerSessionStorage;
use rustls::sign::SingleCertAndKey;
use rustls::{ClientConfig, ServerConfig};
use std::sync::{Arc, Mutex, PoisonError};

const TLS13_ONLY: &[&rustls::SupportedProtocolVersion] = &[&rustls::version::TLS13];

/// For a server that shows `credentials` to `clients`. With `optional`, a client may show no certificate at all (first
/// contact with the CA); one that does show a certificate is verified all the same.
///
/// # Panics
/// Never: TLS 1.3 is part of the provider.
pub fn server_config(
    credentials: &Credentials,
    clients: Expected,
    optional: bool,
) -> Arc<ServerConfig> {
    let mut verifier = Verifier::new(credentials.bundle.clone(), clients);
    if optional {
        verifier = verifier.allow_anonymous_clients();
    }
    let mut config = ServerConfig::builder_with_provider(verify::provider())
        .with_protocol_versions(TLS13_ONLY)
        .expect("the provider has TLS 1.3 cipher suites")
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(resolver(&credentials.svid));
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Arc::new(config)
}

/// [`server_config`] for [`incoming`], made anew whenever the SVID or the bundle has changed. `None` while there is no
/// SVID yet.
pub fn server_configs(
    credentials: &ProgramCredentials,
    clients: Expected,
    optional: bool,
) -> impl Fn() -> Option<Arc<ServerConfig>> + Send + 'static {
    let credentials = credentials.clone();
    let made: Mutex<Option<(Arc<Credentials>, Arc<ServerConfig>)>> = Mutex::new(None);
    move || {
        let current = credentials.current()?;
        let mut made = made.lock().unwrap_or_else(PoisonError::into_inner);
        match &*made {
            Some((of, config)) if Arc::ptr_eq(of, &current) => Some(config.clone()),
            _ => {
                let config = server_config(&current, clients.clone(), optional);
                *made = Some((current, config.clone()));
                Some(config)
            }
        }
    }
}

/// For a client that shows `svid` (nothing on first contact) and expects `server`. What name the connector is given does
/// not matter: none is sent, and the server is known by its SPIFFE ID.
///
/// # Panics
/// Never: TLS 1.3 is part of the provider.
pub fn client_config(
    svid: Option<&Svid>,
    bundle: &Arc<TrustBundle>,
    server: Expected,
) -> Arc<ClientConfig> {
    let builder = ClientConfig::builder_with_provider(verify::provider())
        .with_protocol_versions(TLS13_ONLY)
        .expect("the provider has TLS 1.3 cipher suites")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Verifier::new(bundle.clone(), server)));
    let mut config = match svid {
        Some(svid) => builder.with_client_cert_resolver(resolver(svid)),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.enable_sni = false;
    config.resumption = Resumption::disabled();
    Arc::new(config)
}

fn resolver(svid: &Svid) -> Arc<SingleCertAndKey> {
    Arc::new(SingleCertAndKey::from(svid.certified_key()))
}
