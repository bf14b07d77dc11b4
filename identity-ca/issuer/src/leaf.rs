// SPDX-License-Identifier: Apache-2.0
use crate::check::{self, CheckError};
use crate::{Authority, Role, Serial, SerialError, SubjectKey};
use podveil_identity::SpiffeId;
use rcgen::{
    CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose, SanType,
};
use rustls_pki_types::CertificateDer;
use std::time::{Duration, SystemTime};
use time::OffsetDateTime;

/// For clocks that lag, and never more than a tenth of the life: a client that renews at the middle of the whole
/// validity must not find it behind it.
const MAX_BACKDATE: Duration = Duration::from_secs(2 * 60);

/// An X.509-SVID as issued.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Leaf {
    pub certificate: CertificateDer<'static>,
    pub pem: String,
    pub serial: Serial,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
    /// The life asked for went past the issuer's end and was cut: the issuer is overdue for rotation.
    pub clamped: bool,
}

/// Why no leaf was issued.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    #[error("the issuing authority's certificate has ended")]
    IssuerEnded,
    #[error("the life asked for is less than a second")]
    NoLife,
    #[error("{subject} signs no leaf")]
    NotIssuing { subject: String },
    #[error("the new certificate does not pass its check")]
    Output(#[source] CheckError),
    #[error("drawing a serial")]
    Serial(#[source] SerialError),
    #[error("signing the certificate")]
    Sign(#[source] rcgen::Error),
    #[error("{id} is not an identity of this authority's trust domain")]
    WrongTrustDomain { id: SpiffeId },
}

impl Authority {
    /// Issues an SVID for `id` and `key`, living `life` from `now` (whole seconds), or until this authority ends.
    ///
    /// The profile (X509-SVID §4): no subject, one critical URI name, critical key usage digitalSignature alone
    /// (RFC 8813 §3 and RFC 8410 §5 forbid keyEncipherment for these key kinds), server and client purpose, cA false,
    /// key identifiers of both, a random serial.
    ///
    /// # Errors
    /// [`IssueError::IssuerEnded`] and [`IssueError::WrongTrustDomain`] are for the operator; the rest are faults of
    /// ours.
    pub fn issue(
        &self,
        key: &SubjectKey,
        id: &SpiffeId,
        life: Duration,
        now: SystemTime,
    ) -> Result<Leaf, IssueError> {
        if self.role() != Role::Issuing {
            return Err(IssueError::NotIssuing {
                subject: self.subject().to_owned(),
            });
        }
        if !id.is_member_of(self.trust_domain()) || id.path().is_empty() {
            return Err(IssueError::WrongTrustDomain { id: id.clone() });
        }
        let now = whole_seconds(now);
        if now >= self.not_after() {
            return Err(IssueError::IssuerEnded);
        }
        let wanted = now.checked_add(Duration::from_secs(life.as_secs()));
        let not_after = wanted.map_or(self.not_after(), |end| end.min(self.not_after()));
        let clamped = wanted.is_none_or(|end| end > not_after);
        let left = not_after.duration_since(now).unwrap_or_default();
        if left.is_zero() {
            return Err(IssueError::NoLife);
        }
        let backdate = Duration::from_secs((left / 10).min(MAX_BACKDATE).as_secs());
        let leaf = self.sign(key, id, now - backdate, not_after, clamped)?;
        check::leaf(&leaf, self, id, key).map_err(IssueError::Output)?;
        Ok(leaf)
    }

    fn sign(
        &self,
        key: &SubjectKey,
        id: &SpiffeId,
        not_before: SystemTime,
        not_after: SystemTime,
        clamped: bool,
    ) -> Result<Leaf, IssueError> {
        let serial = Serial::random().map_err(IssueError::Serial)?;
        let name = id.to_string().try_into().map_err(IssueError::Sign)?;
        let mut params = CertificateParams::default();
        params.not_before = OffsetDateTime::from(not_before);
        params.not_after = OffsetDateTime::from(not_after);
        params.serial_number = Some(serial.as_bytes().to_vec().into());
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(name)];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        let certificate = params
            .signed_by(key, &self.issuer)
            .map_err(IssueError::Sign)?;
        Ok(Leaf {
            pem: certificate.pem(),
            certificate: certificate.into(),
            serial,
            not_before,
            not_after,
            clamped,
        })
    }
}

/// X.509 times have no fractions.
fn whole_seconds(time: SystemTime) -> SystemTime {
    let seconds = time
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}
