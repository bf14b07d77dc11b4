// SPDX-License-Identifier: Apache-2.0
use crate::process::Memory;
use std::fmt;
use std::time::Duration;

/// How long each of many changes took.
#[derive(Clone, Debug, Default)]
pub struct Latencies(Vec<Duration>);

impl Latencies {
    pub(crate) fn new(mut samples: Vec<Duration>) -> Self {
        samples.sort_unstable();
        Self(samples)
    }

    /// Zero where there are none.
    pub fn quantile(&self, part: f64) -> Duration {
        let last = self.0.len().saturating_sub(1);
        let place = (last as f64 * part).round() as usize;
        self.0.get(place).copied().unwrap_or_default()
    }
}

/// Everything measured in one run.
#[derive(Clone, Debug)]
pub struct Figures {
    /// From the controller's start to its first whole answer to a node that waits for it.
    pub first_answer: Duration,
    /// The controller with one node connected.
    pub alone: Memory,
    /// From the start of all other nodes' programs until the last of them had everything.
    pub all_answered: Duration,
    /// The controller with all nodes connected, after all that has been done to it.
    pub connected: Memory,
    /// Requests of the controller to the API server in a minute in which nothing changes, with one node connected.
    pub requests_at_rest_alone: f64,
    /// The same with all of them.
    pub requests_at_rest: f64,
    /// Processor time of the controller in that while, in thousandths of a core.
    pub processor_at_rest: f64,
    /// Requests of the controller for each change of a pod, over those at rest.
    pub requests_per_change: f64,
    /// Resources sent to each node for each change.
    pub updates_per_change: f64,
    /// Processor time of the controller for each change.
    pub processor_per_change: Duration,
    /// From the API server's watch event to the last node's proxy that has the change in use.
    pub last_node: Latencies,
    /// The same to the node in the middle.
    pub middle_node: Latencies,
    /// A `podveil-node` that holds everything.
    pub node: Memory,
    /// Of the controller killed and started again; `None` where it was not.
    pub restart: Option<Restart>,
}

/// What all nodes that come back at once cost.
#[derive(Clone, Copy, Debug)]
pub struct Restart {
    /// Until the last node has an answer on its new stream.
    pub all_answered: Duration,
    /// Workloads and services in those answers together: nothing has changed.
    pub sent_again: usize,
    /// The controller after that.
    pub controller: Memory,
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = |time: Duration| format!("{:.1} s", time.as_secs_f64());
        let milliseconds = |time: Duration| format!("{:.0} ms", time.as_secs_f64() * 1000.0);
        let memory =
            |memory: Memory| format!("{:.0} MiB (at most {:.0})", memory.resident, memory.peak);
        let quantiles = |latencies: &Latencies| {
            [0.5, 0.99, 1.0]
                .map(|part| milliseconds(latencies.quantile(part)))
                .join(" / ")
        };
        writeln!(f, "| measured | figure |\n|---|---:|")?;
        for (what, figure) in [
            (
                "controller: start to first full answer",
                seconds(self.first_answer),
            ),
            ("controller: memory, one node connected", memory(self.alone)),
            (
                "all other nodes come at once: until the last has everything",
                seconds(self.all_answered),
            ),
            (
                "controller: memory, all nodes connected",
                memory(self.connected),
            ),
            (
                "API requests a minute at rest, one node connected",
                format!("{:.0}", self.requests_at_rest_alone),
            ),
            (
                "API requests a minute at rest, all nodes connected",
                format!("{:.0}", self.requests_at_rest),
            ),
            (
                "API requests for each change of a pod",
                format!("{:.2}", self.requests_per_change),
            ),
            (
                "resources sent to each node for each change of a pod",
                format!("{:.2}", self.updates_per_change),
            ),
            (
                "controller: processor at rest, thousandths of a core",
                format!("{:.0}", self.processor_at_rest),
            ),
            (
                "controller: processor for each change",
                milliseconds(self.processor_per_change),
            ),
            (
                "a pod's change to the last node that is told of it, p50 / p99 / most",
                quantiles(&self.last_node),
            ),
            (
                "a pod's change to the one in the middle, p50 / p99 / most",
                quantiles(&self.middle_node),
            ),
            (
                "podveil-node that holds everything: memory",
                memory(self.node),
            ),
        ] {
            writeln!(f, "| {what} | {figure} |")?;
        }
        let Some(restart) = &self.restart else {
            return Ok(());
        };
        for (what, figure) in [
            (
                "controller killed and started: until the last node has an answer",
                seconds(restart.all_answered),
            ),
            (
                "resources sent again in those answers",
                restart.sent_again.to_string(),
            ),
            ("controller: memory after that", memory(restart.controller)),
        ] {
            writeln!(f, "| {what} | {figure} |")?;
        }
        Ok(())
    }
}
