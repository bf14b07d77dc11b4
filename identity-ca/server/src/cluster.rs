// SPDX-License-Identifier: Apache-2.0
use crate::entitlement::Entitlements;
use podveil_identity::TrustDomain;
use podveil_source::{Cluster, FileSource};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// While the first reading fails: the file may not be there yet.
const RETRY: Duration = Duration::from_millis(500);

/// Follows the cluster on a task until `stop`. `None` until the first reading: then nobody is entitled to anything, and
/// requests are answered Unavailable.
pub fn follow(
    source: PathBuf,
    trust_domain: TrustDomain,
    stop: CancellationToken,
) -> watch::Receiver<Option<Arc<Entitlements>>> {
    let (entitlements, received) = watch::channel(None);
    tokio::spawn(async move {
        let following = follow_until_stopped(source, trust_domain, entitlements, stop.clone());
        stop.run_until_cancelled(following).await;
    });
    received
}

async fn follow_until_stopped(
    path: PathBuf,
    trust_domain: TrustDomain,
    entitlements: watch::Sender<Option<Arc<Entitlements>>>,
    stop: CancellationToken,
) {
    let mut told = None;
    let source = loop {
        match FileSource::start(&path, stop.clone()) {
            Ok(source) => break source,
            Err(error) => {
                let text = crate::refusal::with_sources(&error);
                if told.as_ref() != Some(&text) {
                    tracing::error!(
                        error = text,
                        "the cluster cannot be read; nothing is issued to nodes yet"
                    );
                    told = Some(text);
                }
            }
        }
        tokio::time::sleep(RETRY).await;
    };
    let mut cluster = source.cluster();
    loop {
        let read = cluster.borrow_and_update().clone();
        apply(&read, &trust_domain, &entitlements);
        if cluster.changed().await.is_err() {
            return;
        }
    }
}

fn apply(
    cluster: &Cluster,
    trust_domain: &TrustDomain,
    entitlements: &watch::Sender<Option<Arc<Entitlements>>>,
) {
    if cluster.trust_domain != *trust_domain {
        tracing::error!(
            cluster = %cluster.trust_domain,
            ours = %trust_domain,
            "the cluster is of another trust domain; the last reading stays in use"
        );
        return;
    }
    let now = Instant::now().into_std();
    entitlements.send_modify(|held| {
        *held = Some(Arc::new(Entitlements::read(cluster, held.as_deref(), now)));
    });
}
