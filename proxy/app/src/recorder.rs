// SPDX-License-Identifier: Apache-2.0
use crate::access_log;
use crate::line_limit::LineLimit;
use crate::metrics::TrafficMetrics;
use podveil_flow::{ConnectionRecord, Verdict};
use podveil_state::Recorder;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

/// Counts and logs the connections of one pod.
#[derive(Debug)]
pub struct PodRecorder {
    traffic: Arc<TrafficMetrics>,
    carried: AtomicU32,
    refusals: LineLimit,
}

impl PodRecorder {
    pub fn new(traffic: Arc<TrafficMetrics>) -> Self {
        Self {
            traffic,
            carried: AtomicU32::new(0),
            refusals: LineLimit::new(Instant::now()),
        }
    }

    /// Connections of this pod that are open now.
    pub fn carried(&self) -> u32 {
        self.carried.load(Ordering::Relaxed)
    }
}

impl Recorder for PodRecorder {
    fn opened(&self, connection: &ConnectionRecord) {
        self.carried.fetch_add(1, Ordering::Relaxed);
        self.traffic.opened(connection);
        access_log::opened(connection);
    }

    fn closed(&self, connection: &ConnectionRecord) {
        if connection.was_opened() {
            self.carried.fetch_sub(1, Ordering::Relaxed);
        }
        self.traffic.closed(connection);
        if matches!(connection.verdict, Verdict::Dropped { .. }) {
            match self.refusals.admit(Instant::now()) {
                None => return,
                Some(0) => {}
                Some(left_out) => tracing::warn!(
                    left_out,
                    "refused connections of one pod were not logged one by one"
                ),
            }
        }
        access_log::closed(connection);
    }
}
