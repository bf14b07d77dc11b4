// SPDX-License-Identifier: Apache-2.0
//! What the consumers of the *other* replicas have in use. While a rotation is under way every replica but the one that
//! acts writes a summary of its consumers into ConfigMap `podveil-ca-replicas`, under its own name; at rest nobody writes
//! anything.
//!
//! The replica that acts takes no step before each replica that runs (by the pod watch) has said what its consumers have
//! at that step: a replica that is silent is a consumer that has not acknowledged. Through the API server, since that is
//! what replicas share anyway: a replica that cannot reach it has not heard of the rotation either, and with streams
//! between replicas, or from every node to every replica, a cut between two of them would look like having no consumers.

use crate::api::Objects;
use crate::consumers::{Consumers, InUse, Module};
use crate::ledger::{Ledger, Snapshot};
use crate::reading::Reading;
use crate::rotation::{Acknowledged, Presence};
use crate::shared::{Told, changed};
use futures::StreamExt;
use podveil_identity::ProgramIdentity;
use podveil_kube::Standing;
use podveil_kube::k8s_openapi::api::core::v1::ConfigMap;
use podveil_kube::kube::api::{Patch, PatchParams};
use podveil_kube::kube::runtime::WatchStreamExt;
use podveil_kube::kube::runtime::watcher::watch_object;
use podveil_kube::kube::{self, Api, Client};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::watch;

pub(crate) const REPLICAS: &str = "podveil-ca-replicas";

/// Between two writes of one replica.
const MIN_INTERVAL: Duration = Duration::from_secs(1);

/// What one replica says of its consumers.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct Summary {
    /// Of the record that this replica has read.
    sequence: u64,
    connected: Vec<Group>,
    gone: Vec<Group>,
}

/// Consumers that have the same in use.
#[derive(Clone, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
struct Group {
    sequence: u64,
    generation: u64,
    /// Unix seconds; 0 for those that are connected.
    since: u64,
    names: Vec<String>,
}

/// The other replicas' summaries, as the newest watch event gave them.
#[derive(Clone, Debug)]
pub(crate) struct Peers {
    summaries: watch::Receiver<Arc<BTreeMap<String, Summary>>>,
    me: String,
    reading: Reading,
}

impl Peers {
    /// `own` are this replica's consumers; the answer is everybody's.
    pub(crate) fn acknowledged(&self, own: Vec<Acknowledged>, now: Instant) -> Vec<Acknowledged> {
        let running = self.reading.replicas();
        let summaries = self.summaries.borrow().clone();
        merge(
            own,
            &summaries,
            &running,
            &self.me,
            (now, SystemTime::now()),
        )
    }

    pub(crate) async fn changed(&mut self) {
        if self.summaries.changed().await.is_err() {
            std::future::pending().await
        }
    }
}

/// Starts to exchange summaries; the task ends when the future of `run` is dropped.
pub(crate) fn exchange(
    client: Client,
    namespace: &str,
    me: String,
    reading: Reading,
) -> (Peers, Exchange) {
    let (sender, summaries) = watch::channel(Arc::default());
    let exchange = Exchange {
        maps: Objects::new(client.clone(), Some(namespace)),
        api: Api::namespaced(client, namespace),
        me: me.clone(),
        summaries: sender,
        told: Told::default(),
    };
    let peers = Peers {
        summaries,
        me,
        reading,
    };
    (peers, exchange)
}

pub(crate) struct Exchange {
    maps: Objects<ConfigMap>,
    api: Api<ConfigMap>,
    me: String,
    summaries: watch::Sender<Arc<BTreeMap<String, Summary>>>,
    told: Told,
}

