// SPDX-License-Identifier: Apache-2.0
use crate::{Obstacle, PodCondition, Status};
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{IntGauge, IntGaugeVec, Opts, Registry};
use tokio::sync::watch;

/// Registers the module's metrics, read from `status` at each scrape.
/// # Errors
/// If one of the names is taken in `registry`.
pub fn register(registry: &Registry, status: watch::Receiver<Status>) -> prometheus::Result<()> {
    let gauges = |name, help, label| IntGaugeVec::new(Opts::new(name, help), &[label]);
    registry.register(Box::new(Metrics {
        pods: gauges(
            "podveil_redirect_pods",
            "Pods of this node under redirection, by condition",
            "condition",
        )?,
        not_captured: gauges(
            "podveil_redirect_not_captured",
            "Pods of this node that should be captured and are kept from it, by what",
            "obstacle",
        )?,
        connections: gauges(
            "podveil_redirect_connections",
            "Open connections of this node's pods: through the proxy, or older than capture",
            "kind",
        )?,
        fence: gauges(
            "podveil_fence_packets",
            "Packets that the fences of this node's present pods refused; zero in a healthy cluster",
            "direction",
        )?,
        proxy: IntGauge::new("podveil_redirect_proxy_connected", "A proxy takes pods")?,
        status,
    }))
}

struct Metrics {
    status: watch::Receiver<Status>,
    pods: IntGaugeVec,
    not_captured: IntGaugeVec,
    connections: IntGaugeVec,
    fence: IntGaugeVec,
    proxy: IntGauge,
}

impl Collector for Metrics {
    fn desc(&self) -> Vec<&Desc> {
        [
            self.pods.desc(),
            self.not_captured.desc(),
            self.connections.desc(),
            self.fence.desc(),
            self.proxy.desc(),
        ]
        .concat()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let status = self.status.borrow().clone();
        for condition in PodCondition::ALL {
            let pods = status.pods.iter().filter(|pod| pod.condition == condition);
            self.pods
                .with_label_values(&[&condition.to_string()])
                .set(pods.count() as i64);
        }
        for obstacle in Obstacle::ALL {
            let kept = status
                .pods
                .iter()
                .filter(|pod| pod.obstacle == Some(obstacle));
            self.not_captured
                .with_label_values(&[&obstacle.to_string()])
                .set(kept.count() as i64);
        }
        let sum = |of: fn(&crate::PodStatus) -> u64| status.pods.iter().map(of).sum::<u64>() as i64;
        for (kind, count) in [
            ("captured", sum(|pod| pod.captured as u64)),
            ("older", sum(|pod| pod.older as u64)),
        ] {
            self.connections.with_label_values(&[kind]).set(count);
        }
        for (direction, count) in [
            ("in", sum(|pod| pod.fence.in_packets)),
            ("out", sum(|pod| pod.fence.out_packets)),
            ("reply", sum(|pod| pod.fence.lost_reply_packets)),
        ] {
            self.fence.with_label_values(&[direction]).set(count);
        }
        self.proxy.set(i64::from(status.proxy_connected));
        [
            self.pods.collect(),
            self.not_captured.collect(),
            self.connections.collect(),
            self.fence.collect(),
            self.proxy.collect(),
        ]
        .concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PodStatus;
    use podveil_apply::FenceCount;

    #[test]
    fn the_lines_are_exported() {
        let (_sender, status) = watch::channel(Status {
            proxy_connected: true,
            pods: vec![PodStatus {
                uid: "u".into(),
                condition: PodCondition::Ready,
                reason: "".into(),
                obstacle: Some(Obstacle::PortTaken),
                older: 2,
                captured: 3,
                fence: FenceCount {
                    out_packets: 4,
                    ..FenceCount::default()
                },
            }],
            ..Status::default()
        });
        let registry = Registry::new();
        register(&registry, status).unwrap();
        let text = prometheus::TextEncoder::new()
            .encode_to_string(&registry.gather())
            .unwrap();
        for line in [
            "podveil_redirect_pods{condition=\"ready\"} 1",
            "podveil_redirect_not_captured{obstacle=\"port_taken\"} 1",
            "podveil_redirect_connections{kind=\"older\"} 2",
            "podveil_redirect_connections{kind=\"captured\"} 3",
            "podveil_fence_packets{direction=\"out\"} 4",
            "podveil_redirect_proxy_connected 1",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }
}
