// SPDX-License-Identifier: Apache-2.0
use rcgen::{PublicKeyData, SignatureAlgorithm};
use rustls_pki_types::CertificateSigningRequestDer;
use rustls_pki_types::pem::PemObject;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::error::X509Error;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::oid_registry::{
    OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_NIST_EC_P384, OID_SIG_ED25519,
};
use x509_parser::prelude::FromDer;
use x509_parser::x509::SubjectPublicKeyInfo;

/// A P-256 request with one URI is some 400 bytes of PEM; nobody honest comes near this.
pub const MAX_CSR_BYTES: usize = 16 * 1024;

/// What is taken from a certificate request after its proof of possession has been checked.
///
/// Everything else in it (subject, extensions, wished usages) is ignored, by design.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Csr {
    pub key: SubjectKey,
    /// URI names asked for. Never issued from: a caller compares them with the identity it decided on, so that a
    /// program set up for another identity learns it here and not from its peers.
    pub uris: Vec<String>,
}

/// A public key of a kind we sign for: P-256, P-384 or Ed25519.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SubjectKey {
    algorithm: &'static SignatureAlgorithm,
    /// The content of the SPKI's BIT STRING.
    bytes: Vec<u8>,
}

/// Why a request was not taken; always the asking side's to mend.
#[derive(Debug, thiserror::Error)]
pub enum CsrError {
    #[error("the request's public key is not P-256, P-384 or Ed25519")]
    KeyKind,
    #[error("the request is not one PEM block CERTIFICATE REQUEST")]
    NotPem,
    #[error("the request is not a PKCS#10 structure in DER")]
    NotPkcs10(#[source] Option<X509Error>),
    #[error("the request's signature does not prove possession of its key")]
    Possession(#[source] X509Error),
    #[error("the request has {size} bytes, more than {MAX_CSR_BYTES}")]
    TooLarge { size: usize },
}

impl Csr {
    /// Reads one PKCS#10 request in PEM (RFC 7468), of at most [`MAX_CSR_BYTES`]. The entry point for fuzzing.
    ///
    /// # Errors
    /// [`CsrError`], one variant for each broken rule.
    pub fn from_pem(pem: &str) -> Result<Self, CsrError> {
        if pem.len() > MAX_CSR_BYTES {
            return Err(CsrError::TooLarge { size: pem.len() });
        }
        let mut blocks = CertificateSigningRequestDer::pem_slice_iter(pem.as_bytes());
        match (blocks.next(), blocks.next()) {
            (Some(Ok(der)), None) => Self::from_der(&der),
            _ => Err(CsrError::NotPem),
        }
    }

    /// As [`from_pem`](Self::from_pem), for DER.
    ///
    /// # Errors
    /// [`CsrError`], one variant for each broken rule.
    pub fn from_der(der: &[u8]) -> Result<Self, CsrError> {
        if der.len() > MAX_CSR_BYTES {
            return Err(CsrError::TooLarge { size: der.len() });
        }
        let (rest, request) = X509CertificationRequest::from_der(der).map_err(|error| {
            CsrError::NotPkcs10(match error {
                x509_parser::nom::Err::Error(source) | x509_parser::nom::Err::Failure(source) => {
                    Some(source)
                }
                x509_parser::nom::Err::Incomplete(_) => None,
            })
        })?;
        if !rest.is_empty() {
            return Err(CsrError::NotPkcs10(None));
        }
        // The kind first: it is the cheaper check, and it bounds which verifications a stranger can make us do.
        let key = SubjectKey::try_from(&request.certification_request_info.subject_pki)?;
        request.verify_signature().map_err(CsrError::Possession)?;
        let uris = request
            .requested_extensions()
            .into_iter()
            .flatten()
            .filter_map(|extension| match extension {
                ParsedExtension::SubjectAlternativeName(names) => Some(&names.general_names),
                _ => None,
            })
            .flatten()
            .filter_map(|name| match name {
                GeneralName::URI(uri) => Some((*uri).to_owned()),
                _ => None,
            })
            .collect();
        Ok(Self { key, uris })
    }
}

impl SubjectKey {
    /// The key of a pair made here.
    pub fn of(pair: &rcgen::KeyPair) -> Self {
        Self {
            algorithm: pair.algorithm(),
            bytes: pair.der_bytes().to_vec(),
        }
    }

    /// SHA-256 of the SubjectPublicKeyInfo, in hexadecimal: names the key in logs.
    pub fn fingerprint(&self) -> String {
        let spki = self.subject_public_key_info();
        aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &spki)
            .as_ref()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}

impl TryFrom<&SubjectPublicKeyInfo<'_>> for SubjectKey {
    type Error = CsrError;

    fn try_from(spki: &SubjectPublicKeyInfo<'_>) -> Result<Self, CsrError> {
        let kind = &spki.algorithm;
        let curve = kind.parameters.as_ref().and_then(|any| any.as_oid().ok());
        let bytes = spki.subject_public_key.data.as_ref();
        // Points in uncompressed form only (SEC 1 §2.3.3): the one every peer reads. That the point is on its curve
        // is checked when the signature is.
        let uncompressed = bytes.first() == Some(&4);
        let algorithm = if kind.algorithm == OID_KEY_TYPE_EC_PUBLIC_KEY {
            match curve {
                Some(curve) if curve == OID_EC_P256 && uncompressed && bytes.len() == 65 => {
                    &rcgen::PKCS_ECDSA_P256_SHA256
                }
                Some(curve) if curve == OID_NIST_EC_P384 && uncompressed && bytes.len() == 97 => {
                    &rcgen::PKCS_ECDSA_P384_SHA384
                }
                _ => return Err(CsrError::KeyKind),
            }
        } else if kind.algorithm == OID_SIG_ED25519
            && kind.parameters.is_none()
            && bytes.len() == 32
        {
            &rcgen::PKCS_ED25519
        } else {
            return Err(CsrError::KeyKind);
        };
        if spki.subject_public_key.unused_bits != 0 {
            return Err(CsrError::KeyKind);
        }
        Ok(Self {
            algorithm,
            bytes: bytes.to_vec(),
        })
    }
}

/// The SPKI in a certificate is written from these two parts, not copied.
impl PublicKeyData for SubjectKey {
    fn der_bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        self.algorithm
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, KeyPair, SanType};

