// SPDX-License-Identifier: Apache-2.0
//! Which parts of the CA are on Kubernetes, by its configuration.

use crate::cluster::Source;
use crate::config::{Config, FirstContactConfig, StoreConfig};
use crate::consumers::Consumers;
use crate::drill::Replicas;
use crate::first_contact::{FirstContact, Reviews, Tokens};
use crate::ledger::Ledger;
use crate::peers;
use crate::reading::Reading;
use crate::shared;
use crate::store::{KubeSecret, SECRET};
use anyhow::Context;
use podveil_identity::KubernetesName;
use podveil_kube::Election;
use podveil_kube::kube::Client;
use podveil_source::SourceConfig;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// The API server, and Podveil's own namespace there.
pub(crate) struct Api {
    client: Client,
    namespace: KubernetesName,
}

pub(crate) fn needs_api(config: &Config) -> bool {
    config.source == SourceConfig::Kubernetes
        || config.first_contact() == FirstContactConfig::TokenReview
        || config.store() == StoreConfig::Kubernetes
}

impl Api {
    /// `None` where nothing is on Kubernetes.
    pub(crate) fn new(config: &Config, client: Option<Client>) -> anyhow::Result<Option<Self>> {
        if !needs_api(config) {
            return Ok(None);
        }
        let namespace = config
            .namespace
            .parse()
            .with_context(|| format!("namespace {:?}", config.namespace))?;
        let client = client.context("there is no way to the API server")?;
        Ok(Some(Self { client, namespace }))
    }

    pub(crate) fn secret(&self) -> KubeSecret {
        KubeSecret::new(self.client.clone(), self.namespace.as_str())
    }

    /// Starts what replicas do for each other: the election, and the tasks that follow and publish.
    pub(crate) fn share(
        &self,
        ledger: &Arc<Ledger>,
        consumers: &Arc<Consumers>,
        reading: &Reading,
        replica: Option<String>,
        stop: &CancellationToken,
    ) -> anyhow::Result<(Replicas, Election)> {
        let me = replica.filter(|name| !name.is_empty()).context(
            "with the record on Kubernetes, `replica` (environment POD_NAME) names this replica",
        )?;
        let client = || self.client.clone();
        let election = Election::start(
            client(),
            self.namespace.as_str(),
            SECRET,
            me.clone(),
            stop.clone(),
        );
        let (peers, exchange) =
            peers::exchange(client(), self.namespace.as_str(), me, reading.clone());
        let (ledger, consumers) = (ledger.clone(), consumers.clone());
        let (namespace, standing) = (self.namespace.clone(), election.standing());
        let (first, second, stop) = (client(), client(), stop.clone());
        tokio::spawn(async move {
            let tasks = async {
                tokio::join!(
                    shared::follow_record(
                        ledger.clone(),
                        first,
                        namespace.as_str(),
                        standing.clone()
                    ),
                    shared::publish_roots(
                        ledger.clone(),
                        second,
                        namespace.as_str(),
                        standing.clone()
                    ),
                    exchange.run(ledger.clone(), consumers, standing.clone()),
                )
            };
            stop.run_until_cancelled(tasks).await;
        });
        let replicas = Replicas {
            standing: election.standing(),
            peers: Some(peers),
        };
        Ok((replicas, election))
    }
}

pub(crate) fn source(config: &Config, api: Option<&Api>) -> anyhow::Result<Source> {
    Ok(match (&config.source, api) {
        (SourceConfig::File(path), _) => Source::File(path.clone()),
        (SourceConfig::Kubernetes, Some(api)) => Source::Kubernetes {
            client: api.client.clone(),
            namespace: api.namespace.clone(),
        },
        (SourceConfig::Kubernetes, None) => anyhow::bail!("there is no way to the API server"),
    })
}

pub(crate) fn first_contact(
    config: &Config,
    api: Option<&Api>,
    reading: &Reading,
) -> anyhow::Result<FirstContact> {
    Ok(match (config.first_contact(), api) {
        (FirstContactConfig::TokenFiles, _) => {
            FirstContact::Files(Tokens::new(config.tokens_dir.clone()))
        }
        (FirstContactConfig::TokenReview, Some(api)) => {
            anyhow::ensure!(
                config.source == SourceConfig::Kubernetes,
                "first_contact: token_review needs source: kubernetes, which knows the pods that tokens are bound to"
            );
            FirstContact::Review(Reviews::new(
                api.client.clone(),
                api.namespace.clone(),
                reading.clone(),
            ))
        }
        (FirstContactConfig::TokenReview, None) => {
            anyhow::bail!("there is no way to the API server")
        }
    })
}
