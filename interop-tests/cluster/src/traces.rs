// SPDX-License-Identifier: Apache-2.0
//! What an installation changes in a cluster: everything that can be looked at, before and after.

use crate::Cluster;
use anyhow::ensure;
use std::collections::BTreeSet;

/// Kinds that come and go by themselves.
const RESTLESS: [&str; 3] = ["events", "leases", "metrics"];

/// One line for each object of the API, and on the nodes for each rule, route, listener, setting, cgroup, pin and file, in
/// the node's and in every pod's network namespace.
#[derive(Debug)]
pub struct Traces(BTreeSet<String>);

impl Traces {
    /// # Errors
    /// If something cannot be looked at.
    pub fn of(cluster: &Cluster) -> anyhow::Result<Self> {
        let kinds = cluster.kubectl(&["api-resources", "--verbs=list", "--output=name"])?;
        let kinds: Vec<&str> = kinds
            .lines()
            .filter(|kind| !RESTLESS.iter().any(|restless| kind.contains(restless)))
            .collect();
        let objects = cluster.kubectl(&[
            "get",
            &kinds.join(","),
            "--all-namespaces",
            "--ignore-not-found",
            // With what is written on them, so that a mark of ours on somebody else's object shows.
            "--output=jsonpath={range .items[*]}{.kind} {.metadata.namespace}/{.metadata.name} {.metadata.labels} \
             {.metadata.annotations} {.metadata.finalizers} {.data}{\"\\n\"}{end}",
        ])?;
        let mut lines: BTreeSet<String> = objects.lines().map(str::to_owned).collect();
        let script = include_str!("../scripts/traces.sh");
        for node in &cluster.nodes {
            let own = cluster.cgroup();
            let own = own.split('$').next().unwrap_or(&own);
            let found = node.machine.run(&["sh", "-c", script, "traces", own])?;
            ensure!(
                found.contains("sysctl: ") && found.contains("route: "),
                "the search sees nothing: {found:?}"
            );
            lines.extend(found.lines().map(|line| format!("{}: {line}", node.name())));
        }
        Ok(Self(lines))
    }

    /// What is there and was not then, and the other way round.
    pub fn since(&self, before: &Self) -> Vec<String> {
        let more = self.0.difference(&before.0).map(|line| format!("+ {line}"));
        let less = before.0.difference(&self.0).map(|line| format!("- {line}"));
        more.chain(less).collect()
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
