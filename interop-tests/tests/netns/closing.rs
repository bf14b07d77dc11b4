// SPDX-License-Identifier: Apache-2.0
use podveil_interop_tests::{Mesh, shop, tcp};
use std::net::{Shutdown, TcpStream};

const PORT: u16 = 9000;

/// Both ends of one connection across nodes and of one on the same node.
fn pairs(mesh: &Mesh) -> anyhow::Result<Vec<(TcpStream, TcpStream)>> {
    ["near", "far"]
        .into_iter()
        .map(|pod| {
            let listener = tcp::listen(mesh.netns(pod), PORT)?;
            tcp::pair(mesh.netns("client"), &listener, mesh.address(pod, PORT))
        })
        .collect()
}

#[test]
#[ignore = "netns"]
fn a_half_close_stays_a_half_close_from_either_side() -> anyhow::Result<()> {
    let mesh = shop()?;
    for (client, server) in pairs(&mesh)? {
        tcp::send(&client, 1000)?;
        client.shutdown(Shutdown::Write)?;
        tcp::receive(&server, 1000)?;
        tcp::expect_end(&server)?;
        tcp::send(&server, 300_000)?;
        tcp::receive(&client, 300_000)?;
        server.shutdown(Shutdown::Write)?;
        tcp::expect_end(&client)?;
    }
    for (client, server) in pairs(&mesh)? {
        server.shutdown(Shutdown::Write)?;
        tcp::expect_end(&client)?;
        tcp::send(&client, 300_000)?;
        tcp::receive(&server, 300_000)?;
        client.shutdown(Shutdown::Write)?;
        tcp::expect_end(&server)?;
    }
    Ok(())
}

#[test]
#[ignore = "netns"]
fn a_reset_arrives_as_a_reset_from_either_side() -> anyhow::Result<()> {
    let mesh = shop()?;
    for (client, server) in pairs(&mesh)? {
        tcp::send(&client, 1000)?;
        tcp::receive(&server, 1000)?;
        tcp::reset(client)?;
        tcp::expect_reset(&server)?;
    }
    for (client, server) in pairs(&mesh)? {
        tcp::send(&server, 1000)?;
        tcp::receive(&client, 1000)?;
        tcp::reset(server)?;
        tcp::expect_reset(&client)?;
    }
    Ok(())
}

#[test]
#[ignore = "netns"]
fn an_application_that_refuses_is_a_reset_for_the_client() -> anyhow::Result<()> {
    let mesh = shop()?;
    for way in mesh.ways(PORT) {
        // Nothing listens on this port. The capture has accepted, so the refusal comes as a reset.
        tcp::expect_connection_reset(mesh.netns("client"), way)?;
    }
    Ok(())
}
