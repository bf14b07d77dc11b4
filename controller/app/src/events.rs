// SPDX-License-Identifier: Apache-2.0
//! Events on the objects that a person looks at, written by the replica that holds the Lease.
//!
//! One event when something becomes so, none while it stays so; what stood already when this replica took over was told by
//! the one before it. Equal events are aggregated by the recorder, and a burst is spread over time.

use crate::keeper::Shared;
use podveil_index::WorkloadStatus;
use podveil_kube::Standing;
use podveil_kube::k8s_openapi::api::core::v1::ObjectReference;
use podveil_kube::kube::Client;
use podveil_kube::kube::runtime::events::{Event, EventType, Recorder, Reporter};
use podveil_model::Stage;
use podveil_source::Cluster;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval};

const EVERY: Duration = Duration::from_secs(2);
/// In one round; the rest waits for the next one.
const MAX_IN_ROUND: usize = 20;
/// Being captured takes a moment; only what takes longer is worth an event.
const PATIENCE: Duration = Duration::from_secs(10);
/// The API takes 1 KiB.
const MAX_NOTE_CHARS: usize = 250;

/// What there may be to say about one object.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
enum Reason {
    BadSetting,
    Enrolled,
    NotCaptured,
}

#[derive(Clone, Debug, Eq, Hash, PartialEq)]
struct Key {
    object: String,
    reason: Reason,
    note: String,
}

#[derive(Debug)]
struct Told {
    at: Instant,
    sent: bool,
}

/// Runs until the controller stops.
pub(crate) async fn write(
    client: Client,
    replica: String,
    index: Shared,
    cluster: watch::Receiver<Option<Arc<Cluster>>>,
    standing: watch::Receiver<Standing>,
) {
    let reporter = Reporter {
        controller: "podveil.io/controller".to_owned(),
        instance: Some(replica),
    };
    let recorder = Recorder::new(client, reporter);
    let mut told: Option<HashMap<Key, Told>> = None;
    let mut tick = interval(EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        if !standing.borrow().is_here() {
            told = None;
            continue;
        }
        let Some(cluster) = cluster.borrow().clone() else {
            continue;
        };
        let now = Instant::now();
        let first = told.is_none();
        let mut last = told.take().unwrap_or_default();
        let mut next = HashMap::new();
        let mut sent = 0;
        for (key, object) in due(&index.status(), &cluster) {
            let mut one = last.remove(&key).unwrap_or(Told {
                at: now,
                // Good news from before are no news.
                sent: first && key.reason == Reason::Enrolled,
            });
            let patience = match key.reason {
                Reason::NotCaptured => PATIENCE,
                Reason::BadSetting | Reason::Enrolled => Duration::ZERO,
            };
            if !one.sent && now.duration_since(one.at) >= patience && sent < MAX_IN_ROUND {
                sent += 1;
                match recorder.publish(&event(&key), &object).await {
                    Ok(()) => one.sent = true,
                    Err(error) => tracing::warn!(%error, "an event could not be written"),
                }
            }
            next.insert(key, one);
        }
        told = Some(next);
    }
}

/// All that is so now.
fn due<'a>(
    status: &'a podveil_index::Status,
    cluster: &'a Cluster,
) -> impl Iterator<Item = (Key, ObjectReference)> + 'a {
    let of_namespaces = status.namespaces.iter().flat_map(|(name, conditions)| {
        let uid = cluster
            .namespace(name)
            .map(|namespace| namespace.uid.to_string());
        conditions.iter().map(move |condition| {
            let object = ObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Namespace".to_owned()),
                name: Some(name.to_string()),
                uid: uid.clone(),
                ..ObjectReference::default()
            };
            (key(name.as_str(), Reason::BadSetting, condition), object)
        })
    });
    let of_pods = status.workloads.iter().flat_map(|workload| {
        let bad = workload
            .conditions
            .iter()
            .map(|condition| (Reason::BadSetting, condition.as_str()));
        let stage = match workload.stage {
            Stage::Mandatory => Some((
                Reason::Enrolled,
                "TCP with other enrolled pods is encrypted and authenticated",
            )),
            Stage::Wanted if !workload.reason.is_empty() => {
                Some((Reason::NotCaptured, workload.reason.as_str()))
            }
            _ => None,
        };
        bad.chain(stage)
            .map(|(reason, note)| (key(&workload.uid.to_string(), reason, note), pod(workload)))
    });
    of_namespaces.chain(of_pods)
}

fn key(object: &str, reason: Reason, note: &str) -> Key {
    Key {
        object: object.to_owned(),
        reason,
        note: note.chars().take(MAX_NOTE_CHARS).collect(),
    }
}

fn pod(workload: &WorkloadStatus) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Pod".to_owned()),
        namespace: Some(workload.identity.namespace.to_string()),
        name: Some(workload.name.to_string()),
        uid: Some(workload.uid.to_string()),
        ..ObjectReference::default()
    }
}

fn event(key: &Key) -> Event {
    let (type_, reason) = match key.reason {
        Reason::BadSetting => (EventType::Warning, "BadSetting"),
        Reason::Enrolled => (EventType::Normal, "Enrolled"),
        Reason::NotCaptured => (EventType::Warning, "NotCaptured"),
    };
    Event {
        type_,
        reason: reason.to_owned(),
        note: Some(key.note.clone()),
        action: "Enrol".to_owned(),
        secondary: None,
    }
}
