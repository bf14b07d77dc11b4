// SPDX-License-Identifier: Apache-2.0
use crate::check::{self, CheckError};
use crate::{Serial, SerialError};
use podveil_identity::TrustDomain;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, DnValue, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData, SanType,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use std::fmt;
use std::time::{Duration, SystemTime};
use time::OffsetDateTime;
use zeroize::Zeroizing;

/// How far before its making an authority's certificate begins to hold, for clocks that lag.
const BACKDATE: Duration = Duration::from_secs(2 * 60);

/// The end of a life that begins now; `None` if no certificate can say it: RFC 5280 §4.1.2.5 ends with the year 9999.
pub fn end_of_life(now: SystemTime, life: Duration) -> Option<SystemTime> {
    const LAST: Duration = Duration::from_secs(253_402_300_799);
    now.checked_add(life)
        .filter(|end| *end <= SystemTime::UNIX_EPOCH + LAST)
}

/// What an authority signs.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Role {
    /// Leaves; its own certificate is signed by a root.
    Issuing,
    /// Issuing authorities; its certificate is in the trust bundle.
    Root,
}

/// A signing key (P-256) with its CA certificate.
///
/// Every authority has a subject of its own, made of its serial: verifiers that try each anchor of one name would
/// otherwise run into their limit of signature checks.
pub struct Authority {
    pub(crate) issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    pem: String,
    role: Role,
    serial: Serial,
    subject: String,
    trust_domain: TrustDomain,
    not_before: SystemTime,
    not_after: SystemTime,
}

