// SPDX-License-Identifier: Apache-2.0
//! `helm upgrade`: who is replaced, and what connections notice of it.

use anyhow::{Context, ensure};
use podveil_cluster::podveil::{APP_PORT, NAMESPACE, Podveil, pod};
use podveil_cluster::{Cluster, Load, Served};
use podveil_sim::eventually;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

const SETTLE: Duration = Duration::from_secs(60);
/// The least that the chart takes; of it the proxy has 5 s less for connections to end.
const GRACE: &str = "--set=node.terminationGracePeriodSeconds=10";
const URL: &str = "http://far-service.mill/";

pub fn an_upgrade_replaces_what_it_changes_and_connections_notice_only_a_new_node_program(
    podveil: &Podveil<'_>,
) -> anyhow::Result<()> {
    let cluster = podveil.cluster;
    cluster.apply(&format!(
        "apiVersion: v1\nkind: Namespace\nmetadata: {{ name: mill }}\n---\n{}{}",
        pod("mill", "client", "node-1"),
        pod("mill", "far", "node-2")
    ))?;
    cluster.wait_for_pods("mill")?;
    podveil.label("mill", true)?;
    podveil.wait_for_stage("mill", "mandatory", SETTLE)?;
    control_plane(podveil).context("a value of the CA's and the controller's")?;
    podveil
        .upgrade(&[GRACE])
        .context("a value of the node program's")?;
    in_place(podveil)?;
    surge(podveil)
}

/// Another value for CA and controller: the node program goes on, and no connection notices.
fn control_plane(podveil: &Podveil<'_>) -> anyhow::Result<()> {
    let cluster = podveil.cluster;
    let nodes = pods_of(cluster, "node")?;
    let others = [pods_of(cluster, "ca")?, pods_of(cluster, "controller")?];
    let held = Held::open(cluster, "control-plane")?;
    let load = Load::start(cluster, "mill", "client", &[URL])?;
    podveil.upgrade(&[
        "--set=ca.rotation.timeout=3m",
        "--set=controller.resources.requests.cpu=40m",
    ])?;
    println!("CA and controller replaced: {}", load.finish()?);
    ensure!(pods_of(cluster, "node")? == nodes, "the node program too");
    for (before, program) in others.iter().zip(["ca", "controller"]) {
        let after = pods_of(cluster, program)?;
        ensure!(after.is_disjoint(before), "{program} is still the old one");
    }
    held.ensure_open()
}

/// Another image of every program, as a new release brings it: the former node program ends before the next one starts.
fn in_place(podveil: &Podveil<'_>) -> anyhow::Result<()> {
    for node in &podveil.cluster.nodes {
        for program in ["ca", "controller", "node"] {
            node.tag_image(
                &format!("docker.io/podveil/{program}:{VERSION}"),
                &format!("docker.io/podveil/{program}:next"),
            )?;
        }
    }
    let served = another_image(podveil, "next").context("in place")?;
    ensure!(
        served.longest_gap < NOT_SERVED,
        "new connections are not served for {:?}",
        served.longest_gap
    );
    Ok(())
}

/// The next node program stands by while the former one ends.
fn surge(podveil: &Podveil<'_>) -> anyhow::Result<()> {
    podveil.upgrade(&["--set=node.surge=true"])?;
    let served = another_image(podveil, VERSION).context("with a surge")?;
    ensure!(
        served.failed == 0 && served.longest_gap < NOT_SERVED_SURGE,
        "{} new connections failed, and none was served for {:?}",
        served.failed,
        served.longest_gap
    );
    Ok(())
}

