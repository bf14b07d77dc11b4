// SPDX-License-Identifier: Apache-2.0
//! Nothing of a pod in an enrolled namespace is plain, from its first instruction on and from the moment that its address
//! exists: `podveil-cni` lets it start only when it is captured.

use crate::workloads;
use anyhow::{Context, ensure};
use podveil_cluster::enrolment::{first_tunnels_of, object};
use podveil_cluster::podveil::{APP_PORT, Podveil};
use podveil_cluster::{APP_IMAGE, Cluster};
use podveil_netns::NetNs;
use podveil_sim::app::MARKER;
use podveil_sim::{Capture, Captured, eventually};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

const SETTLE: Duration = Duration::from_secs(60);

/// Each of `pods` new pods on node 2 connects to one on node 1 as its first instruction, by both families, and is connected
/// to from there from the moment on that its address is told.
pub fn a_pod_sends_and_answers_nothing_in_plain(
    podveil: &Podveil<'_>,
    pods: usize,
    batch: usize,
) -> anyhow::Result<()> {
    let cluster = podveil.cluster;
    let captures = (cluster.nodes.iter())
        .map(|node| start(&NetNs::open(node.machine.netns())?))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let times = first_tunnels_of(podveil, pods, batch, |name, client| {
        object(name, &first_instruction(client))
    })?;
    let longest = times.iter().map(|one| one.longest).max();
    let refused: u32 = times.iter().map(|one| one.refused).sum();
    let plain: u32 = times.iter().map(|one| one.plain).sum();
    for capture in captures {
        only_tunnels(&capture.finish()?)?;
    }
    ensure!(
        plain == 0,
        "{plain} answers came otherwise than through a tunnel"
    );
    println!(
        "{pods} pods connected out first and were connected to at once: {refused} refused, the longest attempt {longest:?}"
    );
    workloads::static_pod(podveil, "fresh").context("a pod from a file on its node")?;
    cluster.kubectl(&["delete", "namespace", "fresh", "--timeout=60s"])?;
    every_node_has_the_plugin_last(cluster)
}

fn start(netns: &NetNs) -> anyhow::Result<Capture> {
    // A node has an address of each range too, from which its kubelet probes: that crosses no link.
    Capture::start(netns, MARKER.as_bytes(), |from, to| {
        let (from, to) = (node_of(from), node_of(to));
        from.is_some() && to.is_some() && from != to
    })
}

/// The number of the node that has this pod's address.
fn node_of(ip: IpAddr) -> Option<u16> {
    match ip {
        IpAddr::V4(v4) => match v4.octets() {
            [10, 244, third, _] => Some(u16::from(third / 4)),
            _ => None,
        },
        IpAddr::V6(v6) => match v6.segments() {
            [0xfd00, 0x10, 0x244, node, ..] => Some(node),
            _ => None,
        },
    }
}

fn only_tunnels(captured: &Captured) -> anyhow::Result<()> {
    ensure!(
        captured.marker_frames == 0 && !captured.server_ports.contains(&APP_PORT),
        "something went in plain: {captured:?}"
    );
    ensure!(
        captured.server_ports.contains(&15008),
        "the capture sees no tunnel: {captured:?}"
    );
    Ok(())
}

/// A container that must succeed at its first attempt, before any other.
fn first_instruction(client: &[IpAddr]) -> String {
    let urls: Vec<String> = client
        .iter()
        .map(|ip| format!("'http://{}/'", SocketAddr::new(*ip, APP_PORT)))
        .collect();
    format!(
        "  restartPolicy: Never
  initContainers:
    - name: first
      image: {APP_IMAGE}
      imagePullPolicy: Never
      command: [/usr/bin/curl, -sS, --fail, --max-time, '30', --header, 'x-payload: {MARKER}', {}]
",
        urls.join(", ")
    )
}

/// After an uninstall: every byte of the CNI agent's configuration is as it wrote it.
pub fn no_node_has_the_plugin(cluster: &Cluster) -> anyhow::Result<()> {
    for node in &cluster.nodes {
        let look = "cat /etc/cni/net.d/10-podveil.conflist; ls -A /etc/cni/net.d /opt/cni/bin | grep podveil-cni || true";
        let left = node.machine.run(&["sh", "-c", look])?;
        let written = node.cni().to_string();
        ensure!(left.trim() == written, "{}: {left}", node.name());
    }
    Ok(())
}

/// Also after the CNI agent has written its configuration anew.
fn every_node_has_the_plugin_last(cluster: &Cluster) -> anyhow::Result<()> {
    for node in &cluster.nodes {
        let last = || -> anyhow::Result<String> {
            let text = node
                .machine
                .run(&["sh", "-c", "cat /etc/cni/net.d/*.conflist"])?;
            let list: serde_json::Value = serde_json::from_str(&text)?;
            let plugins = list["plugins"].as_array().context("a list")?;
            let last = plugins.last().context("a plugin")?;
            let name = last["type"].as_str().context("a type")?;
            ensure!(
                name == "podveil-cni",
                "{name} is the last of {}",
                node.name()
            );
            Ok(text)
        };
        last()?;
        let conf = node.cni().to_string();
        let write =
            "cat >/etc/cni/net.d/.new && mv /etc/cni/net.d/.new /etc/cni/net.d/10-podveil.conflist";
        node.machine
            .run(&["sh", "-c", &format!("printf %s '{conf}' | {{ {write}; }}")])?;
        eventually(SETTLE, "the plugin is chained again", last)?;
    }
    Ok(())
}
