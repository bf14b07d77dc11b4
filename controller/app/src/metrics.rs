// SPDX-License-Identifier: Apache-2.0
//! Metrics, read from the index when they are asked for; nothing is counted twice.

use crate::keeper::Shared;
use podveil_ca_client::transport::Refusals;
use podveil_model::Stage;
use podveil_source::Status;
use podveil_xds_server::Publisher;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{IntCounterVec, IntGauge, IntGaugeVec, Opts};
use std::sync::Arc;
use tokio::sync::watch;

const STAGES: [Stage; 6] = [
    Stage::None,
    Stage::Wanted,
    Stage::Capturable,
    Stage::Announced,
    Stage::Mandatory,
    Stage::Draining,
];

#[derive(Debug)]
pub(crate) struct Metrics {
    index: Shared,
    source: watch::Receiver<Status>,
    publisher: Publisher,
    connections: Arc<Refusals>,
    conditions: IntGauge,
    programs: IntGaugeVec,
    refused_connections: IntCounterVec,
    snapshot: IntGauge,
    source_broken: IntGauge,
    workloads: IntGaugeVec,
}

impl Metrics {
    pub(crate) fn new(
        index: Shared,
        source: watch::Receiver<Status>,
        publisher: Publisher,
        connections: Arc<Refusals>,
    ) -> Result<Self, prometheus::Error> {
        Ok(Self {
            index,
            source,
            publisher,
            connections,
            refused_connections: IntCounterVec::new(
                Opts::new(
                    "podveil_controller_connections_refused_total",
                    "Connections of programs that were closed before their first request, by reason.",
                ),
                &["reason"],
            )?,
            conditions: IntGauge::new(
                "podveil_controller_conditions",
                "Settings and claims that could not be taken as they were written.",
            )?,
            programs: IntGaugeVec::new(
                Opts::new(
                    "podveil_controller_programs",
                    "Programs of nodes that are expected or report, by module and whether they are heard.",
                ),
                &["module", "state"],
            )?,
            snapshot: IntGauge::new(
                "podveil_controller_snapshot",
                "Number of the newest snapshot.",
            )?,
            source_broken: IntGauge::new(
                "podveil_controller_source_broken",
                "1 while the newest content of the source is not in use.",
            )?,
            workloads: IntGaugeVec::new(
                Opts::new(
                    "podveil_controller_workloads",
                    "Workloads by enrolment stage.",
                ),
                &["stage"],
            )?,
        })
    }

    fn collectors(&self) -> [&dyn Collector; 6] {
        [
            &self.conditions,
            &self.programs,
            &self.refused_connections,
            &self.snapshot,
            &self.source_broken,
            &self.workloads,
        ]
    }

    fn read(&self) {
        let status = self.index.status();
        let of_workloads: usize = status
            .workloads
            .iter()
            .map(|one| one.conditions.len())
            .sum();
        let of_namespaces: usize = status.namespaces.values().map(Vec::len).sum();
        self.conditions.set(count(
            status.conditions.len() + of_namespaces + of_workloads,
        ));
        self.programs.reset();
        for module in status.nodes.iter().flat_map(|node| &node.modules) {
            let state = if module.silent { "silent" } else { "heard" };
            self.programs
                .with_label_values(&[module.module.to_string().as_str(), state])
                .inc();
        }
        self.refused_connections.reset();
        for (reason, count) in self.connections.read() {
            let counter = self.refused_connections.with_label_values(&[reason]);
            counter.inc_by(count);
        }
        self.snapshot
            .set(i64::try_from(self.publisher.version().number).unwrap_or(i64::MAX));
        self.source_broken
            .set(i64::from(self.source.borrow().error.is_some()));
        for stage in STAGES {
            let at = status
                .workloads
                .iter()
                .filter(|one| one.workload.stage == stage);
            self.workloads
                .with_label_values(&[stage.to_string().as_str()])
                .set(count(at.count()));
        }
    }
}

fn count(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

impl Collector for Metrics {
    fn desc(&self) -> Vec<&Desc> {
        self.collectors()
            .iter()
            .flat_map(|one| one.desc())
            .collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.read();
        self.collectors()
            .iter()
            .flat_map(|one| one.collect())
            .collect()
    }
}
