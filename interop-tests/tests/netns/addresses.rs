// SPDX-License-Identifier: Apache-2.0
use anyhow::ensure;
use podveil_interop_tests::{Mesh, tcp};
use podveil_sim::{NodeSettings, eventually, run};
use std::net::SocketAddr;

const PORT: u16 = 9000;

#[test]
#[ignore = "netns"]
fn two_pods_of_one_identity_on_one_node_each_keep_their_own_source_address() -> anyhow::Result<()> {
    let mesh = Mesh::start(
        NodeSettings::default(),
        &[
            (1, "shop", "one", "client"),
            (1, "shop", "two", "client"),
            (2, "shop", "far", "web"),
        ],
    )?;
    let listener = tcp::listen(mesh.netns("far"), PORT)?;
    for address in [mesh.v4("far"), mesh.v6("far")] {
        for pod in ["one", "two", "one"] {
            let (_client, server) =
                tcp::pair(mesh.netns(pod), &listener, SocketAddr::new(address, PORT))?;
            let seen = server.peer_addr()?.ip().to_canonical();
            let own = if address.is_ipv4() {
                mesh.v4(pod)
            } else {
                mesh.v6(pod)
            };
            ensure!(seen == own, "{pod} with address {own} was seen as {seen}");
        }
    }
    Ok(())
}

#[test]
#[ignore = "netns"]
fn a_service_address_is_resolved_to_an_endpoint() -> anyhow::Result<()> {
    let mut mesh = podveil_interop_tests::shop()?;
    let addresses = ["10.96.0.80".parse()?, "fd00:10:96::80".parse()?];
    mesh.add_web(&addresses, PORT)?;
    let near = tcp::listen(mesh.netns("near"), PORT)?;
    let far = tcp::listen(mesh.netns("far"), PORT)?;
    near.set_nonblocking(true)?;
    far.set_nonblocking(true)?;
    for address in addresses {
        let mut reached = [0, 0];
        while reached.contains(&0) {
            ensure!(
                reached.iter().sum::<i32>() < 64,
                "{address}: 64 connections reached {reached:?} (near, far)"
            );
            let _client = tcp::connect(mesh.netns("client"), SocketAddr::new(address, 80))?;
            let place = eventually(podveil_interop_tests::SETTLE, "an endpoint gets it", || {
                if near.accept().is_ok() {
                    return Ok(0);
                }
                far.accept()?;
                Ok(1)
            })?;
            reached[place] += 1;
        }
    }
    Ok(())
}

#[test]
#[ignore = "netns"]
fn a_frame_for_a_foreign_address_is_not_taken() -> anyhow::Result<()> {
    let mesh = podveil_interop_tests::shop()?;
    let node = &mesh.topology.nodes[0];
    let link = mesh.pod("near").net.link.clone();
    // A neighbour hands the pod's MAC a segment for an address that is not the pod's.
    run(
        "ip",
        [
            "-n",
            &node.namespace,
            "route",
            "add",
            "198.51.100.7/32",
            "via",
            &mesh.v4("near").to_string(),
            "dev",
            &link,
            "onlink",
        ],
    )?;
    let foreign = "198.51.100.7:8080".parse()?;
    let attempt = podveil_sim::in_netns(&node.netns, || {
        Ok(std::net::TcpStream::connect_timeout(
            &foreign,
            std::time::Duration::from_secs(2),
        ))
    })?;
    ensure!(
        attempt.is_err(),
        "a connection to a foreign address was accepted by {attempt:?}"
    );
    Ok(())
}
