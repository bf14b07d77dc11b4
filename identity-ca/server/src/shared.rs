// SPDX-License-Identifier: Apache-2.0
//! One record for several replicas: each follows the Secret, and the one that acts publishes the roots.

use crate::api::{ApiError, Objects};
use crate::ledger::{Ledger, LedgerError};
use crate::refusal::with_sources;
use crate::store::{ROOTS, ROOTS_KEY, SECRET};
use futures::StreamExt;
use podveil_kube::Standing;
use podveil_kube::k8s_openapi::api::core::v1::{ConfigMap, Secret};
use podveil_kube::kube::core::PartialObjectMeta;
use podveil_kube::kube::runtime::WatchStreamExt;
use podveil_kube::kube::runtime::watcher::{self, Event, watch_object, watcher};
use podveil_kube::kube::{Api, Client, ResourceExt};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

const RETRY: Duration = Duration::from_secs(2);

/// Where a replica stands, for whoever waits for it to change. Without an election it never does.
pub(crate) async fn changed(standing: &mut watch::Receiver<Standing>) {
    if standing.changed().await.is_err() {
        std::future::pending().await
    }
}

/// Reads the record again whenever another replica has written it. Only the Secret's metadata is watched: its values
/// travel when they have changed, and never through a watch's buffers.
///
/// CANCEL: nothing is half done.
pub(crate) async fn follow_record(
    ledger: Arc<Ledger>,
    client: Client,
    namespace: &str,
    standing: watch::Receiver<Standing>,
) {
    let secrets: Api<PartialObjectMeta<Secret>> = Api::namespaced(client, namespace);
    let only = watcher::Config::default().fields(&format!("metadata.name={SECRET}"));
    let mut changes = pin!(watcher(secrets, only).default_backoff());
    let mut told = Told::default();
    // The version to be read; what was read last is known to the ledger.
    let mut unread: Option<Option<String>> = None;
    loop {
        tokio::select! {
            change = changes.next() => match change {
                Some(Ok(Event::Apply(secret) | Event::InitApply(secret))) => {
                    unread = Some(secret.resource_version());
                }
                Some(Ok(Event::Delete(_))) => unread = Some(None),
                Some(Ok(Event::Init | Event::InitDone)) => {}
                Some(Err(error)) => told.failure("the CA's record cannot be watched", &error),
                None => tokio::time::sleep(RETRY).await,
            },
            () = tokio::time::sleep(RETRY), if unread.is_some() => {}
        }
        let Some(version) = &unread else { continue };
        match ledger.refresh(version.as_deref()).await {
            Ok(()) => {
                told = Told::default();
                unread = None;
            }
            // Somebody emptied it; what is in use is not lost by that.
            Err(LedgerError::LostJournal { .. }) if standing.borrow().is_here() => {
                match ledger.restore().await {
                    Ok(()) => tracing::warn!("the CA's record was gone; it is written again"),
                    Err(error) => told.failure("the CA's record is gone", &error),
                }
            }
            Err(error) => told.failure(
                "the CA's record cannot be used; the last good one is",
                &error,
            ),
        }
    }
}

/// Keeps the roots in their ConfigMap, as long as this replica acts: after a change of ours and after one of somebody
/// else's.
///
/// CANCEL: nothing is half done.
pub(crate) async fn publish_roots(
    ledger: Arc<Ledger>,
    client: Client,
    namespace: &str,
    mut standing: watch::Receiver<Standing>,
) {
    let maps: Objects<ConfigMap> = Objects::new(client.clone(), Some(namespace));
    let mut changes = pin!(
        watch_object(Api::<ConfigMap>::namespaced(client, namespace), ROOTS).default_backoff()
    );
    let mut snapshots = ledger.subscribe();
    let mut told = Told::default();
    // As the watch said last; before that nothing is written over.
    let mut published: Option<Option<ConfigMap>> = None;
    let mut again = false;
    loop {
        tokio::select! {
            change = changes.next() => match change {
                Some(Ok(map)) => published = Some(map),
                Some(Err(error)) => told.failure("the published roots cannot be watched", &error),
                None => tokio::time::sleep(RETRY).await,
            },
            // The sender is in `ledger`.
            _ = snapshots.changed() => {}
            () = changed(&mut standing) => {}
            () = tokio::time::sleep(RETRY), if again => {}
        }
        again = false;
        let bundle = snapshots.borrow_and_update().bundle_pem();
        let Some(map) = &published else { continue };
        if !standing.borrow().is_here() || roots(map.as_ref()) == Some(&bundle) {
            continue;
        }
        match maps.put(&with_roots(map.clone(), bundle)).await {
            Ok(map) => {
                tracing::info!(config_map = ROOTS, "roots published");
                published = Some(Some(map));
                told = Told::default();
            }
            // The watch brings the version to write over.
            Err(ApiError::Conflict) => again = true,
            Err(error) => {
                told.failure("the roots cannot be published", &error);
                again = true;
            }
        }
    }
}

fn roots(map: Option<&ConfigMap>) -> Option<&String> {
    map?.data.as_ref()?.get(ROOTS_KEY)
}

fn with_roots(map: Option<ConfigMap>, bundle: String) -> ConfigMap {
    let mut map = map.unwrap_or_default();
    map.metadata.name = Some(ROOTS.into());
    map.metadata.managed_fields = None;
    // A key may be in one of the two only.
    if let Some(binary) = &mut map.binary_data {
        binary.remove(ROOTS_KEY);
    }
    map.data
        .get_or_insert_default()
        .insert(ROOTS_KEY.into(), bundle);
    map
}

/// An outage is one line in the log, not one for each attempt.
#[derive(Default)]
pub(crate) struct Told(Option<String>);

impl Told {
    pub(crate) fn failure(
        &mut self,
        what: &'static str,
        error: &(dyn std::error::Error + 'static),
    ) {
        let text = format!("{what}: {}", with_sources(error));
        if self.0.as_ref() != Some(&text) {
            tracing::error!("{text}");
            self.0 = Some(text);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use podveil_kube::k8s_openapi::ByteString;

    #[test]
    fn publishing_roots_leaves_what_others_wrote_and_takes_the_key_alone() {
        let mut map = ConfigMap::default();
        map.metadata.resource_version = Some("7".into());
        map.data = Some([("other".to_owned(), "stays".to_owned())].into());
        map.binary_data = Some([(ROOTS_KEY.to_owned(), ByteString(vec![1]))].into());
        let map = with_roots(Some(map), "roots".into());
        assert_eq!(roots(Some(&map)).unwrap(), "roots");
        assert_eq!(map.data.as_ref().unwrap()["other"], "stays");
        assert!(map.binary_data.unwrap().is_empty());
        assert_eq!(map.metadata.resource_version.as_deref(), Some("7"));
        assert_eq!(map.metadata.name.as_deref(), Some(ROOTS));
    }
}
