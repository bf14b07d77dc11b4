// SPDX-License-Identifier: Apache-2.0
//! What crosses a node's link, as somebody who listens there sees it.

use crate::Cluster;
use anyhow::{Context, ensure};
use podveil_netns::NetNs;
use podveil_sim::app::MARKER;
use podveil_sim::{Capture, Captured};
use std::net::IpAddr;

/// TLS is seen on this port of pods, and nothing else that carries bytes.
const HBONE_PORT: u16 = 15008;

/// What crosses node 1's link meanwhile between the pods that the namespace has at the beginning.
///
/// # Errors
/// If `work` fails, or nothing can be captured.
pub fn across(
    cluster: &Cluster,
    namespace: &str,
    work: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<Captured> {
    let netns = NetNs::open(cluster.nodes[0].machine.netns())?;
    let pods = pod_addresses(cluster, namespace)?;
    let capture = Capture::start(&netns, MARKER.as_bytes(), move |from, to| {
        pods.contains(&from) && pods.contains(&to)
    })?;
    work()?;
    capture.finish()
}

fn pod_addresses(cluster: &Cluster, namespace: &str) -> anyhow::Result<Vec<IpAddr>> {
    let pods = cluster.get(&["pods", &format!("--namespace={namespace}")])?;
    pods["items"]
        .as_array()
        .into_iter()
        .flatten()
        .flat_map(|pod| pod["status"]["podIPs"].as_array().into_iter().flatten())
        .filter_map(|entry| entry["ip"].as_str())
        .map(|address| address.parse().context("a pod's address"))
        .collect()
}

/// # Errors
/// If anything went in plain, or nothing in a tunnel.
pub fn only_tls(captured: Captured) -> anyhow::Result<String> {
    ensure!(
        captured.marker_frames == 0 && captured.plain_payload_segments == 0,
        "something went in plain: {captured:?}"
    );
    ensure!(
        captured.server_ports.contains(&HBONE_PORT) && captured.payload_segments > 0,
        "the capture sees no tunnel: {captured:?}"
    );
    Ok(format!(
        "{} segments with payload",
        captured.payload_segments
    ))
}
