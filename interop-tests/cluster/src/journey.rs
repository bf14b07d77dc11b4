// SPDX-License-Identifier: Apache-2.0
//! The journey that Podveil exists for: install, label a namespace, curl, label off, uninstall. One walk for the test and
//! for the demo; each step is a line that holds or says why not.

use crate::podveil::{APP_PORT, Checkout, Podveil, curl, leftovers, pod, urls};
use crate::{Cluster, Load};
use anyhow::{Context, ensure};
use podveil_netns::NetNs;
use podveil_sim::app::MARKER;
use podveil_sim::{Capture, Captured};
use std::net::IpAddr;
use std::time::{Duration, Instant};

const SETTLE: Duration = Duration::from_secs(60);
const SERVERS: [&str; 2] = ["http://near-service.shop/", "http://far-service.shop/"];
/// TLS is seen on this port of pods, and nothing else that carries bytes.
const HBONE_PORT: u16 = 15008;
/// A connection that does not end by itself after its pod's release is ended soon, and the journey goes on.
pub const VALUES: [&str; 1] = ["--set=node.redirect.releaseBound=20s"];

/// Takes each line: what should hold, and what was seen or why it does not. Its error ends the journey.
pub type Line<'a> = dyn FnMut(&str, anyhow::Result<String>) -> anyhow::Result<()> + 'a;

/// `shop` gets the label: `client` and `near` on node 1, `far` on node 2. `legacy` never does: `plain` on node 2.
///
/// # Errors
/// If `line` ends it, or there is nothing to walk on.
pub fn walk(cluster: &Cluster, checkout: &Checkout, line: &mut Line<'_>) -> anyhow::Result<()> {
    make_pods(cluster)?;
    let began = Instant::now();
    let captured = across(cluster, || each_way(cluster).map(drop));
    line(
        "before: pods reach each other, and node 1's link carries what they say in plain",
        captured.and_then(|captured| {
            ensure!(
                captured.marker_frames > 0,
                "the capture sees nothing: {captured:?}"
            );
            Ok(format!("{} frames with the marker", captured.marker_frames))
        }),
    )?;

    let podveil = match Podveil::install(cluster, checkout, &VALUES) {
        Ok(podveil) => podveil,
        Err(error) => return line("helm install podveil charts/podveil", Err(error)),
    };
    line(
        "helm install podveil charts/podveil",
        Ok(format!(
            "all programs ready after {:.1} s",
            began.elapsed().as_secs_f64()
        )),
    )?;
    line(
        "nothing has changed for pods that nobody labelled",
        each_way(cluster),
    )?;

    let load = Load::start(cluster, "shop", "client", &SERVERS)?;
    let began = Instant::now();
    podveil.label("shop", true)?;
    let enrolled = podveil.wait_for_stage("shop", "mandatory", SETTLE);
    let seconds = began.elapsed().as_secs_f64();
    let failed = enrolled.is_err();
    line(
        "kubectl label ns shop io.cilium/mtls-enabled=true: every pod of it is mandatory",
        enrolled
            .with_context(|| podveil.diagnosis())
            .map(|()| format!("after {seconds:.1} s")),
    )?;
    line("no request failed meanwhile", load.finish())?;
    if failed {
        // Nothing below can hold; what is above says why.
        return Ok(());
    }

    line(
        "curl by name, by service address, by pod address; same node and across; IPv4 and IPv6",
        each_way(cluster),
    )?;
    line(
        "the server sees the client's own address",
        own_address(cluster),
    )?;
    line(
        "node 1's link carries TLS on 15008 and nothing of what they say",
        across(cluster, || each_way(cluster).map(drop)).and_then(only_tls),
    )?;
    line(
        "pods without the label are reached in plain, and reach in plain while permissive",
        mixed(cluster),
    )?;
    line(
        "the kubelet's probes, exec and port-forward work",
        probes(cluster),
    )?;

    let load = Load::start(cluster, "shop", "client", &SERVERS)?;
    let began = Instant::now();
    podveil.label("shop", false)?;
    let released = podveil.wait_for_stage("shop", "none", SETTLE);
    line(
        "label off: every pod is let go",
        released
            .with_context(|| podveil.diagnosis())
            .map(|()| format!("after {:.1} s", began.elapsed().as_secs_f64())),
    )?;
    line("no request failed meanwhile", load.finish())?;
    line("and speaks in plain, as before", each_way(cluster))?;

    podveil.label("shop", true)?;
    podveil.wait_for_stage("shop", "mandatory", SETTLE)?;
    let load = Load::start(cluster, "shop", "client", &SERVERS)?;
    let began = Instant::now();
    line(
        "helm uninstall with the label still on",
        podveil
            .uninstall()
            .map(|()| format!("after {:.1} s", began.elapsed().as_secs_f64())),
    )?;
    line("no request failed meanwhile", load.finish())?;
    line("pods reach each other as before", each_way(cluster))?;
    line(
        "no rule, listener, pin or object of ours is left, in any namespace",
        leftovers(cluster).and_then(|left| {
            ensure!(left.is_empty(), "left: {}", left.join("; "));
            Ok(String::new())
        }),
    )
}

