// SPDX-License-Identifier: Apache-2.0
use super::register;
use prometheus::{IntCounter, IntGauge, IntGaugeVec, Opts, Registry};

/// Counts of the pods that this proxy serves, under the names that Istio's dashboards know.
#[derive(Clone, Debug)]
pub struct NodeMetrics {
    pub active_pods: IntGauge,
    pub pending_pods: IntGauge,
    pub pods_started: IntCounter,
    pub pods_stopped: IntCounter,
    /// 1 while the agent, the control plane and the first SVID are there.
    pub connected: IntGaugeVec,
}

impl NodeMetrics {
    pub fn new(registry: &Registry) -> Self {
        let gauge = |name: &str, help: &str| register(registry, IntGauge::new(name, help));
        let counter = |name: &str, help: &str| register(registry, IntCounter::new(name, help));
        let build = Opts::new("istio_build", "What is running: 1 for this version");
        register(registry, IntGaugeVec::new(build, &["component", "tag"]))
            .with_label_values(&["ztunnel", concat!("podveil-", env!("CARGO_PKG_VERSION"))])
            .set(1);
        let connected = Opts::new(
            "podveil_control_plane_connected",
            "1 while there is a connection to this part of the control plane",
        );
        Self {
            active_pods: gauge(
                "workload_manager_active_proxy_count",
                "Pods that are served now",
            ),
            pending_pods: gauge(
                "workload_manager_pending_proxy_count",
                "Pods whose listeners are not served yet",
            ),
            pods_started: counter(
                "workload_manager_proxies_started_total",
                "Pods whose listeners were taken",
            ),
            pods_stopped: counter(
                "workload_manager_proxies_stopped_total",
                "Pods that are no longer served",
            ),
            connected: register(registry, IntGaugeVec::new(connected, &["part"])),
        }
    }
}
