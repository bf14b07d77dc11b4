// SPDX-License-Identifier: Apache-2.0
//! Events on the objects that a person looks at, written by the replica that holds the Lease.
//!
//! One event when something becomes so, none while it stays so or becomes so again soon; what stood already when this
//! replica took over was told by the one before it. A burst is spread over time.

use crate::backends::Refused;
use crate::keeper::Shared;
use podveil_identity::KubernetesName;
use podveil_index::WorkloadStatus;
use podveil_kube::Standing;
use podveil_kube::k8s_openapi::api::core::v1::ObjectReference;
use podveil_kube::kube::Client;
use podveil_kube::kube::runtime::events::{Event, EventType, Recorder, Reporter};
use podveil_model::Stage;
use podveil_source::Cluster;
use std::borrow::Cow;
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
/// What is so again within this was told already: pods that flap are no news.
const REMEMBERED: Duration = Duration::from_secs(600);
/// Of things that are no longer so; above it the oldest are forgotten, and told again where they come back.
const MAX_REMEMBERED: usize = 20_000;
/// The API takes 1 KiB.
const MAX_NOTE_CHARS: usize = 500;
const ENROLLED: &str = "TCP with other enrolled pods is encrypted and authenticated";
const STARTED_UNCAPTURED: &str = "its containers started before it was captured, since the CNI plugin did not ask about it: what \
    they sent until then was plain. A pod made anew starts captured";

/// What there may be to say about one object.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
enum Reason {
    BadSetting,
    CaptureBroken,
    Enrolled,
    NotCaptured,
    NotEnrolled,
    RefusesApiServer,
    StartedUncaptured,
}

/// Cheap to make: there is one for each enrolled pod in each round.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
struct Key {
    object: Arc<str>,
    reason: Reason,
    note: Cow<'static, str>,
}

/// What an event is about.
#[derive(Clone, Copy, Debug)]
enum Object<'a> {
    Namespace(&'a KubernetesName),
    Pod(&'a WorkloadStatus),
}

#[derive(Debug)]
struct Told {
    /// When it became so.
    at: Instant,
    sent: bool,
    /// Since when it is no longer so.
    gone: Option<Instant>,
}

/// Runs until the controller stops.
pub(crate) async fn write(
    client: Client,
    replica: String,
    index: Shared,
    cluster: watch::Receiver<Option<Arc<Cluster>>>,
    refused: watch::Receiver<Arc<Refused>>,
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
        let refused = refused.borrow().clone();
        for (key, object) in due(&index.status(), &refused) {
            let mut one = last.remove(&key).unwrap_or(Told {
                at: now,
                // Good news from before are no news.
                sent: first && key.reason == Reason::Enrolled,
                gone: None,
            });
            one.gone = None;
            if !one.sent && now.duration_since(one.at) >= key.patience() && sent < MAX_IN_ROUND {
                sent += 1;
                let object = object.reference(&cluster);
                match recorder.publish(&event(&key), &object).await {
                    Ok(()) => one.sent = true,
                    Err(error) => tracing::warn!(%error, "an event could not be written"),
                }
            }
            next.insert(key, one);
        }
        remember(&mut next, last, now);
        told = Some(next);
    }
}

/// What was told and is no longer so.
fn remember(next: &mut HashMap<Key, Told>, gone: HashMap<Key, Told>, now: Instant) {
    let room = MAX_REMEMBERED.saturating_sub(next.len());
    let mut gone: Vec<_> = gone
        .into_iter()
        .filter(|(_, told)| told.sent)
        .map(|(key, told)| {
            let gone = Some(told.gone.unwrap_or(now));
            (key, Told { gone, ..told })
        })
        .filter(|(_, told)| {
            told.gone
                .is_some_and(|gone| now.duration_since(gone) < REMEMBERED)
        })
        .collect();
    gone.sort_by_key(|(_, told)| std::cmp::Reverse(told.gone));
    next.extend(gone.into_iter().take(room));
}

