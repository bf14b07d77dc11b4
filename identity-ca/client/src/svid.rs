// SPDX-License-Identifier: Apache-2.0
use crate::TrustBundle;
use crate::key::{Key, KeyError};
use crate::renewal::Validity;
use crate::verify::{self, Leaf, PeerError};
use pem::{EncodeConfig, LineEnding, Pem};
use podveil_identity::SpiffeId;
use rustls::sign::{CertifiedKey, SigningKey};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

/// A certificate chain with its private key. The key is inside [`Svid::certified_key`] and nowhere printed.
pub struct Svid {
    leaf: Leaf,
    generation: u64,
    certified_key: Arc<CertifiedKey>,
}

/// One consistent pair: the bundle was in use when the SVID was, and the other way round.
#[derive(Clone, Debug)]
pub struct Credentials {
    pub svid: Arc<Svid>,
    pub bundle: Arc<TrustBundle>,
}

/// Why a chain and a key are not an SVID.
#[derive(Debug, thiserror::Error)]
pub enum SvidError {
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error("the certificate is of another key than the one asked for")]
    KeyMismatch(#[source] rustls::Error),
    #[error("the certificate does not hold to the rules of X.509-SVIDs")]
    Leaf(#[source] PeerError),
}

impl Svid {
    /// `chain`: the leaf, then the intermediates, no root. `generation`: what the CA said when it issued.
    /// # Errors
    /// If the leaf breaks the rules of X.509-SVIDs or is not of this key.
    pub fn new(
        chain: Vec<CertificateDer<'static>>,
        key: &Key,
        generation: u64,
    ) -> Result<Self, SvidError> {
        Self::with_signing_key(chain, key.signing_key()?, generation)
    }

    /// As [`Svid::new`], from a key in PKCS#8, for a program that keeps one (the CA) and for tests.
    /// # Errors
    /// As [`Svid::new`].
    pub fn from_der(
        chain: Vec<CertificateDer<'static>>,
        key: &PrivateKeyDer<'_>,
        generation: u64,
    ) -> Result<Self, SvidError> {
        let key = rustls::crypto::aws_lc_rs::sign::any_ecdsa_type(key).map_err(KeyError::Load)?;
        Self::with_signing_key(chain, key, generation)
    }

    fn with_signing_key(
        chain: Vec<CertificateDer<'static>>,
        key: Arc<dyn SigningKey>,
        generation: u64,
    ) -> Result<Self, SvidError> {
        let leaf = verify::leaf(&chain).map_err(SvidError::Leaf)?;
        let certified_key = CertifiedKey::new(chain, key);
        certified_key.keys_match().map_err(SvidError::KeyMismatch)?;
        Ok(Self {
            leaf,
            generation,
            certified_key: Arc::new(certified_key),
        })
    }

    pub fn id(&self) -> &SpiffeId {
        &self.leaf.id
    }

    pub fn not_before(&self) -> SystemTime {
        self.leaf.not_before
    }

    pub fn not_after(&self) -> SystemTime {
        self.leaf.not_after
    }

    /// Lower-case hexadecimal.
    pub fn serial(&self) -> &str {
        &self.leaf.serial
    }

    pub fn generation(&self) -> u64 {
        self.generation
    }

    pub(crate) fn validity(&self) -> Validity {
        Validity {
            not_before: self.leaf.not_before,
            not_after: self.leaf.not_after,
            generation: self.generation,
        }
    }

    pub fn certified_key(&self) -> Arc<CertifiedKey> {
        self.certified_key.clone()
    }

    /// The leaf first, then the intermediates.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.certified_key.cert
    }

    /// The same, one PEM text each.
    pub fn chain_pem(&self) -> Vec<String> {
        let unix = EncodeConfig::new().set_line_ending(LineEnding::LF);
        let encode = |certificate: &CertificateDer<'_>| {
            pem::encode_config(&Pem::new("CERTIFICATE", certificate.as_ref()), unix)
        };
        self.chain().iter().map(encode).collect()
    }

    pub fn is_valid_at(&self, now: SystemTime) -> bool {
        self.leaf.not_before <= now && now < self.leaf.not_after
    }
}

impl fmt::Debug for Svid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Svid")
            .field("id", &self.leaf.id.to_string())
            .field("serial", &self.leaf.serial)
            .field("not_before", &self.leaf.not_before)
            .field("not_after", &self.leaf.not_after)
            .field("generation", &self.generation)
            .finish_non_exhaustive()
    }
}
