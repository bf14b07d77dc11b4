// SPDX-License-Identifier: Apache-2.0
//! The journey that Podveil exists for: install, label a namespace, curl, label off, uninstall. One walk for the test and
//! for the demo; each step is a line that holds or says why not.

use crate::podveil::{APP_PORT, Checkout, LABEL, Podveil, curl, pod, urls, wait_for_ways};
use crate::traces::Traces;
use crate::wire::{across, only_tls};
use crate::{Cluster, Load};
use anyhow::{Context, ensure};
use podveil_sim::app::MARKER;
use podveil_sim::eventually;
use std::time::{Duration, Instant};

const SETTLE: Duration = Duration::from_secs(60);
const SERVERS: [&str; 2] = ["http://near-service.shop/", "http://far-service.shop/"];
/// A connection that does not end by itself after its pod's release is ended soon, and the journey goes on.
pub const VALUES: [&str; 1] = ["--set=node.redirect.releaseBound=20s"];

/// Takes each line: what should hold, and what was seen or why it does not. Its error ends the journey.
pub type Line<'a> = dyn FnMut(&str, anyhow::Result<String>) -> anyhow::Result<()> + 'a;

/// `shop` gets the label: `client` and `near` on node 1, `far` on node 2. `legacy` never does: `plain` on node 2.
///
/// # Errors
/// If `line` ends it, or there is nothing to walk on.
pub fn walk(
    cluster: &Cluster,
    checkout: &Checkout,
    values: &[&str],
    line: &mut Line<'_>,
) -> anyhow::Result<()> {
    make_pods(cluster)?;
    let captured = across(cluster, "shop", || each_way(cluster).map(drop));
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

    let before = Traces::of(cluster)?;
    let began = Instant::now();
    let podveil = match Podveil::install(cluster, checkout, &[&VALUES, values].concat()) {
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
        across(cluster, "shop", || each_way(cluster).map(drop)).and_then(only_tls),
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
        "and nothing of ours is left",
        nothing_is_left(cluster, &before),
    )
}

/// In any namespace of either kind, as an object, a rule, a route, a listener, a setting, a cgroup, a pin or a file.
fn nothing_is_left(cluster: &Cluster, before: &Traces) -> anyhow::Result<String> {
    // The one thing that a person has put there.
    cluster.kubectl(&["label", "namespace", "shop", &format!("{LABEL}-")])?;
    // A kubelet clears away after pods that are gone already.
    eventually(SETTLE, "everything is as before", || {
        let now = Traces::of(cluster)?;
        let other = now.since(before);
        ensure!(
            other.is_empty(),
            "{} are other than before: {}",
            other.len(),
            other[..other.len().min(20)].join("; ")
        );
        Ok(format!("{} things are as before", now.len()))
    })
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
    cluster.wait_for_pods("legacy")?;
    for server in ["near", "far"] {
        wait_for_ways(cluster, ("shop", "client"), ("shop", server))?;
    }
    Ok(())
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