    fn request(algorithm: &'static SignatureAlgorithm) -> (KeyPair, String) {
        let pair = KeyPair::generate_for(algorithm).unwrap();
        let pem = CertificateParams::default()
            .serialize_request(&pair)
            .unwrap()
            .pem()
            .unwrap();
        (pair, pem)
    }

    #[test]
    fn the_three_key_kinds_are_taken() {
        for algorithm in [
            &rcgen::PKCS_ECDSA_P256_SHA256,
            &rcgen::PKCS_ECDSA_P384_SHA384,
            &rcgen::PKCS_ED25519,
        ] {
            let (pair, pem) = request(algorithm);
            let csr = Csr::from_pem(&pem).unwrap();
            assert_eq!(csr.key, SubjectKey::of(&pair));
            assert_eq!(
                csr.key.subject_public_key_info(),
                pair.subject_public_key_info()
            );
        }
    }

    #[test]
    fn other_key_kinds_are_refused() {
        let (_, pem) = request(&rcgen::PKCS_ECDSA_P521_SHA512);
        assert!(matches!(Csr::from_pem(&pem), Err(CsrError::KeyKind)));
        let pair =
            KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, rcgen::RsaKeySize::_2048).unwrap();
        let pem = CertificateParams::default()
            .serialize_request(&pair)
            .unwrap()
            .pem()
            .unwrap();
        assert!(matches!(Csr::from_pem(&pem), Err(CsrError::KeyKind)));
    }

    #[test]
    fn a_request_signed_with_another_key_is_refused() {
        let (pair, _) = request(&rcgen::PKCS_ECDSA_P256_SHA256);
        let der = CertificateParams::default()
            .serialize_request(&pair)
            .unwrap()
            .der()
            .to_vec();
        let own = pair.der_bytes();
        let at = der.windows(own.len()).position(|part| part == own).unwrap();
        let other = KeyPair::generate().unwrap();
        let mut forged = der;
        forged[at..at + own.len()].copy_from_slice(other.der_bytes());
        assert!(matches!(
            Csr::from_der(&forged),
            Err(CsrError::Possession(_))
        ));
    }

    #[test]
    fn each_flipped_byte_is_refused_or_changes_nothing_taken() {
        let (_, pem) = request(&rcgen::PKCS_ECDSA_P256_SHA256);
        let csr = Csr::from_pem(&pem).unwrap();
        let der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes()).unwrap();
        for at in 0..der.len() {
            let mut changed = der.to_vec();
            changed[at] ^= 0x55;
            if let Ok(taken) = Csr::from_der(&changed) {
                assert_eq!(taken, csr, "byte {at}");
            }
        }
    }

    #[test]
    fn what_is_not_one_request_is_refused() {
        let (_, pem) = request(&rcgen::PKCS_ECDSA_P256_SHA256);
        for text in [
            String::new(),
            "hello".into(),
            pem.replace("REQUEST", "CERTIFICATE"),
            format!("{pem}{pem}"),
        ] {
            assert!(matches!(Csr::from_pem(&text), Err(CsrError::NotPem)));
        }
        assert!(matches!(
            Csr::from_pem(&"x".repeat(MAX_CSR_BYTES + 1)),
            Err(CsrError::TooLarge { .. })
        ));
        let der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes()).unwrap();
        let mut longer = der.to_vec();
        longer.push(0);
        assert!(matches!(
            Csr::from_der(&longer),
            Err(CsrError::NotPkcs10(None))
        ));
        assert!(matches!(
            Csr::from_der(&der[..der.len() - 1]),
            Err(CsrError::NotPkcs10(_))
        ));
    }

    #[test]
    fn wished_names_are_told_and_not_more() {
        let pair = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![
            SanType::DnsName("evil.example".try_into().unwrap()),
            SanType::URI("spiffe://td/ns/a/sa/b".try_into().unwrap()),
        ];
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let pem = params.serialize_request(&pair).unwrap().pem().unwrap();
        assert_eq!(
            Csr::from_pem(&pem).unwrap(),
            Csr {
                key: SubjectKey::of(&pair),
                uris: vec!["spiffe://td/ns/a/sa/b".into()]
            }
        );
    }
}
