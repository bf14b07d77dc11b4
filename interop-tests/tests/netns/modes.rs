// SPDX-License-Identifier: Apache-2.0
use anyhow::{Context, ensure};
use podveil_interop_tests::{SETTLE, shop, tcp};
use podveil_sim::{APP_PORT, eventually, http_get};

#[test]
#[ignore = "netns"]
fn strict_refuses_plain_both_ways_and_permissive_takes_it_again() -> anyhow::Result<()> {
    let mut mesh = shop()?;
    let ask = |mesh: &podveil_interop_tests::Mesh, from: &str, to: &str| {
        http_get(&mesh.pod(from).net, mesh.v4(to), APP_PORT, "/").map(drop)
    };
    ask(&mesh, "plain", "far")?;
    ask(&mesh, "client", "plain")?;
    mesh.cluster.strict("shop", true).write()?;
    for (from, to) in [("plain", "far"), ("client", "plain")] {
        eventually(SETTLE, "plain is refused", || {
            ensure!(
                ask(&mesh, from, to).is_err(),
                "{from} still reaches {to} in plain"
            );
            Ok(())
        })?;
    }
    ask(&mesh, "client", "far").context("enrolled pods in strict")?;
    mesh.cluster.strict("shop", false).write()?;
    eventually(SETTLE, "plain is taken", || ask(&mesh, "plain", "far"))?;
    eventually(SETTLE, "plain is sent", || ask(&mesh, "client", "plain"))
}

#[test]
#[ignore = "netns"]
fn the_proxys_own_ports_are_never_a_destination() -> anyhow::Result<()> {
    let mesh = shop()?;
    for port in [15001, 15006] {
        // From outside, and from the pod itself.
        for from in ["client", "far", "plain"] {
            if let Ok(stream) = tcp::connect(mesh.netns(from), mesh.address("far", port)) {
                tcp::expect_reset(&stream).with_context(|| format!("{from} to port {port}"))?;
            }
        }
    }
    Ok(())
}
