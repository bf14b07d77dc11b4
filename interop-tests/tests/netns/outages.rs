// SPDX-License-Identifier: Apache-2.0
use anyhow::ensure;
use podveil_interop_tests::{Mesh, SETTLE, shop, tcp};
use podveil_sim::{ControlPlane, NodePrograms, eventually};
use std::net::{SocketAddr, TcpListener};

const PORT: u16 = 9000;

/// A new connection in each direction between the nodes carries bytes.
fn connections_work(mesh: &Mesh, far: &TcpListener, client: &TcpListener) -> anyhow::Result<()> {
    for (from, listener, to) in [("client", far, "far"), ("far", client, "client")] {
        for address in mesh.pod(to).net.addresses {
            let (here, there) =
                tcp::pair(mesh.netns(from), listener, SocketAddr::new(address, PORT))?;
            tcp::send(&here, 10_000)?;
            tcp::receive(&there, 10_000)?;
        }
    }
    Ok(())
}

fn listeners(mesh: &Mesh) -> anyhow::Result<(TcpListener, TcpListener)> {
    Ok((
        tcp::listen(mesh.netns("far"), PORT)?,
        tcp::listen(mesh.netns("client"), PORT)?,
    ))
}

/// Waits until one connection is carried, then demands that all are.
fn connections_work_again(
    mesh: &Mesh,
    far: &TcpListener,
    client: &TcpListener,
) -> anyhow::Result<()> {
    eventually(SETTLE, "a connection is carried", || {
        connections_work(mesh, far, client)
    })?;
    connections_work(mesh, far, client)
}

#[test]
#[ignore = "netns"]
fn without_ca_and_controller_known_pods_still_open_new_connections() -> anyhow::Result<()> {
    let mut mesh = shop()?;
    let (far, client) = listeners(&mesh)?;
    let (old, old_server) = tcp::pair(mesh.netns("client"), &far, mesh.address("far", PORT))?;
    let control = mesh.control_plane.as_mut().expect("the mesh was started");
    control.ca.kill();
    connections_work(&mesh, &far, &client)?;
    mesh.control_plane
        .as_mut()
        .expect("the mesh was started")
        .controller
        .kill();
    connections_work(&mesh, &far, &client)?;
    tcp::send(&old, 10_000)?;
    tcp::receive(&old_server, 10_000)
}

#[test]
#[ignore = "netns"]
fn ca_and_controller_come_back_and_open_connections_do_not_notice() -> anyhow::Result<()> {
    let mut mesh = shop()?;
    let (far, client) = listeners(&mesh)?;
    let (old, old_server) = tcp::pair(mesh.netns("client"), &far, mesh.address("far", PORT))?;
    let control = mesh.control_plane.as_mut().expect("the mesh was started");
    control.ca.kill();
    control.controller.kill();
    let control =
        ControlPlane::start(&mesh.sandbox, &mesh.binaries, &mesh.topology, &mesh.cluster)?;
    mesh.control_plane = Some(control);
    mesh.wait_for_stage("shop", "mandatory", SETTLE)?;
    connections_work(&mesh, &far, &client)?;
    // What is new reaches the nodes again.
    mesh.cluster.enroll("shop", false).write()?;
    mesh.wait_for_stage("shop", "none", SETTLE)?;
    tcp::send(&old, 10_000)?;
    tcp::receive(&old_server, 10_000)
}

#[test]
#[ignore = "netns"]
fn a_killed_proxy_resets_its_connections_and_serves_again() -> anyhow::Result<()> {
    let mut mesh = shop()?;
    let (far, client) = listeners(&mesh)?;
    let (old, old_server) = tcp::pair(mesh.netns("client"), &far, mesh.address("far", PORT))?;
    mesh.nodes[0].proxy.kill();
    tcp::expect_reset(&old)?;
    tcp::expect_reset(&old_server)?;
    // Opened while there is no proxy: held in the accept queue, then carried.
    let held = tcp::connect(mesh.netns("client"), mesh.address("far", PORT))?;
    tcp::send(&held, 100)?;
    let proxy = NodePrograms::start_module(
        &mesh.sandbox,
        &mesh.binaries,
        &mesh.topology.nodes[0],
        "proxy",
        &mesh.settings,
    )?;
    mesh.nodes[0].proxy = proxy;
    let served = tcp::accept(&far)?;
    tcp::receive(&served, 100)?;
    connections_work_again(&mesh, &far, &client)
}

#[test]
#[ignore = "netns"]
fn a_killed_redirect_module_breaks_no_connection_and_comes_back() -> anyhow::Result<()> {
    let mut mesh = shop()?;
    let (far, client) = listeners(&mesh)?;
    let (old, old_server) = tcp::pair(mesh.netns("client"), &far, mesh.address("far", PORT))?;
    mesh.nodes[0].redirect.kill();
    connections_work(&mesh, &far, &client)?;
    let redirect = NodePrograms::start_module(
        &mesh.sandbox,
        &mesh.binaries,
        &mesh.topology.nodes[0],
        "redirect",
        &mesh.settings,
    )?;
    mesh.nodes[0].redirect = redirect;
    connections_work_again(&mesh, &far, &client)?;
    tcp::send(&old, 10_000)?;
    tcp::receive(&old_server, 10_000)?;
    // It acts again: the label's removal takes everything out.
    mesh.cluster.enroll("shop", false).write()?;
    mesh.wait_for_stage("shop", "none", SETTLE)?;
    drop((old, old_server));
    eventually(SETTLE, "no rule is left", || {
        let left = mesh.rules_left("client")?;
        ensure!(left.is_empty(), "{left}");
        Ok(())
    })
}

#[test]
#[ignore = "netns"]
fn a_broken_cluster_file_keeps_the_last_good_state() -> anyhow::Result<()> {
    let mesh = shop()?;
    let (far, client) = listeners(&mesh)?;
    mesh.cluster
        .write_text("namespaces: [\n  {name: shop, lables: {}}\n]\n")?;
    let log = mesh
        .control_plane
        .as_ref()
        .expect("the mesh was started")
        .controller
        .log()
        .to_owned();
    eventually(SETTLE, "the controller names the line", || {
        let text = std::fs::read_to_string(&log)?;
        ensure!(
            text.contains("lables") && text.contains("cluster.yaml:2"),
            "{text}"
        );
        Ok(())
    })?;
    connections_work(&mesh, &far, &client)
}
