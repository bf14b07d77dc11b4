// SPDX-License-Identifier: Apache-2.0
//! Keeps the program's own SVID: by token on first contact, by the SVID held afterwards.

use super::files::{self, FileError};
use super::{ProgramConfig, ProgramCredentials};
use crate::authority::{self, IssueError};
use crate::renewal::{RenewalLimits, Renewals};
use crate::transport::{self, Shown};
use crate::verify::Expected;
use crate::{Svid, TrustBundle};
use podveil_identity::ProgramIdentity;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tonic::transport::Channel;

const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Renewals by SVID that may fail before the token is tried in turn with it: after a rotation that this program slept
/// through, the token alone leads back.
const BY_SVID_FIRST: u32 = 2;

#[derive(Debug, thiserror::Error)]
enum AskError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Issue(#[from] IssueError),
}

struct Answer {
    svid: Svid,
    /// Read from a file for first contact; the one in use is never put back in place of a newer one.
    bundle: Option<Arc<TrustBundle>>,
}

/// CANCEL: an answer under way is lost and asked for again by the next start.
pub(super) async fn keep(config: &ProgramConfig, credentials: &ProgramCredentials) {
    let mut bundles = credentials.bundle();
    let renewing = transport::channel(&config.ca_address, credentials, ProgramIdentity::Ca);
    let mut renewals = Renewals::new(RenewalLimits::default());
    renewals.want((), SystemTime::now());
    loop {
        let generation = bundles.borrow_and_update().certificate_generation;
        renewals.require_generation(generation, SystemTime::now(), rand::random);
        renewals.expire(SystemTime::now());
        let Some(attempt) = renewals.poll(SystemTime::now()) else {
            tokio::select! {
                () = tokio::time::sleep(authority::wait_until(renewals.next_wakeup())) => {}
                // The sender is in `credentials`.
                _ = bundles.changed() => {}
            }
            continue;
        };
        match ask(config, credentials, &renewing, attempt.failures).await {
            Ok(Answer { svid, bundle }) => {
                let wanted = renewals.on_issued(
                    &attempt,
                    svid.validity(),
                    SystemTime::now(),
                    rand::random(),
                );
                debug_assert!(wanted, "nobody forgets the own SVID");
                tracing::info!(id = %svid.id(), serial = svid.serial(), generation = svid.generation(), "SVID issued");
                credentials.shared.last_error.send_replace(None);
                credentials.shared.use_svid(Arc::new(svid), bundle);
            }
            Err(error) => {
                renewals.on_failed(&attempt, SystemTime::now(), rand::random());
                let error = authority::chain(&error);
                tracing::warn!(
                    error,
                    failures = attempt.failures + 1,
                    "could not get an SVID for this program"
                );
                credentials.shared.last_error.send_replace(Some(error));
            }
        }
    }
}

async fn ask(
    config: &ProgramConfig,
    credentials: &ProgramCredentials,
    renewing: &Channel,
    failures: u32,
) -> Result<Answer, AskError> {
    let valid = credentials
        .current()
        .filter(|current| current.svid.is_valid_at(SystemTime::now()));
    let Some(current) = valid else {
        let in_use = credentials.shared.bundle.borrow().clone();
        if !in_use.roots.is_empty() && failures.is_multiple_of(2) {
            let svid = by_token(config, in_use).await?;
            return Ok(Answer { svid, bundle: None });
        }
        let bundle = Arc::new(trust_from_files(config, failures).await?);
        let svid = by_token(config, bundle.clone()).await?;
        return Ok(Answer {
            svid,
            bundle: Some(bundle),
        });
    };
    // While the bundle of the stream is in use, no older file is trusted instead of it.
    let by_svid = failures < BY_SVID_FIRST || failures.is_multiple_of(2);
    let svid = if by_svid {
        issue(config, renewing.clone(), None, current.bundle.clone()).await?
    } else {
        by_token(config, current.bundle.clone()).await?
    };
    Ok(Answer { svid, bundle: None })
}

/// A new beginning by token and the operator's bundle, if that names other roots than the bundle in use: what a restart
/// would do, for a program that was cut off while the roots it knows were withdrawn. The bundle is taken only together
/// with an SVID from a CA that it proves.
///
/// # Errors
/// In words, for the log.
pub(super) async fn recover(
    config: &ProgramConfig,
    credentials: &ProgramCredentials,
) -> Result<(), String> {
    let [_, operators] = files::trust_files(config);
    let in_use = credentials.shared.bundle.borrow().clone();
    let bundle = files::read_bundle(config, &operators)
        .await
        .map_err(|error| authority::chain(&error))?;
    if bundle.roots == in_use.roots {
        return Ok(());
    }
    let bundle = Arc::new(bundle);
    let svid = by_token(config, bundle.clone())
        .await
        .map_err(|error| authority::chain(&error))?;
    // The stream may have brought a newer one meanwhile.
    if Arc::ptr_eq(&in_use, &credentials.shared.bundle.borrow()) {
        tracing::warn!(
            roots = bundle.roots.len(),
            "the CA is trusted by the operator's bundle again; the one in use did not lead to it any more"
        );
        credentials.shared.use_svid(Arc::new(svid), Some(bundle));
    }
    Ok(())
}

/// The file stored, in turn with the operator's, so that neither a stale copy nor a wrong file locks the program out
/// for good.
async fn trust_from_files(config: &ProgramConfig, failures: u32) -> Result<TrustBundle, FileError> {
    let [stored, operators] = files::trust_files(config);
    if failures.is_multiple_of(2) {
        match files::read_bundle(config, &stored).await {
            Ok(bundle) => return Ok(bundle),
            // Nothing stored yet is the ordinary first start.
            Err(error) => tracing::debug!(error = authority::chain(&error), "no stored bundle"),
        }
    }
    files::read_bundle(config, &operators).await
}

async fn by_token(config: &ProgramConfig, bundle: Arc<TrustBundle>) -> Result<Svid, AskError> {
    let token = files::bearer(&config.token_path).await?;
    let ca = ProgramIdentity::Ca.spiffe_id(&config.trust_domain);
    let trusted = bundle.clone();
    let channel = transport::lazy(&config.ca_address, move || {
        std::future::ready(Shown {
            svid: None,
            bundle: trusted.clone(),
            server: Expected::Exactly(vec![ca.clone()]),
        })
    });
    issue(config, channel, Some(token), bundle).await
}

async fn issue(
    config: &ProgramConfig,
    channel: Channel,
    token: Option<tonic::metadata::MetadataValue<tonic::metadata::Ascii>>,
    bundle: Arc<TrustBundle>,
) -> Result<Svid, AskError> {
    let id = config.identity.spiffe_id(&config.trust_domain);
    let answer = authority::issue_program(channel, &id, token, bundle);
    let svid = tokio::time::timeout(ANSWER_TIMEOUT, answer)
        .await
        .unwrap_or_else(|_| {
            Err(IssueError::TimedOut {
                id: id.clone(),
                after: ANSWER_TIMEOUT,
            })
        })?;
    Ok(svid)
}
