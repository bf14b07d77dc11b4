// SPDX-License-Identifier: Apache-2.0
//! Where the cluster is read from, as one pair of channels whatever it is.

use crate::StartError;
use crate::config::Config;
use podveil_kube::kube::Client;
use podveil_kube::{KubeOptions, KubeSource, Scope};
use podveil_source::{Cluster, FileSource, SourceConfig, Status};
use std::sync::Arc;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub(crate) struct Source {
    /// `None` until there is a first state.
    pub cluster: watch::Receiver<Option<Arc<Cluster>>>,
    pub status: watch::Receiver<Status>,
    /// Where the source is an API, it takes events and status too.
    pub client: Option<Client>,
}

impl Source {
    pub(crate) async fn start(
        config: &Config,
        client: Option<Client>,
        stop: &CancellationToken,
    ) -> Result<Self, StartError> {
        match &config.source {
            SourceConfig::File(path) => {
                let source = FileSource::start(path, config.defaults, stop.clone())
                    .map_err(StartError::Source)?;
                let found = source.cluster().borrow().trust_domain.clone();
                let configured = config.trust_domain()?;
                if found != configured {
                    return Err(StartError::OtherTrustDomain { found, configured });
                }
                Ok(Self {
                    status: source.status(),
                    cluster: optional(source.cluster()),
                    client: None,
                })
            }
            SourceConfig::Kubernetes => {
                let client = match client {
                    Some(client) => client,
                    None => podveil_kube::client()
                        .await
                        .map_err(StartError::Kubernetes)?,
                };
                let options = KubeOptions {
                    trust_domain: config.trust_domain()?,
                    scope: Scope::All,
                    own_namespace: config.namespace()?,
                    defaults: config.defaults,
                    take_over: config.take_over,
                };
                let source = KubeSource::start(client.clone(), options, stop.clone());
                Ok(Self {
                    cluster: source.cluster(),
                    status: source.status(),
                    client: Some(client),
                })
            }
        }
    }
}

/// The task ends with the source.
fn optional(mut source: watch::Receiver<Arc<Cluster>>) -> watch::Receiver<Option<Arc<Cluster>>> {
    let first = source.borrow_and_update().clone();
    let (sender, receiver) = watch::channel(Some(first));
    tokio::spawn(async move {
        while source.changed().await.is_ok() {
            let newest = source.borrow_and_update().clone();
            sender.send_replace(Some(newest));
        }
    });
    receiver
}
