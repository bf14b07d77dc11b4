// SPDX-License-Identifier: Apache-2.0
use anyhow::ensure;
use podveil_interop_tests::{Mesh, shop, tcp};
use podveil_sim::{Capture, app::MARKER, run};
use std::io::Write;
use std::net::IpAddr;
use std::path::PathBuf;

const PORT: u16 = 9000;
const ROUNDS: usize = 50;

#[test]
#[ignore = "netns"]
fn with_capture_flushed_by_hand_the_fence_lets_no_payload_through() -> anyhow::Result<()> {
    let mesh = shop()?;
    let _listener = tcp::listen(mesh.netns("far"), PORT)?;
    let pods: Vec<IpAddr> = mesh.pods.iter().flat_map(|pod| pod.net.addresses).collect();
    let capture = Capture::start(
        &mesh.topology.nodes[0].netns,
        MARKER.as_bytes(),
        move |source, destination| pods.contains(&source) && pods.contains(&destination),
    )?;
    // An open captured connection, and new ones all the time.
    let mut open = tcp::connect(mesh.netns("client"), mesh.address("far", PORT))?;
    open.write_all(MARKER.as_bytes())?;
    for pod in ["client", "far"] {
        flush_capture(&mesh, pod)?;
    }
    for _ in 0..ROUNDS {
        for way in [
            mesh.address("far", PORT),
            std::net::SocketAddr::new(mesh.v6("far"), PORT),
        ] {
            if let Ok(mut stream) = tcp::connect(mesh.netns("client"), way) {
                let _refused_or_repaired = stream.write_all(MARKER.as_bytes());
            }
        }
        let _reset_or_carried = open.write_all(MARKER.as_bytes());
    }
    let captured = capture.finish()?;
    ensure!(captured.segments > 0, "nothing was captured");
    ensure!(
        captured.marker_frames == 0,
        "the fence let the payload through: {captured:?}"
    );
    ensure!(
        captured.plain_payload_segments == 0,
        "plain payload crossed: {captured:?}"
    );
    Ok(())
}

/// What an operator does in anger: `nft flush chain` on every chain of type nat, or `rm` on the pins of the programs that
/// capture. The fence is left.
fn flush_capture(mesh: &Mesh, pod: &str) -> anyhow::Result<()> {
    let pod = &mesh.pod(pod).net;
    let netns = format!("--net=/run/netns/{}", pod.namespace);
    let chains = nat_chains(&netns)?;
    let own = format!("pods/{}/capture", pod.netns.cookie()?);
    let pins: Vec<PathBuf> = (mesh.topology.nodes.iter())
        .map(|node| format!("{}-bpf/v1", node.name))
        .map(|folder| mesh.sandbox.folder().join(folder))
        .filter(|folder| folder.join(&own).exists())
        .flat_map(|folder| {
            [own.as_str(), "node/capture_ipv4", "node/capture_ipv6"].map(|pin| folder.join(pin))
        })
        .collect();
    ensure!(
        chains.is_empty() != pins.is_empty(),
        "{} is captured by one back end: {chains:?}, {pins:?}",
        pod.namespace,
    );
    for chain in chains {
        run(
            "nsenter",
            [&netns, "nft", "flush", "chain", "inet", "podveil", &chain],
        )?;
    }
    Ok(pins.into_iter().try_for_each(std::fs::remove_file)?)
}

fn nat_chains(netns: &str) -> anyhow::Result<Vec<String>> {
    let listing = run("nsenter", [netns, "nft", "-j", "list", "chains"])?;
    let listing: serde_json::Value = serde_json::from_str(&listing)?;
    Ok(listing["nftables"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|object| object["chain"]["type"] == "nat")
        .filter_map(|object| object["chain"]["name"].as_str().map(str::to_owned))
        .collect())
}
