// SPDX-License-Identifier: Apache-2.0
//! Nodes that hold no more of the cluster than their pods talk to, beside one that holds everything.

use anyhow::{Context, ensure};
use podveil_interop_tests::{Mesh, SETTLE, tcp};
use podveil_sim::{NodeSettings, eventually};
use serde_json::json;
use std::net::SocketAddr;

const PORT: u16 = 9000;

fn on_demand(forget_after: &str) -> NodeSettings {
    with([
        ("on_demand", true.into()),
        ("forget_after", forget_after.into()),
    ])
}

fn with<const N: usize>(keys: [(&str, serde_json::Value); N]) -> NodeSettings {
    let mut settings = NodeSettings::default();
    let keys = keys.map(|(key, value)| (key.to_owned(), value));
    settings.proxy.extend(keys);
    settings
}

fn shop(settings: [NodeSettings; 2]) -> anyhow::Result<Mesh> {
    Mesh::start_each(
        settings,
        &[
            (1, "shop", "client", "client"),
            (1, "shop", "near", "web"),
            (2, "shop", "far", "web"),
            (2, "shop", "other", "client"),
            (2, "legacy", "plain", "plain"),
        ],
    )
}

/// Waits until the proxy of node 1 holds these pods and no others.
fn holds(mesh: &Mesh, names: &[&str]) -> anyhow::Result<()> {
    eventually(SETTLE * 2, "the node holds what it needs", || {
        let dump = mesh.proxy_page(1, "/config_dump")?;
        let workloads = dump["workloads"].as_array().context("no workloads")?;
        let mut held: Vec<&str> = (workloads.iter())
            .filter_map(|workload| workload["name"].as_str())
            .collect();
        held.sort_unstable();
        ensure!(held == names, "it holds {held:?}, not {names:?}");
        Ok(())
    })
}

#[test]
#[ignore = "netns"]
fn a_node_holds_what_its_pods_talk_to_and_forgets_it() -> anyhow::Result<()> {
    // The other node gives up its idle tunnels, by which this one would have to know who is at their other end.
    let everything = with([("tunnel_idle_timeout", json!("1s"))]);
    let mut mesh = shop([on_demand("1s"), everything])?;
    // At first it has looked at everybody: the controller waits for that before they are mandatory.
    holds(&mesh, &["client", "near"])?;
    let far = tcp::listen(mesh.netns("far"), PORT)?;
    let near = tcp::listen(mesh.netns("near"), PORT)?;
    let service = "10.96.0.80".parse()?;
    mesh.add_web(&[service], PORT)?;
    let to_far = SocketAddr::new(mesh.v6("far"), PORT);
    let (outbound, outbound_far) = tcp::pair(mesh.netns("client"), &far, to_far)?;
    holds(&mesh, &["client", "far", "near"])?;
    let to_near = mesh.address("near", PORT);
    let tunnelled = tcp::pair(mesh.netns("other"), &near, to_near)?;
    let plain = tcp::connect(mesh.netns("plain"), to_near)?;
    holds(&mesh, &["client", "far", "near", "other", "plain"])?;

    // A connection that lives keeps what it needs; all else is forgotten.
    drop((tunnelled, plain));
    holds(&mesh, &["client", "far", "near"])?;
    tcp::send(&outbound, 10_000)?;
    tcp::receive(&outbound_far, 10_000)?;
    drop((outbound, outbound_far));
    holds(&mesh, &["client", "near"])?;

    // And it is asked for again: by a service, with all who are behind it.
    let _by_service = tcp::connect(mesh.netns("client"), SocketAddr::new(service, 80))?;
    holds(&mesh, &["client", "far", "near"])
}

#[test]
#[ignore = "netns"]
fn without_a_controller_a_node_goes_on_with_what_it_holds_and_dials_nobody_else()
-> anyhow::Result<()> {
    let mut mesh = shop([on_demand("1s"), on_demand("1s")])?;
    holds(&mesh, &["client", "near"])?;
    let far = tcp::listen(mesh.netns("far"), PORT)?;
    let other = tcp::listen(mesh.netns("other"), PORT)?;
    let (to_far, to_other) = (mesh.address("far", PORT), mesh.address("other", PORT));
    let first = tcp::pair(mesh.netns("client"), &far, to_far)?;
    let control = mesh.control_plane.as_mut().context("it was started")?;
    control.ca.kill();
    control.controller.kill();
    tcp::expect_connection_reset(mesh.netns("client"), to_other)?;
    // What it holds is kept, though no connection needs it any more.
    drop(first);
    let (client, server) = tcp::pair(mesh.netns("client"), &far, to_far)?;
    tcp::send(&client, 10_000)?;
    tcp::receive(&server, 10_000)?;
    mesh.start_control_plane()?;
    eventually(SETTLE, "the other one is told of", || {
        tcp::pair(mesh.netns("client"), &other, to_other).map(drop)
    })
}
