// SPDX-License-Identifier: Apache-2.0
use crate::{BackEnd, Obstacle, PluginState, PodCondition, Status};
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
        repairs: IntGauge::new(
            "podveil_redirect_repairs",
            "How often capture of this node's present pods was found changed and was written again",
        )?,
        proxy: IntGauge::new("podveil_redirect_proxy_connected", "A proxy takes pods")?,
        back_end: gauges(
            "podveil_redirect_back_end",
            "1 for the back end that new captures are made with",
            "back_end",
        )?,
        unusable: IntGaugeVec::new(
            Opts::new(
                "podveil_redirect_back_end_unusable",
                "1 for a back end that would have been taken, by the feature that this node lacks",
            ),
            &["back_end", "feature"],
        )?,
        uncaptured: IntGauge::new(
            "podveil_redirect_started_uncaptured",
            "Captured pods of this node whose containers may have run before: the CNI plugin did not ask about them",
        )?,
        plugin: IntGauge::new(
            "podveil_cni_installed",
            "The CNI plugin is the last of this node's chain",
        )?,
        answers: gauges(
            "podveil_cni_answers",
            "What the CNI plugin was told about pods that were to start, since this program started",
            "verdict",
        )?,
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
    repairs: IntGauge,
    back_end: IntGaugeVec,
    unusable: IntGaugeVec,
    uncaptured: IntGauge,
    plugin: IntGauge,
    answers: IntGaugeVec,
}

impl Collector for Metrics {
    fn desc(&self) -> Vec<&Desc> {
        [
            self.pods.desc(),
            self.not_captured.desc(),
            self.connections.desc(),
            self.fence.desc(),
            self.proxy.desc(),
            self.repairs.desc(),
            self.back_end.desc(),
            self.unusable.desc(),
            self.uncaptured.desc(),
            self.plugin.desc(),
            self.answers.desc(),
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
        self.repairs.set(sum(|pod| pod.repairs));
        self.proxy.set(i64::from(status.proxy_connected));
        if let Some(chosen) = &status.chosen {
            for back_end in BackEnd::ALL {
                self.back_end
                    .with_label_values(&[&back_end.to_string()])
                    .set((chosen.back_end == back_end).into());
            }
            for missing in &chosen.unusable {
                let labels = [missing.back_end.to_string(), missing.feature.to_string()];
                self.unusable.with_label_values(&labels).set(1);
            }
        }
        let uncaptured = status.pods.iter().filter(|pod| pod.started_uncaptured);
        self.uncaptured.set(uncaptured.count() as i64);
        let installed = status.plugin == PluginState::Installed;
        self.plugin.set(i64::from(installed));
        let answered = status.answered;
        for (verdict, count) in [
            ("captured", answered.captured),
            ("not_enrolled", answered.not_enrolled),
            ("refused", answered.refused),
        ] {
            let count = i64::try_from(count).unwrap_or(i64::MAX);
            self.answers.with_label_values(&[verdict]).set(count);
        }
        [
            self.pods.collect(),
            self.not_captured.collect(),
            self.connections.collect(),
            self.fence.collect(),
            self.proxy.collect(),
            self.repairs.collect(),
            self.back_end.collect(),
            self.unusable.collect(),
            self.uncaptured.collect(),
            self.plugin.collect(),
            self.answers.collect(),
        ]
        .concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Answered, Chosen, Feature, PodStatus, Unusable};
    use podveil_apply::FenceCount;
    use std::sync::Arc;

    #[test]
    fn the_lines_are_exported() {
        let (_sender, status) = watch::channel(Status {
            proxy_connected: true,
            chosen: Some(Arc::new(Chosen {
                back_end: BackEnd::Nftables,
                unusable: vec![Unusable {
                    back_end: BackEnd::Ebpf,
                    feature: Feature::SkLookup,
                    reason: "".into(),
                }],
            })),
            pods: vec![PodStatus {
                uid: "u".into(),
                condition: PodCondition::Ready,
                reason: "".into(),
                obstacle: Some(Obstacle::PortTaken),
                started_uncaptured: true,
                older: 2,
                captured: 3,
                fence: FenceCount {
                    out_packets: 4,
                    ..FenceCount::default()
                },
                no_listener_syns: 0,
                back_end: Some(BackEnd::Nftables),
                captured_since: None,
                verified: None,
                repairs: 5,
            }],
            plugin: PluginState::Installed,
            answered: Answered {
                refused: 5,
                ..Answered::default()
            },
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
            "podveil_redirect_repairs 5",
            "podveil_redirect_back_end{back_end=\"ebpf\"} 0",
            "podveil_redirect_back_end{back_end=\"nftables\"} 1",
            "podveil_redirect_back_end_unusable{back_end=\"ebpf\",feature=\"sk_lookup\"} 1",
            "podveil_redirect_started_uncaptured 1",
            "podveil_cni_installed 1",
            "podveil_cni_answers{verdict=\"refused\"} 5",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }
}
