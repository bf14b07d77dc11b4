// SPDX-License-Identifier: Apache-2.0
//! Taking Podveil out: `podveil-controller uninstall` asks for it by an annotation, the controllers drain every workload
//! as if no namespace had the label, and the one that holds the Lease says when all nodes have let go.

use crate::keeper::Shared;
use anyhow::Context;
use podveil_index::Done;
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

/// By the controller that holds the Lease: every node has let go of every pod, or ([`EXCEPT_SILENT`]) every one that can
/// be heard.
const UNINSTALLED: &str = "podveil.io/uninstalled";
const EXCEPT_SILENT: &str = "except-silent";
/// By the same: what is still waited for, for a person.
const WAITS_FOR: &str = "podveil.io/uninstall-waits-for";
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// The subcommand: asks, and waits until it is done.
///
/// Nodes that nobody hears are waited for all the same, unless `skip_silent`: their pods would stay captured by programs
/// that nobody starts again.
///
/// # Errors
/// If it is not done in `timeout`; the request has been taken back then, and enrolment goes on.
pub async fn uninstall(
    client: Client,
    namespace: &str,
    timeout: Duration,
    skip_silent: bool,
) -> anyhow::Result<()> {
    let maps: Api<ConfigMap> = Api::namespaced(client, namespace);
    let deadline = Instant::now() + timeout;
    let mut waits_for = String::new();
    let done = tokio::time::timeout_at(deadline, async {
        let ask = json!({ UNINSTALL: "true", UNINSTALLED: null, WAITS_FOR: null });
        annotate(&maps, ask)
            .await
            .context("asking the controllers to let go of every pod")?;
        loop {
            match maps.get(UNINSTALL_CONFIG_MAP).await {
                Ok(map) => {
                    let newest = annotation(&map, WAITS_FOR);
                    if newest != waits_for && !newest.is_empty() {
                        tracing::info!("waiting for: {newest}");
                        waits_for = newest.to_owned();
                    }
                    match annotation(&map, UNINSTALLED) {
                        "true" => return anyhow::Ok(()),
                        EXCEPT_SILENT if skip_silent => {
                            tracing::warn!(
                                "not waited for any longer, pods stay captured there: {waits_for}"
                            );
                            return Ok(());
                        }
                        _ => {}
                    }
                }
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
            let taken_back = json!({ UNINSTALL: null, UNINSTALLED: null, WAITS_FOR: null });
            annotate(&maps, taken_back)
                .await
                .context("not all nodes let go in time, and the request cannot be taken back")?;
            if waits_for.is_empty() {
                anyhow::bail!(
                    "no controller has answered within {timeout:?}; nothing is uninstalled. \
                     See that podveil-controller runs, and uninstall again"
                )
            }
            anyhow::bail!(
                "not all nodes have let go of their pods within {timeout:?}; nothing is uninstalled and enrolment goes \
                 on. Waited for: {waits_for}. Start podveil-node again on those that are silent, or delete the Node \
                 objects of machines that are gone, and uninstall again; with the value uninstall.skipSilent they are \
                 left as they are, and connections of their pods fail until those are restarted"
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
    let asked = |cluster: &Option<Arc<Cluster>>| cluster.as_ref()?.released;
    // Together with the request that it answers: one may be taken back and made again between two looks.
    let mut told = None;
    while cluster
        .wait_for(|cluster| asked(cluster).is_some())
        .await
        .is_ok()
    {
        tracing::info!("Podveil is being uninstalled: every workload is let go");
        while let Some(request) = { asked(&cluster.borrow()) } {
            if standing.borrow().is_here() {
                let left = index.letting_go();
                let (done, waits_for) = (left.done(), left.to_string());
                let newest = Some((request, done, waits_for));
                if told != newest
                    && let Some((_, done, waits_for)) = &newest
                {
                    match annotate(&maps, word(*done, waits_for)).await {
                        Ok(()) => told = newest,
                        Err(error) => tracing::warn!(%error, "cannot tell who has let go"),
                    }
                }
            } else {
                told = None;
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }
}

fn word(done: Option<Done>, waits_for: &str) -> serde_json::Value {
    let done = match done {
        None => None,
        Some(Done::All) => Some("true"),
        Some(Done::ExceptSilent) => Some(EXCEPT_SILENT),
    };
    json!({ UNINSTALLED: done, WAITS_FOR: waits_for })
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

/// Empty where there is none.
fn annotation<'a>(map: &'a ConfigMap, key: &str) -> &'a str {
    let annotations = map.metadata.annotations.as_ref();
    annotations
        .and_then(|annotations| annotations.get(key))
        .map_or("", String::as_str)
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
