// SPDX-License-Identifier: Apache-2.0
use super::traffic::SeriesCounters;
use podveil_flow::{ConnectionRecord, Direction};
use podveil_net::Counters;
use podveil_state::ConnectionId;
use prometheus::IntCounterVec;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// The open connections of one pod, whose bytes are counted while they flow.
#[derive(Debug, Default)]
pub struct LiveConnections {
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    next: u64,
    open: HashMap<ConnectionId, Live>,
}

#[derive(Debug)]
struct Live {
    shown: Shown,
    carried: Arc<Counters>,
    counters: Arc<SeriesCounters>,
    /// Of `carried`, what the counters hold already: received, sent.
    told: (u64, u64),
}

/// What is shown of an open connection.
#[derive(Clone, Copy, Debug)]
pub struct Shown {
    pub direction: Direction,
    pub source: Option<SocketAddr>,
    pub destination: Option<SocketAddr>,
    /// The tunnel's far address, for an HBONE connection.
    pub hbone: Option<SocketAddr>,
    /// Source to destination, so far.
    pub received_bytes: u64,
    /// Destination to source, so far.
    pub sent_bytes: u64,
}

impl LiveConnections {
    pub fn open(
        &self,
        record: &ConnectionRecord,
        carried: &Arc<Counters>,
        counters: Arc<SeriesCounters>,
    ) -> ConnectionId {
        let live = Live {
            shown: Shown {
                direction: record.direction,
                source: record.source.address,
                destination: record.destination.address,
                hbone: record.hbone,
                received_bytes: 0,
                sent_bytes: 0,
            },
            carried: carried.clone(),
            counters,
            told: (0, 0),
        };
        let mut table = self.lock();
        let id = ConnectionId(table.next);
        table.next += 1;
        table.open.insert(id, live);
        id
    }

    /// Counts the last bytes; gives back where they were counted.
    pub fn close(&self, id: ConnectionId) -> Option<Arc<SeriesCounters>> {
        let mut live = self.lock().open.remove(&id)?;
        live.tell();
        Some(live.counters)
    }

    pub fn count(&self) -> usize {
        self.lock().open.len()
    }

    /// At most `limit` of them, as they are now.
    pub fn shown(&self, limit: usize) -> Vec<Shown> {
        let table = self.lock();
        let shown = |live: &Live| Shown {
            received_bytes: live.carried.a_to_b(),
            sent_bytes: live.carried.b_to_a(),
            ..live.shown
        };
        table.open.values().take(limit).map(shown).collect()
    }

    fn tell(&self) {
        self.lock().open.values_mut().for_each(Live::tell);
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // The table is whole between any two statements, so a panic elsewhere cannot have broken it.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Live {
    fn tell(&mut self) {
        let now = (self.carried.a_to_b(), self.carried.b_to_a());
        let before = std::mem::replace(&mut self.told, now);
        self.counters
            .count_bytes(now.0 - before.0, now.1 - before.1);
    }
}

/// The byte counters, brought up to date with every open connection whenever they are read.
#[derive(Clone, Debug)]
pub(super) struct ByteCounters {
    pub received: IntCounterVec,
    pub sent: IntCounterVec,
    /// One for each pod that is or was served.
    pub pods: Arc<Mutex<Vec<Weak<LiveConnections>>>>,
}

impl ByteCounters {
    /// The table of one more pod.
    pub fn pod(&self) -> Arc<LiveConnections> {
        let live = Arc::default();
        let mut pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
        pods.retain(|pod| pod.strong_count() > 0);
        pods.push(Arc::downgrade(&live));
        live
    }
}

impl Collector for ByteCounters {
    fn desc(&self) -> Vec<&Desc> {
        [self.received.desc(), self.sent.desc()].concat()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let pods = self
            .pods
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        for pod in pods.iter().filter_map(Weak::upgrade) {
            pod.tell();
        }
        [self.received.collect(), self.sent.collect()].concat()
    }
}
