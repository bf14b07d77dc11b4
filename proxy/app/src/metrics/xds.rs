// SPDX-License-Identifier: Apache-2.0
use podveil_xds_client::{Counts, ResourceType, Termination};
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{IntCounterVec, Opts, Registry};
use std::sync::Arc;

/// What the xDS client has received, under the names that Istio's dashboards know. The client counts; these are brought up
/// to date when they are read.
#[derive(Clone, Debug)]
pub struct XdsMetrics {
    counts: Arc<Counts>,
    messages: IntCounterVec,
    message_bytes: IntCounterVec,
    terminations: IntCounterVec,
}

impl XdsMetrics {
    pub fn register(registry: &Registry, counts: Arc<Counts>) {
        let counter = |name: &str, help: &str, label: &str| {
            IntCounterVec::new(Opts::new(name, help), &[label])
                .expect("names and labels are constants that Prometheus takes")
        };
        let metrics = Self {
            counts,
            messages: counter(
                "istio_xds_message_total",
                "Messages received from the control plane",
                "url",
            ),
            message_bytes: counter(
                "istio_xds_message_bytes_total",
                "Bytes of those messages",
                "url",
            ),
            terminations: counter(
                "istio_xds_connection_terminations_total",
                "Streams to the control plane that ended, or could not be opened",
                "reason",
            ),
        };
        super::register(registry, Ok(metrics));
    }
}

impl Collector for XdsMetrics {
    fn desc(&self) -> Vec<&Desc> {
        [
            self.messages.desc(),
            self.message_bytes.desc(),
            self.terminations.desc(),
        ]
        .concat()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let bring = |vec: &IntCounterVec, label: &str, now: u64| {
            let counter = vec.with_label_values(&[label]);
            counter.inc_by(now.saturating_sub(counter.get()));
        };
        for one in ResourceType::ALL {
            let url = one.type_url();
            bring(&self.messages, url, self.counts.messages(one));
            bring(&self.message_bytes, url, self.counts.message_bytes(one));
        }
        for how in Termination::ALL {
            bring(
                &self.terminations,
                how.label(),
                self.counts.terminations(how),
            );
        }
        [
            self.messages.collect(),
            self.message_bytes.collect(),
            self.terminations.collect(),
        ]
        .concat()
    }
}