fn another_image(podveil: &Podveil<'_>, tag: &str) -> anyhow::Result<Served> {
    let cluster = podveil.cluster;
    let before = pods_of(cluster, "node")?;
    let held = Held::open(cluster, &format!("node-{tag}"))?;
    let load = Load::start(cluster, "mill", "client", &[URL])?;
    let began = Instant::now();
    podveil.upgrade(&[&format!("--set=image.tag={tag}")])?;
    let took = began.elapsed();
    podveil.wait_for_stage("mill", "mandatory", SETTLE)?;
    eventually(SETTLE, "the old node programs have ended", || {
        let left = !pods_of(cluster, "node")?.is_disjoint(&before);
        ensure!(!left, "a node program is still the old one");
        Ok(())
    })?;
    let served = load.measure()?;
    println!(
        "a new node program on each node, one after the other, in {:.1} s: of {} new connections {} were reset, and the \
         longest time without one that was served is {:.1} s",
        took.as_secs_f64(),
        served.total,
        served.failed,
        served.longest_gap.as_secs_f64(),
    );
    println!("meanwhile an open connection {}", held.ended()?);
    Ok(served)
}

const VERSION: &str = env!("CARGO_PKG_VERSION");
/// How long new connections of a node's pods may find no node program, on a machine that has other work too.
const NOT_SERVED: Duration = Duration::from_secs(20);
/// The same where the next one stands by.
const NOT_SERVED_SURGE: Duration = Duration::from_secs(2);

fn pods_of(cluster: &Cluster, program: &str) -> anyhow::Result<BTreeSet<String>> {
    let uids = cluster.kubectl(&[
        &format!("--namespace={NAMESPACE}"),
        "get",
        "pods",
        &format!("--selector=app.kubernetes.io/component=podveil-{program}"),
        "--output=jsonpath={range .items[*]}{.metadata.uid} {end}",
    ])?;
    let uids: BTreeSet<String> = uids.split_whitespace().map(str::to_owned).collect();
    ensure!(!uids.is_empty(), "no pod of {program}");
    Ok(uids)
}

/// A download that does not end by itself.
struct Held<'a> {
    cluster: &'a Cluster,
    /// Where its end is written to, in the client's pod.
    file: String,
    opened: Instant,
}

impl<'a> Held<'a> {
    fn open(cluster: &'a Cluster, name: &str) -> anyhow::Result<Self> {
        let file = format!("/tmp/{name}");
        // Slow enough to cost little, fast enough that what has arrived already is soon read.
        let script = format!(
            "mkdir -p /tmp
             (curl -sS --limit-rate 5M {URL}bytes/1000000000000 2>{file}.said >/dev/null
              echo \"exit $?: $(cat {file}.said)\" >{file}) >/dev/null 2>&1 &"
        );
        cluster.exec("mill", "client", &["sh", "-c", &script])?;
        let held = Self {
            cluster,
            file,
            opened: Instant::now(),
        };
        eventually(SETTLE, "the connection stands", || {
            let open = cluster.exec("mill", "far", &["cat", "/proc/net/tcp", "/proc/net/tcp6"])?;
            // Accepted by the application, on its own port.
            let port = format!(":{APP_PORT:04X}");
            let accepted = open.lines().any(|line| {
                let words: Vec<&str> = line.split_whitespace().collect();
                words.len() > 3 && words[1].ends_with(&port) && words[3] == "01"
            });
            ensure!(accepted, "far has no connection");
            Ok(())
        })?;
        held.ensure_open()?;
        Ok(held)
    }

    fn said(&self) -> anyhow::Result<String> {
        let script = format!("cat {} 2>&1 || true", self.file);
        self.cluster.exec("mill", "client", &["sh", "-c", &script])
    }

    fn ensure_open(&self) -> anyhow::Result<()> {
        let said = self.said()?;
        ensure!(!said.contains("exit"), "it has ended: {said}");
        Ok(())
    }

    /// How it ended: by a reset, never as if its peer had said everything.
    fn ended(&self) -> anyhow::Result<String> {
        let said = eventually(SETTLE, "the connection has ended", || {
            let said = self.said()?;
            ensure!(said.contains("exit"), "it is open");
            Ok(said)
        })?;
        ensure!(
            said.contains("exit 56") || said.to_lowercase().contains("reset"),
            "it ended otherwise than by a reset: {said}"
        );
        Ok(format!(
            "ended by a reset within {:.1} s",
            self.opened.elapsed().as_secs_f64()
        ))
    }
}
