// SPDX-License-Identifier: Apache-2.0
use super::labels::{NAMES, TrafficLabels, WorkloadKey, reporter};
use super::register;
use podveil_flow::{ConnectionRecord, DropReason, Verdict};
use prometheus::{IntCounter, IntCounterVec, IntGaugeVec, Opts, Registry};
use std::collections::{HashMap, HashSet};
use std::hash::RandomState;
use std::sync::{Mutex, PoisonError};
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
    sent_bytes: IntCounterVec,
    received_bytes: IntCounterVec,
    open: IntGaugeVec,
    refused: IntCounterVec,
    overflow: IntCounter,
    series: Mutex<Series>,
    bound: usize,
    kept: Duration,
}

/// The label sets that have counters, by the hash of their values.
#[derive(Debug, Default)]
struct Series {
    held: HashMap<u64, Held>,
    hasher: RandomState,
}

#[derive(Debug)]
struct Held {
    labels: TrafficLabels,
    gone_since: Option<Instant>,
}

impl TrafficMetrics {
    /// At most `bound` label sets are held at once; those of gone workloads for `kept` more.
    pub fn new(registry: &Registry, bound: usize, kept: Duration) -> Self {
        let counter = |name: &str, help: &str| {
            register(registry, IntCounterVec::new(Opts::new(name, help), &NAMES))
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
            sent_bytes: counter(
                "istio_tcp_sent_bytes_total",
                "Bytes from destination to source",
            ),
            received_bytes: counter(
                "istio_tcp_received_bytes_total",
                "Bytes from source to destination",
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

    pub fn opened(&self, record: &ConnectionRecord) {
        self.open
            .with_label_values(&[reporter(record.direction)])
            .inc();
        let labels = self.labels(record);
        self.opened.with_label_values(&labels.values()).inc();
    }

    pub fn closed(&self, record: &ConnectionRecord) {
        let labels = self.labels(record);
        let values = labels.values();
        if let Verdict::Dropped { reason, .. } = &record.verdict {
            self.refused
                .with_label_values(&[reporter(record.direction), reason.label()])
                .inc();
        }
        if !record.was_opened() {
            self.failed.with_label_values(&values).inc();
            return;
        }
        self.open
            .with_label_values(&[reporter(record.direction)])
            .dec();
        self.closed.with_label_values(&values).inc();
        self.sent_bytes
            .with_label_values(&values)
            .inc_by(record.sent_bytes);
        self.received_bytes
            .with_label_values(&values)
            .inc_by(record.received_bytes);
    }

    /// Takes out the series of workloads that have been gone for long enough.
    pub fn sweep(&self, now: Instant, live: &LiveWorkloads) {
        let gone: Vec<TrafficLabels> = {
            let mut series = self.lock();
            series
                .held
                .extract_if(|_, held| held.is_over(now, live, self.kept))
                .map(|(_, held)| held.labels)
                .collect()
        };
        for labels in gone {
            for vec in [
                &self.opened,
                &self.closed,
                &self.failed,
                &self.sent_bytes,
                &self.received_bytes,
            ] {
                // An error says that this one was never counted.
                let _never_counted = vec.remove_label_values(&labels.values());
            }
        }
    }

    /// The record's labels, if there is room for them.
    fn labels(&self, record: &ConnectionRecord) -> TrafficLabels {
        let labels = TrafficLabels::of(record);
        if labels.ends == [None, None] {
            // Nothing in these grows with the cluster but the service's name.
            return TrafficLabels::without_ends(record);
        }
        let mut series = self.lock();
        let key = labels.key(&series.hasher);
        if let Some(held) = series.held.get_mut(&key) {
            held.gone_since = None;
        } else if series.held.len() < self.bound {
            series.held.insert(
                key,
                Held {
                    labels: labels.clone(),
                    gone_since: None,
                },
            );
        } else {
            drop(series);
            self.overflow.inc();
            return TrafficLabels::without_ends(record);
        }
        labels
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Series> {
        // Counters are whole after each step, so a panic elsewhere leaves nothing half done.
        self.series.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    fn is_over(&mut self, now: Instant, live: &LiveWorkloads, kept: Duration) -> bool {
        let mut named = self.labels.ends.iter().flatten();
        if named.all(|end| live.contains(end)) {
            self.gone_since = None;
            return false;
        }
        let since = *self.gone_since.get_or_insert(now);
        now.duration_since(since) >= kept
    }
}