fn make_pods(cluster: &Cluster) -> anyhow::Result<()> {
    let mut objects = String::new();
    for namespace in ["shop", "legacy"] {
        objects.push_str(&format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{ name: {namespace} }}\n---\n"
        ));
    }
    objects.push_str(&pod("shop", "client", "node-1"));
    objects.push_str(&pod("shop", "near", "node-1"));
    objects.push_str(&pod("shop", "far", "node-2"));
    objects.push_str(&pod("legacy", "plain", "node-2"));
    cluster.apply(&objects)?;
    cluster.wait_for_pods("shop")?;
    cluster.wait_for_pods("legacy")
}

fn each_way(cluster: &Cluster) -> anyhow::Result<String> {
    let mut ways = 0;
    for server in ["near", "far"] {
        for url in urls(cluster, "shop", server)? {
            curl(cluster, "shop", "client", &url)?;
            ways += 1;
        }
    }
    Ok(format!("{ways} ways"))
}

fn own_address(cluster: &Cluster) -> anyhow::Result<String> {
    let client = cluster.get(&["--namespace=shop", "pod", "client"])?;
    let addresses: Vec<&str> = client["status"]["podIPs"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|entry| entry["ip"].as_str())
        .collect();
    // By address of the server's pod, so that the family is known.
    for url in urls(cluster, "shop", "far")?.iter().skip(3) {
        let body = curl(cluster, "shop", "client", url)?;
        let own = addresses
            .iter()
            .find(|address| address.contains(':') == url.contains('['))
            .context("the client lacks a family")?;
        ensure!(
            body.contains(&format!("peer={own}")),
            "{url} saw another than {own}: {body}"
        );
    }
    Ok(addresses.join(", "))
}

/// What crosses node 1's link between pods meanwhile.
fn across(
    cluster: &Cluster,
    work: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<Captured> {
    let netns = NetNs::open(cluster.nodes[0].machine.netns())?;
    let pods = pod_addresses(cluster, "shop")?;
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

fn only_tls(captured: Captured) -> anyhow::Result<String> {
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

fn mixed(cluster: &Cluster) -> anyhow::Result<String> {
    let mut ways = 0;
    for (from_namespace, from, namespace, to) in [
        ("shop", "client", "legacy", "plain"),
        ("legacy", "plain", "shop", "near"),
        ("legacy", "plain", "shop", "far"),
    ] {
        for url in urls(cluster, namespace, to)? {
            curl(cluster, from_namespace, from, &url)?;
            ways += 1;
        }
    }
    Ok(format!("{ways} ways"))
}

fn probes(cluster: &Cluster) -> anyhow::Result<String> {
    let pods = cluster.get(&["--namespace=shop", "pods"])?;
    for pod in pods["items"].as_array().into_iter().flatten() {
        let status = &pod["status"]["containerStatuses"][0];
        ensure!(
            status["ready"] == true && status["restartCount"] == 0,
            "{}: {status}",
            pod["metadata"]["name"]
        );
    }
    // A port-forward enters at the pod's loopback.
    let body = cluster.port_forward("shop", "far", APP_PORT, |address| {
        podveil_sim::run(
            "curl",
            [
                "-sS",
                "--noproxy",
                "*",
                "--max-time",
                "10",
                &format!("http://{address}/"),
            ],
        )
    })?;
    ensure!(body.contains(MARKER), "port-forward answers {body:?}");
    Ok(String::new())
}
