// SPDX-License-Identifier: Apache-2.0
use crate::admission::Exhausted;
use crate::entitlement::NotEntitled;
use crate::first_contact::TokenError;
use podveil_ca_issuer::{CsrError, IssueError};
use std::error::Error;
use std::time::Duration;
use tonic::metadata::MetadataValue;
use tonic::{Code, Status};

/// Response metadata with the refusal's reason: one word of a closed list, for programs to compare.
pub const REASON_KEY: &str = "podveil-reason";
/// gRPC's own hint to the client's retry logic, milliseconds.
const PUSHBACK_KEY: &str = "grpc-retry-pushback-ms";

/// Why a request for a certificate got none. Text sent to the caller never repeats what the caller sent.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    #[error("ImpersonatedIdentity is not the ID of a workload")]
    BadIdentity,
    #[error("the certificate request was not taken")]
    Csr(#[source] CsrError),
    #[error("the certificate request names another identity than the one it would get")]
    CsrNamesAnother,
    #[error("too many requests")]
    Exhausted(Exhausted),
    #[error("the CA could not issue")]
    Issue(#[source] IssueError),
    #[error("neither a certificate of one of our programs nor a token was shown")]
    NoCredential,
    #[error("metadata has no ImpersonatedIdentity")]
    NoIdentity,
    #[error("only a node's program asks for workloads' certificates")]
    NotANode,
    #[error("the identity may not be had here")]
    NotEntitled(#[source] NotEntitled),
    #[error("the CA has not read the cluster yet")]
    NotReady,
    #[error("a program's identity is not issued to workloads")]
    ProgramIdentity,
    #[error("the caller's own identity is not renewed here")]
    NotRenewable,
    #[error("the token was not taken")]
    Token(#[source] TokenError),
}

impl Refusal {
    /// The reason, as counted and sent.
    pub fn reason(&self) -> &'static str {
        self.wire().1
    }

    fn wire(&self) -> (Code, &'static str) {
        match self {
            Self::BadIdentity => (Code::InvalidArgument, "bad_identity"),
            Self::Csr(CsrError::KeyKind) => (Code::InvalidArgument, "csr_key_kind"),
            Self::Csr(CsrError::Possession(_)) => (Code::InvalidArgument, "csr_possession"),
            Self::Csr(CsrError::TooLarge { .. }) => (Code::InvalidArgument, "csr_too_large"),
            Self::Csr(CsrError::NotPem | CsrError::NotPkcs10(_)) => {
                (Code::InvalidArgument, "csr_malformed")
            }
            Self::CsrNamesAnother => (Code::PermissionDenied, "csr_names_another_identity"),
            Self::Exhausted(_) => (Code::ResourceExhausted, "rate_limited"),
            Self::Issue(IssueError::IssuerEnded) => (Code::Unavailable, "issuer_ended"),
            Self::Issue(_) => (Code::Internal, "issue_failed"),
            Self::NoCredential => (Code::Unauthenticated, "no_credential"),
            Self::NoIdentity => (Code::InvalidArgument, "no_identity"),
            Self::NotANode => (Code::PermissionDenied, "caller_is_no_node"),
            Self::NotEntitled(NotEntitled::NoSuchProgram) => {
                (Code::PermissionDenied, "no_such_program")
            }
            Self::NotEntitled(NotEntitled::NoSuchWorkload) => {
                (Code::PermissionDenied, "no_such_workload_on_node")
            }
            Self::NotEntitled(NotEntitled::NotEnrolled) => {
                (Code::PermissionDenied, "workload_not_enrolled")
            }
            Self::NotEntitled(NotEntitled::WrongTrustDomain) => {
                (Code::PermissionDenied, "wrong_trust_domain")
            }
            Self::NotReady => (Code::Unavailable, "not_ready"),
            Self::NotRenewable => (Code::PermissionDenied, "caller_not_renewable"),
            Self::ProgramIdentity => (Code::PermissionDenied, "program_identity"),
            Self::Token(error) => token(error),
        }
    }

    /// The sentence for the caller. What lies behind a fault of ours stays in our log.
    fn message(&self) -> String {
        match self {
            Self::Csr(source) => format!("{self}: {source}"),
            Self::NotEntitled(source) => format!("{self}: {source}"),
            Self::Token(source) if source.is_denial() => format!("{self}: {source}"),
            _ => self.to_string(),
        }
    }
}

fn token(error: &TokenError) -> (Code, &'static str) {
    match error {
        TokenError::Busy => (Code::Unavailable, "token_reviews_busy"),
        TokenError::Expired => (Code::Unauthenticated, "token_expired"),
        TokenError::Malformed => (Code::Unauthenticated, "token_malformed"),
        TokenError::NoSuchPod => (Code::PermissionDenied, "token_pod_not_running"),
        TokenError::NotAuthenticated => (Code::Unauthenticated, "token_not_authenticated"),
        TokenError::NotPodBound => (Code::PermissionDenied, "token_not_pod_bound"),
        TokenError::NotReady => (Code::Unavailable, "not_ready"),
        TokenError::OtherAudience => (Code::Unauthenticated, "token_other_audience"),
        TokenError::OtherServiceAccount => (Code::PermissionDenied, "token_other_service_account"),
        TokenError::Read { .. } | TokenError::TooMany { .. } => {
            (Code::Unavailable, "tokens_unreadable")
        }
        TokenError::Review(_) => (Code::Unavailable, "token_review_unavailable"),
        TokenError::Unknown => (Code::Unauthenticated, "unknown_token"),
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let (code, reason) = refusal.wire();
        let mut status = Self::new(code, format!("{reason}: {}", refusal.message()));
        let metadata = status.metadata_mut();
        metadata.insert(REASON_KEY, MetadataValue::from_static(reason));
        if let Refusal::Exhausted(Exhausted { retry_after }) = refusal {
            let millis = retry_after.max(Duration::from_millis(1)).as_millis() as u64;
            metadata.insert(PUSHBACK_KEY, MetadataValue::from(millis));
        }
        status
    }
}

/// An error with all its sources, for a log field.
pub(crate) fn with_sources(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_carries_its_reason_and_its_hint() {
        let status = Status::from(Refusal::Exhausted(Exhausted {
            retry_after: Duration::from_millis(250),
        }));
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(status.metadata().get(REASON_KEY).unwrap(), "rate_limited");
        assert_eq!(status.metadata().get(PUSHBACK_KEY).unwrap(), "250");
    }

    #[test]
    fn a_fault_of_ours_is_not_told() {
        let status = Status::from(Refusal::Token(TokenError::Read {
            path: "/secret/place".into(),
            source: std::io::Error::other("denied"),
        }));
        assert_eq!(status.code(), Code::Unavailable);
        assert!(!status.message().contains("secret"));
    }
}
