// SPDX-License-Identifier: Apache-2.0
use podveil_identity::SpiffeId;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType};
use rustls::sign::SigningKey;
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use std::fmt;
use std::sync::Arc;
use zeroize::Zeroize;

/// A fresh P-256 private key. It stays in this process and is never written anywhere.
pub struct Key(KeyPair);

#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("could not make a P-256 key")]
    Generate(#[source] rcgen::Error),
    #[error("could not make a certificate request for {id}")]
    Request {
        id: SpiffeId,
        #[source]
        source: rcgen::Error,
    },
    #[error("the TLS library refused the key")]
    Load(#[source] rustls::Error),
}

impl Key {
    /// # Errors
    /// [`KeyError::Generate`] if the library cannot make a key.
    pub fn generate() -> Result<Self, KeyError> {
        KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)
            .map(Self)
            .map_err(KeyError::Generate)
    }

    /// PKCS#10 in PEM. The CA uses its public key only; the ID is for logs and for peers' CAs.
    /// # Errors
    /// [`KeyError::Request`]
    pub fn request(&self, id: &SpiffeId) -> Result<String, KeyError> {
        let fail = |source| KeyError::Request {
            id: id.clone(),
            source,
        };
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(id.to_string().try_into().map_err(fail)?)];
        params
            .serialize_request(&self.0)
            .and_then(|request| request.pem())
            .map_err(fail)
    }

    pub(crate) fn signing_key(&self) -> Result<Arc<dyn SigningKey>, KeyError> {
        let key = rustls::crypto::aws_lc_rs::sign::any_ecdsa_type(&PrivateKeyDer::Pkcs8(
            PrivatePkcs8KeyDer::from(self.0.serialized_der()),
        ));
        key.map_err(KeyError::Load)
    }
}

/// Wipes the encoded copy that the key pair keeps; the one inside the crypto library is wiped by it.
impl Drop for Key {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(P-256)")
    }
}
