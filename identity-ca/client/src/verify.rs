// SPDX-License-Identifier: Apache-2.0
//! The rules for a peer's X.509-SVID, and verifiers that hold a rustls handshake to them.
//!
//! webpki builds and checks the path, the dates and the extended key usage. It takes a leaf with two URI SANs and a
//! leaf that may only sign certificates, so the rules for SPIFFE leaves (X509-SVID §4 and §5) are checked here.

use crate::TrustBundle;
use podveil_identity::{ProgramIdentity, SpiffeId, TrustDomain, WorkloadIdentity};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{self, kx_group};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, SignatureScheme,
    SupportedCipherSuite,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use webpki::{EndEntityCert, KeyUsage};
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::{FromDer, X509Certificate};

/// A chain from the peer has a leaf and one or two intermediates.
const MAX_CHAIN: usize = 8;

/// Whom the peer must prove to be.
#[derive(Clone, Debug)]
pub enum Expected {
    /// Any ID of our trust domain.
    Any,
    AnyProgram,
    AnyWorkload,
    /// One of these.
    Exactly(Vec<SpiffeId>),
}

/// What a leaf says, once it holds to the rules of X.509-SVIDs. Nothing about who signed it.
#[derive(Clone, Debug)]
pub struct Leaf {
    pub id: SpiffeId,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
    /// Lower-case hexadecimal.
    pub serial: String,
}

/// Why a peer is not believed.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    #[error("the peer showed {found} certificates, at most {MAX_CHAIN} are read")]
    ChainTooLong { found: usize },
    #[error("the leaf is a CA")]
    IsCa,
    #[error("the leaf may sign certificates or revocation lists")]
    MaySign,
    #[error("the leaf is not a certificate that can be read")]
    Malformed,
    #[error("the peer showed no certificate")]
    NoCertificate,
    #[error("the leaf may not make signatures (key usage without digitalSignature)")]
    NoDigitalSignature,
    #[error("the leaf's URI SAN is not a SPIFFE ID")]
    NotSpiffe(#[source] podveil_identity::IdentityError),
    #[error("the chain does not lead to the trust bundle")]
    Path(#[source] webpki::Error),
    #[error("{id} has no path: it names a trust domain, not a workload or program")]
    RootPath { id: SpiffeId },
    #[error("{id} is not of trust domain {expected}")]
    TrustDomain { id: SpiffeId, expected: TrustDomain },
    #[error("{id} is not who was expected")]
    Unexpected { id: SpiffeId },
    #[error("the leaf has {found} URI SANs, an SVID has exactly one")]
    UriSans { found: usize },
}

/// The SPIFFE ID of a peer whose chain a [`Verifier`] has taken.
/// # Errors
/// If the first certificate breaks the rules of X.509-SVIDs.
pub fn peer_id(certificates: &[CertificateDer<'_>]) -> Result<SpiffeId, PeerError> {
    leaf(certificates).map(|leaf| leaf.id)
}

/// The leaf's own facts; says nothing about who signed it.
/// # Errors
/// If the first certificate breaks the rules of X.509-SVIDs.
pub fn leaf(certificates: &[CertificateDer<'_>]) -> Result<Leaf, PeerError> {
    let der = certificates.first().ok_or(PeerError::NoCertificate)?;
    let (rest, certificate) = X509Certificate::from_der(der).map_err(|_| PeerError::Malformed)?;
    if !rest.is_empty() {
        return Err(PeerError::Malformed);
    }
    let mut uris = Vec::new();
    let mut usage = None;
    for extension in certificate.extensions() {
        match extension.parsed_extension() {
            ParsedExtension::BasicConstraints(constraints) if constraints.ca => {
                return Err(PeerError::IsCa);
            }
            // A second key usage or SAN extension is already an error of webpki; here the strictest of all counts.
            ParsedExtension::KeyUsage(found) => {
                if found.key_cert_sign() || found.crl_sign() {
                    return Err(PeerError::MaySign);
                }
                usage = Some(found.digital_signature());
            }
            ParsedExtension::SubjectAlternativeName(names) => {
                uris.extend(names.general_names.iter().filter_map(|name| match name {
                    GeneralName::URI(uri) => Some(*uri),
                    _ => None,
                }));
            }
            ParsedExtension::ParseError { .. } => return Err(PeerError::Malformed),
            _ => {}
        }
    }
    if usage != Some(true) {
        return Err(PeerError::NoDigitalSignature);
    }
    let [uri] = uris[..] else {
        return Err(PeerError::UriSans { found: uris.len() });
    };
    let id = SpiffeId::new(uri).map_err(|source| {
        PeerError::NotSpiffe(podveil_identity::IdentityError::NotSpiffe {
            text: uri.to_owned(),
            source,
        })
    })?;
    if id.path().is_empty() || id.path() == "/" {
        return Err(PeerError::RootPath { id });
    }
    let at = |seconds: i64| {
        u64::try_from(seconds)
            .ok()
            .and_then(|seconds| UNIX_EPOCH.checked_add(Duration::from_secs(seconds)))
            .ok_or(PeerError::Malformed)
    };
    Ok(Leaf {
        id,
        not_before: at(certificate.validity().not_before.timestamp())?,
        not_after: at(certificate.validity().not_after.timestamp())?,
        serial: certificate
            .raw_serial()
            .iter()
            .skip_while(|byte| **byte == 0)
            .map(|byte| format!("{byte:02x}"))
            .collect(),
    })
}

/// TLS 1.3 with X25519MLKEM768, X25519 and P-256, in this order. Nothing here relies on a process-wide default.
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
        let mut provider = aws_lc_rs::default_provider();
        provider
            .cipher_suites
            .retain(|suite| matches!(suite, SupportedCipherSuite::Tls13(_)));
        provider.kx_groups = vec![
            kx_group::X25519MLKEM768,
            kx_group::X25519,
            kx_group::SECP256R1,
        ];
        Arc::new(provider)
    });
    PROVIDER.clone()
}