impl Exchange {
    /// CANCEL: nothing is half done.
    pub(crate) async fn run(
        mut self,
        ledger: Arc<Ledger>,
        consumers: Arc<Consumers>,
        mut standing: watch::Receiver<Standing>,
    ) {
        let mut changes = pin!(watch_object(self.api.clone(), REPLICAS).default_backoff());
        let mut snapshots = ledger.subscribe();
        let mut consumers_changed = consumers.subscribe();
        // What stands in the ConfigMap under our name, and whether anything does under any.
        let mut written: Option<String> = None;
        let mut any = false;
        let mut next_write = tokio::time::Instant::now();
        let mut unwritten = false;
        loop {
            tokio::select! {
                change = changes.next() => match change {
                    Some(Ok(map)) => {
                        let data = map.and_then(|map| map.data).unwrap_or_default();
                        written = data.get(&self.me).cloned();
                        any = !data.is_empty();
                        self.take(&data);
                    }
                    Some(Err(error)) => self.told.failure("the replicas cannot be watched", &error),
                    None => tokio::time::sleep(MIN_INTERVAL).await,
                },
                // Their senders are in `ledger` and `consumers`.
                _ = snapshots.changed() => {}
                _ = consumers_changed.changed() => {}
                () = changed(&mut standing) => {}
                () = tokio::time::sleep_until(next_write), if unwritten => {}
            }
            let snapshot = snapshots.borrow_and_update().clone();
            consumers_changed.mark_unchanged();
            let here = standing.borrow_and_update().is_here();
            let wanted = (snapshot.rotation.is_some() && !here).then(|| {
                let summary = Summary::of(&consumers, &snapshot);
                serde_json::to_string(&summary).expect("plain data is always JSON")
            });
            // After a rotation the replica that acts clears away what is left, also of replicas that are gone.
            let clear = here && snapshot.rotation.is_none() && any;
            unwritten = wanted != written || clear;
            if !unwritten || tokio::time::Instant::now() < next_write {
                continue;
            }
            let patch = if clear {
                serde_json::json!({ "data": null })
            } else {
                serde_json::json!({ "data": { &self.me: wanted } })
            };
            match self.write(&patch).await {
                Ok(()) => {
                    self.told = Told::default();
                    written = wanted;
                    any = !clear;
                    unwritten = false;
                }
                Err(error) => {
                    let what = "the other replicas cannot be told what is in use here";
                    self.told.failure(what, &*error);
                }
            }
            next_write = tokio::time::Instant::now() + MIN_INTERVAL;
        }
    }

    async fn write(
        &self,
        patch: &serde_json::Value,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let written = self
            .api
            .patch(REPLICAS, &PatchParams::default(), &Patch::Merge(patch))
            .await;
        match written {
            Err(kube::Error::Api(status)) if status.code == 404 => {
                let mut map = ConfigMap::default();
                map.metadata.name = Some(REPLICAS.into());
                map.data = serde_json::from_value(patch["data"].clone()).unwrap_or_default();
                self.maps.put(&map).await?;
                Ok(())
            }
            written => Ok(written.map(drop)?),
        }
    }

    fn take(&self, data: &BTreeMap<String, String>) {
        let mut summaries = BTreeMap::new();
        for (replica, text) in data {
            match serde_json::from_str(text) {
                Ok(summary) => {
                    summaries.insert(replica.clone(), summary);
                }
                // Of another version of this program: it counts as not having said anything.
                Err(_) => tracing::warn!(replica, "a summary that is not understood"),
            }
        }
        self.summaries.send_replace(Arc::new(summaries));
    }
}

impl Summary {
    fn of(consumers: &Consumers, snapshot: &Snapshot) -> Self {
        let mut groups: BTreeMap<(InUse, Option<u64>), Vec<String>> = BTreeMap::new();
        let (now, wall) = (tokio::time::Instant::now().into_std(), SystemTime::now());
        for (name, in_use, presence) in consumers.list() {
            let since = match presence {
                Presence::Connected => None,
                Presence::Gone { since } => Some(unix(wall - now.saturating_duration_since(since))),
            };
            // Ourselves among them: the CA's own certificate is renewed as any other.
            let name = match (&name.program, name.module) {
                (ProgramIdentity::Ca, Module::None) => continue,
                _ => name.to_string(),
            };
            groups.entry((in_use, since)).or_default().push(name);
        }
        let group = |(in_use, since): (InUse, Option<u64>), names| Group {
            sequence: in_use.sequence,
            generation: in_use.generation,
            since: since.unwrap_or(0),
            names,
        };
        let (connected, gone): (Vec<_>, Vec<_>) = groups
            .into_iter()
            .partition(|((_, since), _)| since.is_none());
        let all = |groups: Vec<_>| groups.into_iter().map(|(key, names)| group(key, names));
        Self {
            sequence: snapshot.sequence,
            connected: all(connected).collect(),
            gone: all(gone).collect(),
        }
    }
}

fn unix(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}

