// SPDX-License-Identifier: Apache-2.0
//! What `/metrics` shows: Istio's names and labels, so that existing dashboards work, and ours beside them.
//!
//! Bytes are counted while they flow: a scrape asks every open connection ([`LiveConnections`]).
//!
//! Traffic is counted per label set, of which there is a bound; those of workloads that are gone are taken out after a
//! time ([`TrafficMetrics::sweep`]). Everything else has labels from closed lists.

mod labels;
mod live;
mod node;
mod process;
mod traffic;
mod xds;

pub use labels::TrafficLabels;
pub use live::{LiveConnections, Shown};
pub use node::NodeMetrics;
pub use process::ProcessMetrics;
pub use traffic::{LiveWorkloads, TrafficMetrics};
pub use xds::XdsMetrics;

/// Registers a metric of this program, whose name and labels are written here.
fn register<M: prometheus::core::Collector + Clone + 'static>(
    registry: &prometheus::Registry,
    metric: Result<M, prometheus::Error>,
) -> M {
    let metric = metric.expect("names and labels are constants that Prometheus takes");
    registry
        .register(Box::new(metric.clone()))
        .expect("each metric is registered once");
    metric
}

#[cfg(test)]
mod tests;