/// Verifies peers of one trust domain, as a client and as a server.
#[derive(Debug)]
pub struct Verifier {
    bundle: Arc<TrustBundle>,
    expected: Expected,
    anonymous_clients: bool,
}

impl Verifier {
    /// Every peer must show a certificate.
    pub fn new(bundle: Arc<TrustBundle>, expected: Expected) -> Self {
        Self {
            bundle,
            expected,
            anonymous_clients: false,
        }
    }

    /// As a server, also takes clients without a certificate; one that shows a certificate is still verified.
    pub fn allow_anonymous_clients(mut self) -> Self {
        self.anonymous_clients = true;
        self
    }

    /// [`Verifier::verify`] for a whole chain, leaf first.
    /// # Errors
    /// As [`Verifier::verify`]; [`PeerError::NoCertificate`] for an empty chain.
    pub fn verify_chain(
        &self,
        chain: &[CertificateDer<'_>],
        usage: KeyUsage,
        now: UnixTime,
    ) -> Result<SpiffeId, PeerError> {
        let (leaf, intermediates) = chain.split_first().ok_or(PeerError::NoCertificate)?;
        self.verify(leaf, intermediates, usage, now)
    }

    /// # Errors
    /// If the chain does not prove one of the expected identities of our own trust domain at `now`.
    pub fn verify(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        usage: KeyUsage,
        now: UnixTime,
    ) -> Result<SpiffeId, PeerError> {
        if intermediates.len() >= MAX_CHAIN {
            return Err(PeerError::ChainTooLong {
                found: intermediates.len() + 1,
            });
        }
        let certificate = EndEntityCert::try_from(end_entity).map_err(PeerError::Path)?;
        certificate
            .verify_for_usage(
                provider().signature_verification_algorithms.all,
                self.bundle.anchors(),
                intermediates,
                now,
                usage,
                None,
                None,
            )
            .map_err(PeerError::Path)?;
        let id = peer_id(std::slice::from_ref(end_entity))?;
        if !id.is_member_of(&self.bundle.trust_domain) {
            return Err(PeerError::TrustDomain {
                id,
                expected: self.bundle.trust_domain.clone(),
            });
        }
        if self.expected.takes(&id) {
            Ok(id)
        } else {
            Err(PeerError::Unexpected { id })
        }
    }
}

impl Expected {
    fn takes(&self, id: &SpiffeId) -> bool {
        match self {
            Self::Any => true,
            Self::AnyProgram => ProgramIdentity::try_from(id).is_ok(),
            Self::AnyWorkload => WorkloadIdentity::try_from(id).is_ok(),
            Self::Exactly(ids) => ids.contains(id),
        }
    }
}

/// The alert that the peer sees follows from the variant; the whole reason stays with us as the source.
impl From<PeerError> for rustls::Error {
    fn from(error: PeerError) -> Self {
        use webpki::Error as Path;
        let certificate = match error {
            PeerError::NoCertificate => return Self::NoCertificatesPresented,
            PeerError::Malformed => CertificateError::BadEncoding,
            PeerError::Path(Path::CertExpired { time, not_after }) => {
                CertificateError::ExpiredContext { time, not_after }
            }
            PeerError::Path(Path::CertNotValidYet { time, not_before }) => {
                CertificateError::NotValidYetContext { time, not_before }
            }
            PeerError::Path(Path::UnknownIssuer) => CertificateError::UnknownIssuer,
            other => CertificateError::Other(OtherError(Arc::new(other))),
        };
        Self::InvalidCertificate(certificate)
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verify(end_entity, intermediates, KeyUsage::server_auth(), now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General(
            "only TLS 1.3 is spoken here".to_owned(),
        ))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &provider().signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn client_auth_mandatory(&self) -> bool {
        !self.anonymous_clients
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.verify(end_entity, intermediates, KeyUsage::client_auth(), now)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        ServerCertVerifier::verify_tls12_signature(self, message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        ServerCertVerifier::verify_tls13_signature(self, message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ServerCertVerifier::supported_verify_schemes(self)
    }
}
