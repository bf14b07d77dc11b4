// SPDX-License-Identifier: Apache-2.0
use super::labels::{NAMES, TrafficLabels, WorkloadKey, key, reporter, without_ends};
use super::live::{ByteCounters, LiveConnections};
use super::register;
use podveil_flow::{ConnectionRecord, DropReason, Verdict};
use prometheus::{IntCounter, IntCounterVec, IntGaugeVec, Opts, Registry};
use std::collections::{HashMap, HashSet};
use std::hash::RandomState;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// Workloads that exist, as metrics name them.
pub type LiveWorkloads = HashSet<WorkloadKey>;

/// Counters of connections and bytes.
#[derive(Debug)]
pub struct TrafficMetrics {
    opened: IntCounterVec,
    closed: IntCounterVec,
    failed: IntCounterVec,
    bytes: ByteCounters,
    open: IntGaugeVec,
    refused: IntCounterVec,
    overflow: IntCounter,
    series: Mutex<Series>,
    bound: usize,
    kept: Duration,
}

/// The label sets that have counters, by the hash of what they are made of.
#[derive(Debug, Default)]
struct Series {
    held: HashMap<u64, Held>,
    hasher: RandomState,
}

#[derive(Debug)]
struct Held {
    counters: Arc<SeriesCounters>,
    gone_since: Option<Instant>,
}

/// The counters of one label set, found once for all connections of one kind.
#[derive(Debug)]
pub struct SeriesCounters {
    labels: TrafficLabels,
    /// Made with the first connection that was opened; together, since a rate needs the zero before the first event.
    carried: OnceLock<Carried>,
    failed: OnceLock<IntCounter>,
}

#[derive(Debug)]
struct Carried {
    opened: IntCounter,
    closed: IntCounter,
    received_bytes: IntCounter,
    sent_bytes: IntCounter,
}

impl SeriesCounters {
    pub(super) fn count_bytes(&self, received: u64, sent: u64) {
        if let Some(carried) = self.carried.get() {
            carried.received_bytes.inc_by(received);
            carried.sent_bytes.inc_by(sent);
        }
    }
}

impl TrafficMetrics {
    /// At most `bound` label sets are held at once; those of gone workloads for `kept` more.
    pub fn new(registry: &Registry, bound: usize, kept: Duration) -> Self {
        let counter = |name: &str, help: &str| {
            register(registry, IntCounterVec::new(Opts::new(name, help), &NAMES))
        };
        let unregistered = |name: &str, help: &str| {
            IntCounterVec::new(Opts::new(name, help), &NAMES)
                .expect("names and labels are constants that Prometheus takes")
        };
        let refused = Opts::new(
            "podveil_connections_refused_total",
            "Connections that were refused, by reason",
        );
        let this = Self {
            opened: counter(
                "istio_tcp_connections_opened_total",
                "Connections that were opened",
            ),
            closed: counter(
                "istio_tcp_connections_closed_total",
                "Connections that ended after they were opened",
            ),
            failed: counter(
                "istio_tcp_connections_failed_total",
                "Connections that were never opened",
            ),
            bytes: register(
                registry,
                Ok(ByteCounters {
                    sent: unregistered(
                        "istio_tcp_sent_bytes_total",
                        "Bytes from destination to source",
                    ),
                    received: unregistered(
                        "istio_tcp_received_bytes_total",
                        "Bytes from source to destination",
                    ),
                    pods: Arc::default(),
                }),
            ),
            open: register(
                registry,
                IntGaugeVec::new(
                    Opts::new("istio_tcp_sockets_open", "Connections that are open now"),
                    &["reporter"],
                ),
            ),
            refused: register(
                registry,
                IntCounterVec::new(refused, &["reporter", "reason"]),
            ),
            overflow: register(
                registry,
                IntCounter::new(
                    "podveil_traffic_series_overflow_total",
                    "Events counted without their workloads, because too many label sets are held",
                ),
            ),
            series: Mutex::default(),
            bound,
            kept,
        };
        // A rate needs the zero before the first event.
        for reporter in ["destination", "source"] {
            this.open.with_label_values(&[reporter]);
            for reason in DropReason::ALL {
                this.refused.with_label_values(&[reporter, reason.label()]);
            }
        }
        this
    }

    /// The table of open connections of one more pod.
    pub fn pod(&self) -> Arc<LiveConnections> {
        self.bytes.pod()
    }

