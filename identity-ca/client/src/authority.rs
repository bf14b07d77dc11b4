// SPDX-License-Identifier: Apache-2.0
//! The two questions that the CA answers.

use crate::verify::{Expected, PeerError, Verifier};
use crate::{Key, KeyError, Svid, SvidError, TrustBundle};
use podveil_identity::{SpiffeId, WorkloadIdentity};
use podveil_proto::istio::v1::auth::IstioCertificateRequest;
use podveil_proto::istio::v1::auth::istio_certificate_service_client::IstioCertificateServiceClient;
use podveil_proto::podveil::ca::v1::ProgramSvidRequest;
use podveil_proto::podveil::ca::v1::programs_client::ProgramsClient;
use prost_types::value::Kind;
use prost_types::{Struct, Value};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, UnixTime};
use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::watch;
use tonic::Status;
use tonic::metadata::{Ascii, MetadataMap, MetadataValue};
use tonic::transport::Channel;
use webpki::KeyUsage;

/// Response metadata of `CreateCertificate`; absent from peers' CAs, which know no generations.
pub const GENERATION_HEADER: &str = "podveil-certificate-generation";

/// A chain is a few certificates of about a kilobyte each.
const MAX_ANSWER_BYTES: usize = 256 * 1024;
/// Leaf and intermediates; the verifier of the other side takes no more either.
const MAX_CHAIN: usize = 8;

/// Why a certificate was not had.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    #[error("the CA's answer holds {found} certificates, an SVID has 1 to {MAX_CHAIN}")]
    ChainLength { found: usize },
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error("the CA's answer is not PEM")]
    NotPem(#[source] rustls_pki_types::pem::Error),
    #[error("the certificate issued for {id} would not be believed by peers")]
    NotTrusted {
        id: SpiffeId,
        #[source]
        source: PeerError,
    },
    #[error("the CA did not issue a certificate for {id}")]
    Refused {
        id: SpiffeId,
        #[source]
        status: Box<Status>,
    },
    #[error("the CA's answer is not an SVID")]
    Svid(#[from] SvidError),
    #[error("the CA did not answer for {id} within {after:?}")]
    TimedOut { id: SpiffeId, after: Duration },
}

/// `CreateCertificate` for a workload of this node. The caller's channel shows the node's SVID.
pub(crate) async fn issue_workload(
    ca: Channel,
    identity: &WorkloadIdentity,
    bundle: &watch::Receiver<Arc<TrustBundle>>,
) -> Result<Svid, IssueError> {
    let id = identity.spiffe_id();
    let key = Key::generate()?;
    let impersonated = Value {
        kind: Some(Kind::StringValue(id.to_string())),
    };
    let request = IstioCertificateRequest {
        csr: key.request(&id)?,
        // The CA's default: how long a certificate lives is for its operator to say.
        validity_duration: 0,
        metadata: Some(Struct {
            fields: [("ImpersonatedIdentity".to_owned(), impersonated)].into(),
        }),
    };
    let response = IstioCertificateServiceClient::new(ca)
        .max_decoding_message_size(MAX_ANSWER_BYTES)
        .create_certificate(request)
        .await
        .map_err(|status| IssueError::refused(&id, status))?;
    let generation = generation(response.metadata());
    let chain = response.into_inner().cert_chain;
    let bundle = bundle.borrow().clone();
    svid(&id, &key, &chain, generation, bundle)
}

/// `IssueProgramSvid`: with a token on first contact, without one when the channel shows the SVID held.
pub(crate) async fn issue_program(
    ca: Channel,
    id: &SpiffeId,
    token: Option<MetadataValue<Ascii>>,
    bundle: Arc<TrustBundle>,
) -> Result<Svid, IssueError> {
    let key = Key::generate()?;
    let mut request = tonic::Request::new(ProgramSvidRequest {
        csr: key.request(id)?,
    });
    if let Some(token) = token {
        request.metadata_mut().insert("authorization", token);
    }
    let response = ProgramsClient::new(ca)
        .max_decoding_message_size(MAX_ANSWER_BYTES)
        .issue_program_svid(request)
        .await
        .map_err(|status| IssueError::refused(id, status))?
        .into_inner();
    let generation = response.certificate_generation;
    svid(id, &key, &response.cert_chain, generation, bundle)
}

impl IssueError {
    fn refused(id: &SpiffeId, status: Status) -> Self {
        Self::Refused {
            id: id.clone(),
            status: Box::new(status),
        }
    }
}

fn generation(metadata: &MetadataMap) -> u64 {
    metadata
        .get(GENERATION_HEADER)
        .and_then(|value| value.to_str().ok()?.parse().ok())
        .unwrap_or(0)
}

/// The answer is the leaf, each intermediate in an element of its own, and the roots in the last element. The roots are
/// not looked at: trust comes over the bundle stream only.
fn svid(
    id: &SpiffeId,
    key: &Key,
    answer: &[String],
    generation: u64,
    bundle: Arc<TrustBundle>,
) -> Result<Svid, IssueError> {
    let shown = match answer {
        [chain @ .., _roots] if !chain.is_empty() => chain,
        other => other,
    };
    if shown.is_empty() || shown.len() > MAX_CHAIN {
        return Err(IssueError::ChainLength { found: shown.len() });
    }
    let chain = shown
        .iter()
        .map(|element| CertificateDer::from_pem_slice(element.as_bytes()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(IssueError::NotPem)?;
    let svid = Svid::new(chain, key, generation)?;
    Verifier::new(bundle, Expected::Exactly(vec![id.clone()]))
        .verify_chain(svid.chain(), KeyUsage::client_auth(), UnixTime::now())
        .map_err(|source| IssueError::NotTrusted {
            id: id.clone(),
            source,
        })?;
    Ok(svid)
}

/// An error with everything below it, for the one place that handles it.
pub(crate) fn chain(error: &dyn Error) -> String {
    std::iter::successors(error.source(), |error| (*error).source())
        .fold(error.to_string(), |text, source| {
            format!("{text}: {source}")
        })
}

/// A point of time as a wait; the wall clock is looked at again at least every 30 s, because it may be set.
pub(crate) fn wait_until(wakeup: Option<SystemTime>) -> Duration {
    const LONGEST: Duration = Duration::from_secs(30);
    wakeup.map_or(LONGEST, |wakeup| {
        wakeup
            .duration_since(SystemTime::now())
            .unwrap_or_default()
            .min(LONGEST)
    })
}
