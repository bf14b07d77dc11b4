// SPDX-License-Identifier: Apache-2.0
//! What the nodes have refused since they started, from their metrics.

use crate::cluster::{Cluster, Program, ProgramPod, Programs};
use crate::failure::describe;
use crate::output::Progress;
use futures::StreamExt;
use std::collections::{BTreeMap, BTreeSet};

const PROXY_METRICS_PORT: u16 = 15020;
const REDIRECT_METRICS_PORT: u16 = 15022;
/// Nodes asked at once.
const AT_ONCE: usize = 16;
const REFUSED: &str = "podveil_connections_refused_total";
const FENCE: &str = "podveil_fence_packets";

/// Of all nodes together.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    /// Connections, by drop reason.
    pub refused: BTreeMap<String, u64>,
    /// Packets that a fence refused, by node; only where there are any.
    pub fence: BTreeMap<String, u64>,
    /// Nodes whose metrics could not be had, with the reason.
    pub unanswered: Vec<String>,
}

pub async fn counters(cluster: &Cluster, programs: &Programs, progress: &mut Progress) -> Counters {
    let pods = one_of_each_node(programs.of(Program::Node).filter(|pod| pod.ready));
    let asked = pods.iter().flat_map(|pod| {
        [PROXY_METRICS_PORT, REDIRECT_METRICS_PORT]
            .map(|port| (pod.name.as_str(), pod.node.as_deref(), port))
    });
    let mut answers = futures::stream::iter(asked)
        .map(|(pod, node, port)| async move {
            let body = cluster.get(pod, port, "/metrics").await;
            (node.unwrap_or(pod), body)
        })
        .buffer_unordered(AT_ONCE);
    let mut counters = Counters::default();
    let mut done = 0;
    while let Some((node, body)) = answers.next().await {
        done += 1;
        progress.say(&format!("reading metrics: {done} of {}", pods.len() * 2));
        match body {
            Ok(body) => counters.add(node, &String::from_utf8_lossy(&body)),
            Err(error) => counters.unanswered.push(describe(&error)),
        }
    }
    counters
}

/// Where one follows another there are two, which share the node's ports: either way the one that has them answers.
fn one_of_each_node<'a>(pods: impl Iterator<Item = &'a ProgramPod>) -> Vec<&'a ProgramPod> {
    let mut nodes = BTreeSet::new();
    pods.filter(|pod| (pod.node.as_ref()).is_none_or(|node| nodes.insert(node)))
        .collect()
}

impl Counters {
    /// One page in Prometheus' text format.
    fn add(&mut self, node: &str, page: &str) {
        for line in page.lines().filter(|line| !line.starts_with('#')) {
            let Some((series, value)) = line.rsplit_once(' ') else {
                continue;
            };
            let count = value.parse::<f64>().ok().filter(|count| *count > 0.0);
            let Some(count) = count.map(|count| count as u64) else {
                continue;
            };
            if let Some(labels) = series.strip_prefix(REFUSED) {
                let reason = label(labels, "reason").unwrap_or("unknown").to_owned();
                *self.refused.entry(reason).or_default() += count;
            } else if series.starts_with(FENCE) {
                *self.fence.entry(node.to_owned()).or_default() += count;
            }
        }
    }
}

/// The value of a label whose values are words of ours, so never quoted.
fn label<'a>(labels: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = labels.split_once(&format!("{name}=\""))?;
    rest.split_once('"').map(|(value, _)| value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_with_two_programs_is_asked_once() {
        let pod = |name: &str, node: Option<&str>| ProgramPod {
            program: Program::Node,
            name: name.into(),
            node: node.map(Into::into),
            ready: true,
            waiting: None,
            restarts: 0,
            version: String::new(),
            container: None,
        };
        let pods = [
            pod("a", Some("n1")),
            pod("b", Some("n1")),
            pod("c", Some("n2")),
            pod("d", None),
        ];
        let asked = one_of_each_node(pods.iter());
        let names = asked.iter().map(|pod| &*pod.name);
        assert!(names.eq(["a", "c", "d"]));
    }

    #[test]
    fn refusals_are_summed_by_reason_and_fences_by_node() {
        let mut counters = Counters::default();
        let page = "# HELP podveil_connections_refused_total x\n\
                    podveil_connections_refused_total{reason=\"not_known\",reporter=\"source\"} 2\n\
                    podveil_connections_refused_total{reason=\"not_known\",reporter=\"destination\"} 1\n\
                    podveil_connections_refused_total{reason=\"no_endpoint\",reporter=\"source\"} 0\n\
                    podveil_fence_packets{direction=\"out\"} 3\n";
        counters.add("n1", page);
        counters.add(
            "n2",
            "podveil_fence_packets{direction=\"in\"} 0\nnot a metric\n",
        );
        assert_eq!(counters.refused, BTreeMap::from([("not_known".into(), 3)]));
        assert_eq!(counters.fence, BTreeMap::from([("n1".into(), 3)]));
    }
}