    /// Gives where the connection is counted, for [`Self::closed`].
    pub fn opened(&self, record: &ConnectionRecord) -> Arc<SeriesCounters> {
        self.open
            .with_label_values(&[reporter(record.direction)])
            .inc();
        let counters = self.counters(record);
        self.carried(&counters).opened.inc();
        counters
    }

    pub fn closed(&self, record: &ConnectionRecord, opened: &Arc<SeriesCounters>) {
        self.open
            .with_label_values(&[reporter(record.direction)])
            .dec();
        self.count_reason(record);
        // What ended it may be in the labels.
        let ended = match record.verdict {
            Verdict::Allowed { .. } => opened,
            Verdict::Dropped { .. } => &self.counters(record),
        };
        self.carried(ended).closed.inc();
    }

    /// A connection that was never open.
    pub fn failed(&self, record: &ConnectionRecord) {
        self.count_reason(record);
        let counters = self.counters(record);
        let failed = || self.failed.with_label_values(&counters.labels.values());
        counters.failed.get_or_init(failed).inc();
    }

    fn count_reason(&self, record: &ConnectionRecord) {
        if let Verdict::Dropped { reason, .. } = &record.verdict {
            self.refused
                .with_label_values(&[reporter(record.direction), reason.label()])
                .inc();
        }
    }

    fn carried<'a>(&self, counters: &'a SeriesCounters) -> &'a Carried {
        counters.carried.get_or_init(|| {
            let values = counters.labels.values();
            Carried {
                opened: self.opened.with_label_values(&values),
                closed: self.closed.with_label_values(&values),
                received_bytes: self.bytes.received.with_label_values(&values),
                sent_bytes: self.bytes.sent.with_label_values(&values),
            }
        })
    }

    /// Takes out the series of workloads that have been gone for long enough.
    pub fn sweep(&self, now: Instant, live: &LiveWorkloads) {
        let gone: Vec<Arc<SeriesCounters>> = {
            let mut series = self.lock();
            series
                .held
                .extract_if(|_, held| held.is_over(now, live, self.kept))
                .map(|(_, held)| held.counters)
                .collect()
        };
        for counters in gone {
            for vec in [
                &self.opened,
                &self.closed,
                &self.failed,
                &self.bytes.sent,
                &self.bytes.received,
            ] {
                // An error says that this one was never counted.
                let _never_counted = vec.remove_label_values(&counters.labels.values());
            }
        }
    }

    /// The counters of the record's labels, or of those without workloads where there is no room for more.
    fn counters(&self, record: &ConnectionRecord) -> Arc<SeriesCounters> {
        let mut series = self.lock();
        let names_nobody =
            record.source.workload.is_none() && record.destination.workload.is_none();
        if !names_nobody {
            if let Some(counters) = series.get(record) {
                return counters;
            }
            if series.held.len() < self.bound {
                return series.insert(record);
            }
            self.overflow.inc();
        }
        // Nothing in these grows with the cluster.
        let bare = without_ends(record);
        series.get(&bare).unwrap_or_else(|| series.insert(&bare))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Series> {
        // Counters are whole after each step, so a panic elsewhere leaves nothing half done.
        self.series.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Series {
    fn get(&mut self, record: &ConnectionRecord) -> Option<Arc<SeriesCounters>> {
        let held = self.held.get_mut(&key(record, &self.hasher))?;
        held.gone_since = None;
        Some(held.counters.clone())
    }

    fn insert(&mut self, record: &ConnectionRecord) -> Arc<SeriesCounters> {
        let counters = Arc::new(SeriesCounters {
            labels: TrafficLabels::of(record),
            carried: OnceLock::new(),
            failed: OnceLock::new(),
        });
        let held = Held {
            counters: counters.clone(),
            gone_since: None,
        };
        self.held.insert(key(record, &self.hasher), held);
        counters
    }
}

impl Held {
    fn is_over(&mut self, now: Instant, live: &LiveWorkloads, kept: Duration) -> bool {
        let mut named = self.counters.labels.ends.iter().flatten();
        // An open connection still counts.
        let in_use = Arc::strong_count(&self.counters) > 1;
        if in_use || named.all(|end| live.contains(end)) {
            self.gone_since = None;
            return false;
        }
        let since = *self.gone_since.get_or_insert(now);
        now.duration_since(since) >= kept
    }
}
