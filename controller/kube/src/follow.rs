// SPDX-License-Identifier: Apache-2.0
//! One watch: list, follow, and again from the start where the server has forgotten where we were.

use crate::kinds::{Kind, Tables, version};
use crate::table::Fault;
use futures::StreamExt;
use kube::Api;
use kube::runtime::watcher::{self, Event, InitialListStrategy, watcher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

/// After one that failed. There are few of us, and a cluster that comes back should be known again soon.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// For a kind that the server does not have, or does not give us.
const ABSENT_PAUSE: Duration = Duration::from_secs(60);

/// What the watches write and the join reads.
#[derive(Clone, Debug, Default)]
pub(crate) struct Shared {
    tables: Arc<Mutex<Tables>>,
    /// Something changed that anybody reads.
    pub changed: Arc<Notify>,
}

impl Shared {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Follows one kind for ever.
pub(crate) async fn follow<K: Kind>(api: Api<K::Object>, fields: Option<String>, shared: Shared) {
    let mut strategy = InitialListStrategy::StreamingList;
    loop {
        let config = watcher::Config {
            initial_list_strategy: strategy.clone(),
            field_selector: fields.clone(),
            ..watcher::Config::default()
        };
        let mut events = watcher(api.clone(), config).boxed();
        let mut pause = FIRST_PAUSE;
        while let Some(event) = events.next().await {
            match event {
                Ok(event) => {
                    pause = FIRST_PAUSE;
                    take::<K>(event, &shared);
                }
                Err(error) => {
                    let status = status(&error);
                    if matches!(strategy, InitialListStrategy::StreamingList)
                        && matches!(status, Some(400 | 422))
                    {
                        tracing::info!(
                            kind = K::NAME,
                            "the API server has no streaming lists; reading page by page"
                        );
                        strategy = InitialListStrategy::ListWatch;
                        break;
                    }
                    let absent = K::OPTIONAL && matches!(status, Some(403 | 404));
                    fail::<K>(&error, absent, &shared);
                    tokio::time::sleep(if absent { ABSENT_PAUSE } else { pause }).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
    }
}

fn take<K: Kind>(event: Event<K::Object>, shared: &Shared) {
    let mut tables = shared.lock();
    let newest = match &event {
        Event::Apply(object) | Event::Delete(object) | Event::InitApply(object) => version(object),
        Event::Init | Event::InitDone => 0,
    };
    tables.version = tables.version.max(newest);
    let table = K::table(&mut tables);
    let mut changed = !matches!(event, Event::Init) && table.fault.take().is_some();
    changed |= match event {
        Event::Init => {
            table.begin();
            false
        }
        Event::InitApply(object) => {
            if let Some(key) = K::key(&object)
                && let Some(kept) = K::read(object)
            {
                table.list(key, kept);
            }
            false
        }
        Event::InitDone => table.end(),
        Event::Apply(object) => match K::key(&object) {
            Some(key) => table.apply(key, K::read(object)),
            None => false,
        },
        Event::Delete(object) => match K::key(&object) {
            Some(key) => table.apply(key, None),
            None => false,
        },
    };
    drop(tables);
    if changed {
        shared.changed.notify_one();
    }
}

fn fail<K: Kind>(error: &watcher::Error, absent: bool, shared: &Shared) {
    let mut tables = shared.lock();
    let table = K::table(&mut tables);
    if absent {
        if !table.complete {
            tracing::info!(kind = K::NAME, "not to be had from this API server");
            table.begin();
            table.end();
            shared.changed.notify_one();
        }
        return;
    }
    let sentence: Arc<str> = format!("watching {}: {}", K::NAME, with_sources(error)).into();
    let new = table
        .fault
        .as_ref()
        .is_none_or(|fault| fault.sentence != sentence);
    if new {
        tracing::warn!(
            kind = K::NAME,
            error = &*sentence,
            "a watch is broken; what it told last stays in use"
        );
    }
    table.fault = Some(Fault {
        at: Instant::now(),
        sentence,
    });
    drop(tables);
    shared.changed.notify_one();
}

/// The HTTP status that the server answered with.
fn status(error: &watcher::Error) -> Option<u16> {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status))
        | watcher::Error::WatchFailed(kube::Error::Api(status))
        | watcher::Error::WatchError(status) => Some(status.code),
        _ => None,
    }
}

fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let next = error.to_string();
        if !text.contains(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        source = error.source();
    }
    text
}