/// `running` are the replicas by the pod watch; where it knows none, those that have written.
fn merge(
    own: Vec<Acknowledged>,
    summaries: &BTreeMap<String, Summary>,
    running: &[Arc<str>],
    me: &str,
    (now, wall): (Instant, SystemTime),
) -> Vec<Acknowledged> {
    let mut all: HashMap<String, Acknowledged> = HashMap::new();
    for one in own {
        all.insert(one.name.clone(), one);
    }
    let others: Vec<&str> = if running.is_empty() {
        summaries.keys().map(String::as_str).collect()
    } else {
        running.iter().map(AsRef::as_ref).collect()
    };
    for replica in others.into_iter().filter(|replica| *replica != me) {
        let said = summaries.get(replica).cloned().unwrap_or_default();
        all.insert(
            format!("podveil-ca {replica}"),
            Acknowledged {
                name: format!("podveil-ca {replica}"),
                sequence: said.sequence,
                // Its own certificate follows the record that it has read.
                generation: u64::MAX,
                presence: Presence::Connected,
            },
        );
        for group in said.connected.iter().chain(&said.gone) {
            let presence = match group.since {
                0 => Presence::Connected,
                since => {
                    let age = Duration::from_secs(unix(wall).saturating_sub(since));
                    let since = now.checked_sub(age).unwrap_or(now);
                    Presence::Gone { since }
                }
            };
            for name in &group.names {
                let one = Acknowledged {
                    name: name.clone(),
                    sequence: group.sequence,
                    generation: group.generation,
                    presence,
                };
                all.entry(name.clone())
                    .and_modify(|known| *known = better(known, &one))
                    .or_insert(one);
            }
        }
    }
    let mut all: Vec<_> = all.into_values().collect();
    all.sort_by(|one, other| one.name.cmp(&other.name));
    all
}

/// Of two things said of one consumer. It is where it is connected; of two streams, the one that has less may be the one
/// in use; of two that have ended, the later one counts.
fn better(one: &Acknowledged, other: &Acknowledged) -> Acknowledged {
    let first = match (one.presence, other.presence) {
        (Presence::Connected, Presence::Gone { .. }) => true,
        (Presence::Gone { .. }, Presence::Connected) => false,
        (Presence::Connected, Presence::Connected) => {
            (one.sequence, one.generation) <= (other.sequence, other.generation)
        }
        (Presence::Gone { since }, Presence::Gone { since: other }) => since >= other,
    };
    if first { one.clone() } else { other.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(name: &str, sequence: u64, presence: Presence) -> Acknowledged {
        Acknowledged {
            name: name.into(),
            sequence,
            generation: 1,
            presence,
        }
    }

    fn summary(sequence: u64, connected: &[(&str, u64)], gone: &[(&str, u64, u64)]) -> Summary {
        let group = |name: &str, sequence, since| Group {
            sequence,
            generation: 1,
            since,
            names: vec![name.to_owned()],
        };
        Summary {
            sequence,
            connected: connected
                .iter()
                .map(|(name, sequence)| group(name, *sequence, 0))
                .collect(),
            gone: gone
                .iter()
                .map(|(name, sequence, since)| group(name, *sequence, *since))
                .collect(),
        }
    }

    fn merged(
        own: Vec<Acknowledged>,
        summaries: &[(&str, Summary)],
        running: &[&str],
        now: Instant,
    ) -> Vec<(String, u64, Presence)> {
        let summaries = summaries
            .iter()
            .map(|(name, summary)| ((*name).to_owned(), summary.clone()))
            .collect();
        let running: Vec<Arc<str>> = running.iter().map(|name| (*name).into()).collect();
        let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        merge(own, &summaries, &running, "a", (now, wall))
            .into_iter()
            .map(|one| (one.name, one.sequence, one.presence))
            .collect()
    }

    #[test]
    fn a_running_replica_that_has_said_nothing_is_waited_for() {
        let now = Instant::now();
        let connected = Presence::Connected;
        assert_eq!(
            merged(vec![at("n1", 5, connected)], &[], &["a", "b"], now),
            [
                ("n1".to_owned(), 5, connected),
                ("podveil-ca b".to_owned(), 0, connected)
            ]
        );
    }

    #[test]
    fn consumers_of_all_running_replicas_are_counted_once() {
        let now = Instant::now();
        let connected = Presence::Connected;
        let gone = |seconds| Presence::Gone {
            since: now - Duration::from_secs(seconds),
        };
        let own = vec![
            at("both", 5, connected),
            at("left", 4, gone(1)),
            at("moved", 4, gone(1)),
            at("own", 5, connected),
        ];
        let b = summary(
            5,
            &[("both", 4), ("moved", 5), ("theirs", 5)],
            &[("left", 5, 990)],
        );
        let dead = summary(5, &[("forgotten", 1)], &[]);
        assert_eq!(
            merged(own, &[("b", b), ("dead", dead)], &["a", "b"], now),
            [
                ("both".to_owned(), 4, connected),
                ("left".to_owned(), 4, gone(1)),
                ("moved".to_owned(), 5, connected),
                ("own".to_owned(), 5, connected),
                ("podveil-ca b".to_owned(), 5, connected),
                ("theirs".to_owned(), 5, connected),
            ]
        );
    }
}