/// All that is so now.
fn due<'a>(
    status: &'a podveil_index::Status,
    refused: &'a Refused,
) -> impl Iterator<Item = (Key, Object<'a>)> + 'a {
    let bad = status.namespaces.iter().flat_map(|(name, conditions)| {
        let bad = move |note: &'a String| (name, Reason::BadSetting, shortened(note));
        conditions.iter().map(bad)
    });
    let not_begun = status.not_begun.iter().flat_map(|(why, namespaces)| {
        let note = shortened(&why.to_string());
        let refused = move |name: &'a _| (name, Reason::NotEnrolled, note.clone());
        namespaces.iter().map(refused)
    });
    let refused = refused.iter().flat_map(|(name, notes)| {
        let refused = move |note: &'a String| (name, Reason::RefusesApiServer, shortened(note));
        notes.iter().map(refused)
    });
    let of_namespaces = bad
        .chain(not_begun)
        .chain(refused)
        .map(|(name, reason, note)| {
            let object = name.as_str().into();
            let key = Key {
                object,
                reason,
                note,
            };
            (key, Object::Namespace(name))
        });
    let of_pods = status.workloads.iter().flat_map(|workload| {
        let bad = workload
            .conditions
            .iter()
            .map(|condition| (Reason::BadSetting, shortened(condition)));
        let stage = match workload.workload.stage {
            Stage::Mandatory if !workload.reason.is_empty() => {
                Some((Reason::CaptureBroken, shortened(&workload.reason)))
            }
            Stage::Mandatory => Some((Reason::Enrolled, Cow::from(ENROLLED))),
            Stage::Wanted if !workload.reason.is_empty() => {
                Some((Reason::NotCaptured, shortened(&workload.reason)))
            }
            _ => None,
        };
        let uncaptured = (workload.started_uncaptured)
            .then_some((Reason::StartedUncaptured, Cow::from(STARTED_UNCAPTURED)));
        bad.chain(stage).chain(uncaptured).map(|(reason, note)| {
            let object = workload.workload.uid.0.clone();
            let key = Key {
                object,
                reason,
                note,
            };
            (key, Object::Pod(workload))
        })
    });
    of_namespaces.chain(of_pods)
}

fn shortened(note: &str) -> Cow<'static, str> {
    note.chars().take(MAX_NOTE_CHARS).collect::<String>().into()
}

impl Key {
    fn patience(&self) -> Duration {
        match self.reason {
            Reason::CaptureBroken | Reason::NotCaptured => PATIENCE,
            Reason::BadSetting
            | Reason::Enrolled
            | Reason::NotEnrolled
            | Reason::RefusesApiServer
            | Reason::StartedUncaptured => Duration::ZERO,
        }
    }
}

impl Object<'_> {
    fn reference(self, cluster: &Cluster) -> ObjectReference {
        let (kind, namespace, name, uid) = match self {
            Self::Namespace(name) => {
                let known = cluster.namespace(name);
                let uid = known.map(|namespace| namespace.uid.to_string());
                ("Namespace", None, name.to_string(), uid)
            }
            Self::Pod(WorkloadStatus { workload: pod, .. }) => (
                "Pod",
                Some(pod.identity.namespace.to_string()),
                pod.name.to_string(),
                Some(pod.uid.to_string()),
            ),
        };
        ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some(kind.to_owned()),
            namespace,
            name: Some(name),
            uid,
            ..ObjectReference::default()
        }
    }
}

fn event(key: &Key) -> Event {
    let (type_, reason) = match key.reason {
        Reason::BadSetting => (EventType::Warning, "BadSetting"),
        Reason::CaptureBroken => (EventType::Warning, "CaptureBroken"),
        Reason::Enrolled => (EventType::Normal, "Enrolled"),
        Reason::NotCaptured => (EventType::Warning, "NotCaptured"),
        Reason::NotEnrolled => (EventType::Warning, "NotEnrolled"),
        Reason::RefusesApiServer => (EventType::Warning, "RefusesApiServer"),
        Reason::StartedUncaptured => (EventType::Warning, "StartedUncaptured"),
    };
    Event {
        type_,
        reason: reason.to_owned(),
        note: Some(key.note.to_string()),
        action: "Enrol".to_owned(),
        secondary: None,
    }
}
