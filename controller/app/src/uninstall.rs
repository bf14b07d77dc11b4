// SPDX-License-Identifier: Apache-2.0
//! Taking Podveil out: `podveil-controller uninstall` asks for it by an annotation, the controllers drain every workload
//! as if no namespace had the label, and the one that holds the Lease says when all nodes have let go.

use crate::keeper::Shared;
use anyhow::Context;
use podveil_kube::k8s_openapi::api::core::v1::ConfigMap;
use podveil_kube::kube::api::{Patch, PatchParams};
use podveil_kube::kube::{Api, Client};
use podveil_kube::{Standing, UNINSTALL, UNINSTALL_CONFIG_MAP};
use podveil_source::Cluster;
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// By the controller that holds the Lease: every node has let go of every pod.
const UNINSTALLED: &str = "podveil.io/uninstalled";
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// The subcommand: asks, and waits until it is done.
///
/// # Errors
/// If it is not done in `timeout`; the request has been taken back then, and enrolment goes on.
pub async fn uninstall(client: Client, namespace: &str, timeout: Duration) -> anyhow::Result<()> {
    let maps: Api<ConfigMap> = Api::namespaced(client, namespace);
    let deadline = Instant::now() + timeout;
    let done = tokio::time::timeout_at(deadline, async {
        annotate(&maps, json!({ UNINSTALL: "true", UNINSTALLED: null }))
            .await
            .context("asking the controllers to let go of every pod")?;
        loop {
            match maps.get(UNINSTALL_CONFIG_MAP).await {
                Ok(map) if is_done(&map) => return anyhow::Ok(()),
                Ok(_) => {}
                // The API server may be away for a moment; the deadline holds all the same.
                Err(error) => tracing::warn!(%error, "cannot see how far it is"),
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    })
    .await;
    match done {
        Ok(done) => done,
        Err(_) => {
            annotate(&maps, json!({ UNINSTALL: null }))
                .await
                .context("not all nodes let go in time, and the request cannot be taken back")?;
            anyhow::bail!(
                "not all nodes have let go of their pods within {timeout:?}; enrolment goes on. \
                 `podveilctl status` names those that are waited for"
            )
        }
    }
}

/// The controller's part: says when it is done. Ends with the source.
pub(crate) async fn tell_when_done(
    client: Client,
    namespace: String,
    index: Shared,
    mut cluster: watch::Receiver<Option<Arc<Cluster>>>,
    standing: watch::Receiver<Standing>,
) {
    let maps: Api<ConfigMap> = Api::namespaced(client, &namespace);
    let asked = |cluster: &Option<Arc<Cluster>>| {
        cluster
            .as_ref()
            .is_some_and(|cluster| cluster.released.is_some())
    };
    loop {
        if cluster.wait_for(asked).await.is_err() {
            return;
        }
        tracing::info!("Podveil is being uninstalled: every workload is let go");
        while asked(&cluster.borrow()) {
            if standing.borrow().is_here() && index.has_let_go() {
                match annotate(&maps, json!({ UNINSTALLED: "true" })).await {
                    Ok(()) => break,
                    Err(error) => tracing::warn!(%error, "cannot tell that all nodes have let go"),
                }
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        if cluster.wait_for(|cluster| !asked(cluster)).await.is_err() {
            return;
        }
    }
}

async fn annotate(
    maps: &Api<ConfigMap>,
    annotations: serde_json::Value,
) -> Result<(), podveil_kube::kube::Error> {
    let patch = Patch::Merge(json!({ "metadata": { "annotations": annotations } }));
    maps.patch(UNINSTALL_CONFIG_MAP, &PatchParams::default(), &patch)
        .await
        .map(drop)
}

fn is_done(map: &ConfigMap) -> bool {
    map.metadata
        .annotations
        .as_ref()
        .and_then(|annotations| annotations.get(UNINSTALLED))
        .is_some_and(|value| value == "true")
}

/// A time as `90s`, `4m` or `1h`.
///
/// # Errors
/// A sentence for the person who typed it.
pub fn parse_timeout(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a time like 90s, 4m or 1h");
    let (number, unit) = text
        .split_at_checked(text.len().saturating_sub(1))
        .ok_or_else(wrong)?;
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let seconds = match unit {
        "s" => Some(number),
        "m" => number.checked_mul(60),
        "h" => number.checked_mul(3600),
        _ => None,
    };
    seconds.map(Duration::from_secs).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeout_has_a_unit() {
        assert_eq!(parse_timeout("4m"), Ok(Duration::from_secs(240)));
        assert_eq!(parse_timeout("90s"), Ok(Duration::from_secs(90)));
        for text in ["", "4", "m", "-1s", "4d", "1.5m", "é"] {
            assert!(parse_timeout(text).is_err(), "{text}");
        }
    }
}
