// SPDX-License-Identifier: Apache-2.0
use anyhow::{Context, ensure};
use podveil_interop_tests::{SETTLE, shop, tcp};
use podveil_sim::{APP_PORT, eventually, http_get};
use serde_json::json;
use std::time::Duration;

const PORT: u16 = 9000;
const MOMENT: Duration = Duration::from_millis(500);

#[test]
#[ignore = "netns"]
fn policy_decides_on_the_original_port_and_while_the_connection_lives() -> anyhow::Result<()> {
    let mut mesh = shop()?;
    let listener = tcp::listen(mesh.netns("far"), PORT)?;
    let (client, server) = tcp::pair(mesh.netns("client"), &listener, mesh.address("far", PORT))?;
    let (other, other_server) =
        tcp::pair(mesh.netns("near"), &listener, mesh.address("far", PORT))?;
    mesh.cluster.policies.push(json!({
        "name": "no-clients", "namespace": "shop", "scope": "namespace", "action": "deny",
        "rules": [{"from": [{"principals": ["*/ns/shop/sa/client"]}], "to": [{"ports": [PORT]}]}],
    }));
    mesh.cluster.write()?;
    tcp::expect_reset(&client).context("a live connection that policy no longer permits")?;
    tcp::expect_reset(&server)?;
    tcp::send(&other, 1000)?;
    tcp::receive(&other_server, 1000).context("a connection of another identity")?;
    tcp::expect_connection_reset(mesh.netns("client"), mesh.address("far", PORT))
        .context("a new connection")?;
    http_get(&mesh.pod("client").net, mesh.v4("far"), APP_PORT, "/").context("another port")?;
    let log = mesh.sandbox.folder().join("n2-proxy.log");
    eventually(SETTLE, "the access log names the rule", || {
        let text = std::fs::read_to_string(&log)?;
        ensure!(
            text.contains("shop/no-clients"),
            "the log does not name the policy"
        );
        Ok(())
    })?;
    mesh.cluster.policies.clear();
    mesh.cluster.write()?;
    listener.set_nonblocking(true)?;
    eventually(SETTLE, "it is permitted again", || {
        let client = tcp::connect(mesh.netns("client"), mesh.address("far", PORT))?;
        tcp::send(&client, 10)?;
        // Either it arrives, or the client is reset and this is tried again.
        let (server, _) = eventually(MOMENT, "it arrives", || Ok(listener.accept()?))?;
        server.set_nonblocking(false)?;
        tcp::receive(&server, 10)
    })
}
