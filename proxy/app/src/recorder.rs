// SPDX-License-Identifier: Apache-2.0
use crate::access_log;
use crate::line_limit::LineLimit;
use crate::metrics::{LiveConnections, TrafficMetrics};
use podveil_flow::{ConnectionRecord, Verdict};
use podveil_net::Counters;
use podveil_state::{ConnectionId, Recorder};
use std::sync::Arc;
use std::time::Instant;

/// Counts and logs the connections of one pod.
#[derive(Debug)]
pub struct PodRecorder {
    traffic: Arc<TrafficMetrics>,
    live: Arc<LiveConnections>,
    refusals: LineLimit,
}

impl PodRecorder {
    pub fn new(traffic: Arc<TrafficMetrics>) -> Self {
        Self {
            live: traffic.pod(),
            traffic,
            refusals: LineLimit::new(Instant::now()),
        }
    }

    /// The pod's open connections.
    pub fn live(&self) -> &LiveConnections {
        &self.live
    }

    /// Refusals are logged up to a rate.
    fn is_logged(&self, connection: &ConnectionRecord) -> bool {
        if matches!(connection.verdict, Verdict::Allowed { .. }) {
            return true;
        }
        let Some(left_out) = self.refusals.admit(Instant::now()) else {
            return false;
        };
        if left_out > 0 {
            tracing::warn!(
                left_out,
                "refused connections of one pod were not logged one by one"
            );
        }
        true
    }
}

impl Recorder for PodRecorder {
    fn opened(&self, connection: &ConnectionRecord, carried: &Arc<Counters>) -> ConnectionId {
        let counters = self.traffic.opened(connection);
        access_log::opened(connection);
        self.live.open(connection, carried, counters)
    }

    fn closed(&self, connection: &ConnectionRecord, opened: Option<ConnectionId>) {
        match opened.and_then(|id| self.live.close(id)) {
            Some(counters) => self.traffic.closed(connection, &counters),
            None => self.traffic.failed(connection),
        }
        if self.is_logged(connection) {
            access_log::closed(connection);
        }
    }
}
