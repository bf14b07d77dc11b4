// SPDX-License-Identifier: Apache-2.0
use crate::capture::{back_end, wire};
use anyhow::{Context, ensure};
use podveil_interop_tests::{Mesh, SETTLE, tcp};
use podveil_sim::{app::MARKER, eventually, run};
use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::SystemTime;

const PORT: u16 = 9000;
const ROUNDS: usize = 50;

#[test]
#[ignore = "netns"]
fn with_capture_flushed_by_hand_the_fence_lets_no_payload_through() -> anyhow::Result<()> {
    for name in ["ebpf", "nftables"] {
        flushed(name).with_context(|| format!("with {name}"))?;
    }
    Ok(())
}

fn flushed(name: &str) -> anyhow::Result<()> {
    let mesh = Mesh::start(
        back_end(name),
        &[(1, "shop", "client", "client"), (2, "shop", "far", "web")],
    )?;
    let _listening = [
        tcp::listen(mesh.netns("far"), PORT)?,
        tcp::listen(mesh.netns("client"), PORT)?,
    ];
    // Nothing is to be written for other reasons any more.
    for pod in ["client", "far"] {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
        eventually(SETTLE, "capture is verified once more", || {
            let captured = mesh.captured(pod)?;
            ensure!(
                captured["verified"].as_u64() > Some(now.as_secs()),
                "{captured}"
            );
            Ok(())
        })?;
    }
    let capture = wire(&mesh)?;
    // An open captured connection, and new ones all the time.
    let mut open = tcp::connect(mesh.netns("client"), mesh.address("far", PORT))?;
    open.write_all(MARKER.as_bytes())?;
    for pod in ["client", "far"] {
        flush_capture(&mesh, pod)?;
    }
    for _ in 0..ROUNDS {
        for (from, to) in [("client", "far"), ("far", "client")] {
            for address in mesh.pod(to).net.addresses {
                let to = SocketAddr::new(address, PORT);
                if let Ok(mut stream) = tcp::connect(mesh.netns(from), to) {
                    let _refused_or_repaired = stream.write_all(MARKER.as_bytes());
                }
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
    eventually(
        SETTLE,
        "capture is written again, and that is counted",
        || {
            for pod in ["client", "far"] {
                let captured = mesh.captured(pod)?;
                ensure!(captured["repairs"] == 1, "{pod}: {captured}");
            }
            Ok(())
        },
    )?;
    // One that is opened just then may still be refused.
    eventually(SETTLE, "new connections are carried again", || {
        let again = tcp::connect(mesh.netns("client"), mesh.address("far", PORT))?;
        tcp::send(&again, 100)
    })
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
