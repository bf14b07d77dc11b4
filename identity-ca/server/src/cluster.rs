// SPDX-License-Identifier: Apache-2.0
use crate::entitlement::{Entitlements, Programs};
use crate::waiting::Waiting;
use podveil_identity::{KubernetesName, TrustDomain};
use podveil_kube::kube::Client;
use podveil_kube::{KubeOptions, KubeSource, Scope};
use podveil_source::{Cluster, Defaults, FileSource};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// While the first reading fails: the file may not be there yet.
const RETRY: Duration = Duration::from_millis(500);

/// Where the cluster is read.
#[derive(Clone)]
pub enum Source {
    File(PathBuf),
    Kubernetes {
        client: Client,
        namespace: KubernetesName,
    },
}

type Sender = watch::Sender<Option<Arc<Entitlements>>>;

/// Follows the cluster on a task until `stop`. `None` until the first reading: then nobody is entitled to anything, and
/// requests are answered Unavailable.
pub fn follow(
    source: Source,
    trust_domain: TrustDomain,
    defaults: Defaults,
    waiting: Waiting,
    stop: CancellationToken,
) -> watch::Receiver<Option<Arc<Entitlements>>> {
    let (entitlements, received) = watch::channel(None);
    waiting.set("the cluster has not been read yet");
    tokio::spawn(async move {
        let following = async {
            match source {
                Source::File(path) => {
                    follow_file(
                        path,
                        &trust_domain,
                        defaults,
                        &entitlements,
                        &waiting,
                        &stop,
                    )
                    .await;
                }
                Source::Kubernetes { client, namespace } => {
                    let options = KubeOptions {
                        trust_domain: trust_domain.clone(),
                        scope: Scope::Pods,
                        own_namespace: namespace.clone(),
                        defaults,
                        take_over: true,
                    };
                    let source = KubeSource::start(client, options, stop.clone());
                    let programs = Programs::Pods { namespace };
                    follow_api(source, &programs, &trust_domain, &entitlements, &waiting).await;
                }
            }
        };
        stop.run_until_cancelled(following).await;
    });
    received
}

async fn follow_file(
    path: PathBuf,
    trust_domain: &TrustDomain,
    defaults: Defaults,
    entitlements: &Sender,
    waiting: &Waiting,
    stop: &CancellationToken,
) {
    let mut told = None;
    let source = loop {
        match FileSource::start(&path, defaults, stop.clone()) {
            Ok(source) => break source,
            Err(error) => {
                let text = crate::refusal::with_sources(&error);
                waiting.set(format!("the cluster has not been read yet: {text}"));
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
        apply(&read, &Programs::Listed, trust_domain, entitlements);
        waiting.done();
        if cluster.changed().await.is_err() {
            return;
        }
    }
}

async fn follow_api(
    source: KubeSource,
    programs: &Programs,
    trust_domain: &TrustDomain,
    entitlements: &Sender,
    waiting: &Waiting,
) {
    let (mut cluster, mut status) = (source.cluster(), source.status());
    loop {
        let read = cluster.borrow_and_update().clone();
        match read {
            Some(read) => {
                apply(&read, programs, trust_domain, entitlements);
                waiting.done();
            }
            None => {
                let error = status.borrow_and_update().error.clone();
                if let Some(error) = error {
                    let text = crate::refusal::with_sources(&error);
                    waiting.set(format!("the cluster has not been read yet: {text}"));
                }
            }
        }
        // The sender of the status is the source's, too.
        let changed = tokio::select! {
            changed = cluster.changed() => changed,
            changed = status.changed() => changed,
        };
        if changed.is_err() {
            return;
        }
    }
}

fn apply(
    cluster: &Cluster,
    programs: &Programs,
    trust_domain: &TrustDomain,
    entitlements: &Sender,
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
        let read = Entitlements::read(cluster, programs, held.as_deref(), now);
        *held = Some(Arc::new(read));
    });
}
