// SPDX-License-Identifier: Apache-2.0
//! Follows the CA's bundle stream: each bundle is put in use, stored, then acknowledged.

use super::{Module, ProgramConfig, ProgramCredentials, files, own_svid};
use crate::{BundleError, TrustBundle, authority, transport};
use podveil_identity::ProgramIdentity;
use podveil_proto::podveil::node::v1 as wire;
use podveil_proto::podveil::node::v1::trust_bundles_client::TrustBundlesClient;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::transport::Channel;

const FIRST_BACKOFF: Duration = Duration::from_millis(200);
const LONGEST_BACKOFF: Duration = Duration::from_secs(5);
const MAX_MESSAGE_BYTES: usize = 256 * 1024;
/// After so many failures, and so many more each, the operator's bundle is looked at again.
const RECOVER_EVERY: u32 = 4;
/// A stream that ended sooner was no success: the next pause is longer.
const HEALTHY_AFTER: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
enum FollowError {
    #[error("the CA sent a trust bundle that cannot be used")]
    Bundle(#[source] BundleError),
    #[error("the CA ended the bundle stream")]
    Ended,
    #[error("the bundle stream failed")]
    Failed(#[source] Box<Status>),
}

/// CANCEL: a bundle is in use before it is stored or acknowledged, so nothing is claimed that does not hold.
pub(super) async fn keep(config: &ProgramConfig, credentials: &ProgramCredentials) {
    let channel = transport::channel(&config.ca_address, credentials, ProgramIdentity::Ca);
    let mut backoff = FIRST_BACKOFF;
    let mut failures = 0_u32;
    loop {
        credentials.ready().await;
        let mut received = false;
        let began = tokio::time::Instant::now();
        let Err(error) = follow(config, credentials, channel.clone(), &mut received).await;
        if received && began.elapsed() >= HEALTHY_AFTER {
            backoff = FIRST_BACKOFF;
            failures = 0;
        }
        failures = failures.saturating_add(1);
        let error = authority::chain(&error);
        // An outage of the CA is one line, not one for each attempt.
        if failures == 1 {
            tracing::warn!(error, "no bundle stream; the bundle held stays in use");
        } else {
            tracing::debug!(error, failures, "still no bundle stream");
        }
        // A root rotation that went by while this program was cut off leaves it with a CA that it does not trust.
        if failures.is_multiple_of(RECOVER_EVERY)
            && let Err(error) = own_svid::recover(config, credentials).await
        {
            tracing::debug!(error, "nor by the operator's bundle");
        }
        tokio::time::sleep(backoff.mul_f64(0.5 + rand::random::<f64>() / 2.0)).await;
        backoff = (backoff * 2).min(LONGEST_BACKOFF);
    }
}

async fn follow(
    config: &ProgramConfig,
    credentials: &ProgramCredentials,
    channel: Channel,
    received: &mut bool,
) -> Result<std::convert::Infallible, FollowError> {
    let failed = |status| FollowError::Failed(Box::new(status));
    let mut own = credentials.subscribe();
    let mut workloads = credentials.shared.workload_generation.subscribe();
    let (answers, outgoing) = mpsc::channel(4);
    let mut said = in_use(config, credentials, 0);
    // There is room: the channel is new. The CA answers the call once it has seen the first message.
    let _ = answers.try_send(said);
    let mut stream = TrustBundlesClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .stream(ReceiverStream::new(outgoing))
        .await
        .map_err(failed)?
        .into_inner();
    loop {
        tokio::select! {
            message = stream.message() => {
                let message = message.map_err(failed)?.ok_or(FollowError::Ended)?;
                put_in_use(config, credentials, message).await?;
                *received = true;
            }
            _ = own.changed() => {}
            _ = workloads.changed() => {}
        }
        own.mark_unchanged();
        workloads.mark_unchanged();
        if !*received {
            continue;
        }
        let now = in_use(
            config,
            credentials,
            credentials.shared.bundle.borrow().sequence,
        );
        if now != said {
            answers.send(now).await.map_err(|_| FollowError::Ended)?;
            said = now;
        }
    }
}

async fn put_in_use(
    config: &ProgramConfig,
    credentials: &ProgramCredentials,
    message: wire::TrustBundle,
) -> Result<(), FollowError> {
    let bundle =
        TrustBundle::from_wire(&config.trust_domain, message).map_err(FollowError::Bundle)?;
    let held = credentials.shared.bundle.borrow().sequence;
    if bundle.sequence < held {
        // A replica of the CA that lags; what it has not heard of yet is not undone here.
        tracing::warn!(
            held,
            received = bundle.sequence,
            "older trust bundle ignored"
        );
        return Ok(());
    }
    let bundle = Arc::new(bundle);
    credentials.shared.use_bundle(bundle.clone());
    tracing::info!(
        sequence = bundle.sequence,
        roots = bundle.roots.len(),
        certificate_generation = bundle.certificate_generation,
        "trust bundle in use"
    );
    if let Err(error) = files::store_bundle(config, &bundle).await {
        // It is in use all the same; only a restart would find an older one.
        tracing::error!(%error, "could not store the trust bundle");
    }
    Ok(())
}

fn in_use(
    config: &ProgramConfig,
    credentials: &ProgramCredentials,
    sequence: u64,
) -> wire::BundleInUse {
    wire::BundleInUse {
        sequence,
        certificate_generation: credentials.lowest_generation(),
        module: match config.module {
            Module::Controller => wire::Module::Unspecified,
            Module::Proxy => wire::Module::Proxy,
            Module::Redirect => wire::Module::Redirect,
        }
        .into(),
    }
}