/// Why an authority could not be made or loaded.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    #[error("making the authority's key")]
    Key(#[source] rcgen::Error),
    #[error("the key does not belong to the certificate")]
    KeyMismatch,
    #[error("the certificate is not one of ours for an authority: {what}")]
    Malformed { what: &'static str },
    #[error("{subject} is not a root, so it signs no other authority")]
    NotARoot { subject: String },
    #[error("the new certificate does not pass its check")]
    Output(#[source] CheckError),
    #[error("drawing a serial")]
    Serial(#[source] SerialError),
    #[error("signing the authority's certificate")]
    Sign(#[source] rcgen::Error),
    #[error("a life of {life:?} ends after the year 9999, which certificates cannot say")]
    TooLong { life: Duration },
}

impl Authority {
    /// A new self-signed root.
    ///
    /// # Errors
    /// [`AuthorityError`]; none that a caller can cause.
    pub fn new_root(
        trust_domain: &TrustDomain,
        now: SystemTime,
        life: Duration,
    ) -> Result<Self, AuthorityError> {
        let key = KeyPair::generate().map_err(AuthorityError::Key)?;
        let not_after = end_of_life(now, life).ok_or(AuthorityError::TooLong { life })?;
        let params = profile(Role::Root, trust_domain, now, not_after)?;
        let certificate = params.self_signed(&key).map_err(AuthorityError::Sign)?;
        let der = certificate.der();
        check::signed_by(der, der).map_err(AuthorityError::Output)?;
        Self::load(&certificate.pem(), key)
    }

    /// A new issuing authority under this root, ending no later than the root.
    ///
    /// # Errors
    /// [`AuthorityError::NotARoot`] if this is none.
    pub fn new_issuing(&self, now: SystemTime, life: Duration) -> Result<Self, AuthorityError> {
        if self.role != Role::Root {
            return Err(AuthorityError::NotARoot {
                subject: self.subject.clone(),
            });
        }
        let key = KeyPair::generate().map_err(AuthorityError::Key)?;
        let not_after = end_of_life(now, life)
            .ok_or(AuthorityError::TooLong { life })?
            .min(self.not_after);
        let params = profile(Role::Issuing, &self.trust_domain, now, not_after)?;
        let certificate = params
            .signed_by(&key, &self.issuer)
            .map_err(AuthorityError::Sign)?;
        check::signed_by(certificate.der(), &self.certificate).map_err(AuthorityError::Output)?;
        Self::load(&certificate.pem(), key)
    }

    /// An authority from the two PEM texts it was kept as.
    ///
    /// # Errors
    /// [`AuthorityError::KeyMismatch`] or [`AuthorityError::Malformed`] if they are not what
    /// [`certificate_pem`](Self::certificate_pem) and [`key_pem`](Self::key_pem) gave.
    pub fn from_pem(certificate: &str, key: &str) -> Result<Self, AuthorityError> {
        let key = KeyPair::from_pem_and_sign_algo(key, &rcgen::PKCS_ECDSA_P256_SHA256)
            .map_err(AuthorityError::Key)?;
        Self::load(certificate, key)
    }

    fn load(pem: &str, key: KeyPair) -> Result<Self, AuthorityError> {
        let malformed = |what| AuthorityError::Malformed { what };
        let der = CertificateDer::from_pem_slice(pem.as_bytes())
            .map_err(|_| malformed("not a certificate in PEM"))?;
        let parsed = check::authority(&der).map_err(|error| malformed(error.what()))?;
        if parsed.spki != key.subject_public_key_info() {
            return Err(AuthorityError::KeyMismatch);
        }
        let issuer = Issuer::from_ca_cert_der(&der, key).map_err(AuthorityError::Sign)?;
        Ok(Self {
            issuer,
            pem: pem.to_owned(),
            role: if parsed.self_issued {
                Role::Root
            } else {
                Role::Issuing
            },
            serial: parsed.serial,
            subject: parsed.subject,
            trust_domain: parsed.trust_domain,
            not_before: parsed.not_before,
            not_after: parsed.not_after,
            certificate: der,
        })
    }

    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    pub fn certificate_pem(&self) -> &str {
        &self.pem
    }

    /// The private key, PKCS#8 in PEM; wiped when dropped. For the key's own file and nothing else.
    pub fn key_pem(&self) -> Zeroizing<String> {
        Zeroizing::new(self.issuer.key().serialize_pem())
    }

    pub fn role(&self) -> Role {
        self.role
    }

    pub fn serial(&self) -> Serial {
        self.serial
    }

    /// For people, for example `O=Podveil, CN=root 2d…`.
    pub fn subject(&self) -> &str {
        &self.subject
    }

    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    pub fn not_before(&self) -> SystemTime {
        self.not_before
    }

    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }
}

/// Never the key.
impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority")
            .field("subject", &self.subject)
            .field("role", &self.role)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

fn profile(
    role: Role,
    trust_domain: &TrustDomain,
    now: SystemTime,
    not_after: SystemTime,
) -> Result<CertificateParams, AuthorityError> {
    let serial = Serial::random().map_err(AuthorityError::Serial)?;
    let name = match role {
        Role::Issuing => format!("issuing {serial}"),
        Role::Root => format!("root {serial}"),
    };
    let mut subject = DistinguishedName::new();
    subject.push(
        DnType::OrganizationName,
        DnValue::Utf8String("Podveil".into()),
    );
    subject.push(DnType::CommonName, DnValue::Utf8String(name));
    let mut params = CertificateParams::default();
    params.not_before = OffsetDateTime::from(now - BACKDATE);
    params.not_after = OffsetDateTime::from(not_after);
    params.serial_number = Some(serial.as_bytes().to_vec().into());
    params.distinguished_name = subject;
    // SPEC: X509-SVID §3.1, a signing certificate may have a SPIFFE ID, without a path.
    params.subject_alt_names = vec![SanType::URI(
        trust_domain
            .id_string()
            .try_into()
            .map_err(AuthorityError::Sign)?,
    )];
    params.is_ca = IsCa::Ca(match role {
        Role::Issuing => BasicConstraints::Constrained(0),
        Role::Root => BasicConstraints::Constrained(1),
    });
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.use_authority_key_identifier_extension = role == Role::Issuing;
    Ok(params)
}
