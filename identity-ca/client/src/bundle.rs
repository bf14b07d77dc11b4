// SPDX-License-Identifier: Apache-2.0
use pem::{EncodeConfig, LineEnding, Pem};
use podveil_identity::TrustDomain;
use podveil_proto::podveil::node::v1 as wire;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, TrustAnchor};
use std::fmt;

/// More roots than any rotation needs. Bounds what a peer can make a verifier try.
const MAX_ROOTS: usize = 16;

/// The roots of one trust domain. Empty `roots` means that nobody is trusted.
#[derive(Clone)]
pub struct TrustBundle {
    pub trust_domain: TrustDomain,
    /// Grows with each change at the CA; 0 for a bundle that was read from a file.
    pub sequence: u64,
    pub roots: Vec<CertificateDer<'static>>,
    /// Certificates issued before this generation are to be replaced now.
    pub certificate_generation: u64,
    /// `roots` as the verifier wants them. INVARIANT: one for each root, so a bundle is never half readable.
    anchors: Vec<TrustAnchor<'static>>,
}

/// Why a bundle is not used. Nothing of an unreadable bundle is.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    #[error("a trust bundle holds at most {MAX_ROOTS} roots, this one {found}")]
    TooManyRoots { found: usize },
    #[error("the bundle is of trust domain {found:?}, not {expected}")]
    TrustDomain {
        expected: TrustDomain,
        found: String,
    },
    #[error("the trust bundle is not PEM")]
    NotPem(#[source] rustls_pki_types::pem::Error),
    #[error("root {index} of the trust bundle is not an X.509 certificate")]
    NotACertificate {
        index: usize,
        #[source]
        source: webpki::Error,
    },
}

impl TrustBundle {
    /// # Errors
    /// If there are too many roots or one is not a certificate.
    pub fn new(
        trust_domain: TrustDomain,
        sequence: u64,
        roots: Vec<CertificateDer<'static>>,
        certificate_generation: u64,
    ) -> Result<Self, BundleError> {
        if roots.len() > MAX_ROOTS {
            return Err(BundleError::TooManyRoots { found: roots.len() });
        }
        let anchors = roots
            .iter()
            .enumerate()
            .map(
                |(index, root)| match webpki::anchor_from_trusted_cert(root) {
                    Ok(anchor) => Ok(anchor.to_owned()),
                    Err(source) => Err(BundleError::NotACertificate { index, source }),
                },
            )
            .collect::<Result<_, _>>()?;
        Ok(Self {
            trust_domain,
            sequence,
            roots,
            certificate_generation,
            anchors,
        })
    }

    /// Nobody is trusted: what stands before the first bundle is known.
    pub fn empty(trust_domain: TrustDomain) -> Self {
        Self {
            trust_domain,
            sequence: 0,
            roots: Vec::new(),
            certificate_generation: 0,
            anchors: Vec::new(),
        }
    }

    /// A bundle file: certificates in PEM, text around them ignored.
    /// # Errors
    /// If the file is not PEM or holds something else than certificates that can be read.
    pub fn from_pem(trust_domain: TrustDomain, text: &[u8]) -> Result<Self, BundleError> {
        let roots = CertificateDer::pem_slice_iter(text)
            .collect::<Result<Vec<_>, _>>()
            .map_err(BundleError::NotPem)?;
        Self::new(trust_domain, 0, roots, 0)
    }

    /// # Errors
    /// If the message is of another trust domain or a root cannot be read.
    pub fn from_wire(
        expected: &TrustDomain,
        message: wire::TrustBundle,
    ) -> Result<Self, BundleError> {
        if message.trust_domain != expected.as_str() {
            return Err(BundleError::TrustDomain {
                expected: expected.clone(),
                found: message.trust_domain,
            });
        }
        let roots = message
            .roots
            .into_iter()
            .map(CertificateDer::from)
            .collect();
        Self::new(
            expected.clone(),
            message.sequence,
            roots,
            message.certificate_generation,
        )
    }

    pub fn to_wire(&self) -> wire::TrustBundle {
        wire::TrustBundle {
            trust_domain: self.trust_domain.as_str().to_owned(),
            sequence: self.sequence,
            roots: self.roots.iter().map(|root| root.to_vec()).collect(),
            certificate_generation: self.certificate_generation,
        }
    }

    pub fn to_pem(&self) -> String {
        let unix = EncodeConfig::new().set_line_ending(LineEnding::LF);
        self.roots
            .iter()
            .map(|root| pem::encode_config(&Pem::new("CERTIFICATE", root.as_ref()), unix))
            .collect()
    }

    pub(crate) fn anchors(&self) -> &[TrustAnchor<'static>] {
        &self.anchors
    }
}

impl fmt::Debug for TrustBundle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TrustBundle")
            .field("trust_domain", &self.trust_domain.as_str())
            .field("sequence", &self.sequence)
            .field("roots", &self.roots.len())
            .field("certificate_generation", &self.certificate_generation)
            .finish_non_exhaustive()
    }
}

impl PartialEq for TrustBundle {
    fn eq(&self, other: &Self) -> bool {
        (
            &self.trust_domain,
            self.sequence,
            &self.roots,
            self.certificate_generation,
        ) == (
            &other.trust_domain,
            other.sequence,
            &other.roots,
            other.certificate_generation,
        )
    }
}
