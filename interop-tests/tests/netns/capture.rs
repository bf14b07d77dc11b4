// SPDX-License-Identifier: Apache-2.0
use anyhow::{Context, ensure};
use podveil_interop_tests::{Mesh, SETTLE, shop, tcp};
use podveil_sim::{
    APP_PORT, Capture, NodePrograms, NodeSettings, app::MARKER, eventually, in_netns,
};
use serde_json::json;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

const PORT: u16 = 9000;
/// Connections a second while the node program is killed, by so many clients.
const RATE: u32 = 500;
const CLIENTS: u32 = 10;
/// From the restart of a killed node program to capture that is verified and a connection that is served, with room for a
/// machine that is busy with other things.
const BACK: Duration = Duration::from_secs(2);

pub fn back_end(name: &str) -> NodeSettings {
    NodeSettings {
        redirect: [("back_end".to_owned(), json!(name))].into_iter().collect(),
        ..NodeSettings::default()
    }
}

/// All that goes between pods on the links of node 1.
pub fn wire(mesh: &Mesh) -> anyhow::Result<Capture> {
    let pods: Vec<IpAddr> = mesh.pods.iter().flat_map(|pod| pod.net.addresses).collect();
    Capture::start(
        &mesh.topology.nodes[0].netns,
        MARKER.as_bytes(),
        move |source, destination| pods.contains(&source) && pods.contains(&destination),
    )
}

#[test]
#[ignore = "netns"]
fn nodes_of_different_back_ends_work_together_and_name_theirs() -> anyhow::Result<()> {
    for names in [["ebpf", "nftables"], ["ebpf", "iptables"]] {
        work_together(names).with_context(|| format!("{names:?}"))?;
    }
    Ok(())
}

fn work_together([one, other]: [&str; 2]) -> anyhow::Result<()> {
    let mesh = Mesh::start_each(
        [back_end(one), back_end(other)],
        &[(1, "shop", "client", "client"), (2, "shop", "far", "web")],
    )?;
    for (node, pod, name) in [(1, "client", one), (2, "far", other)] {
        let chosen = &mesh.redirect_status(node)?["backEnd"]["chosen"];
        ensure!(chosen == name, "node {node} has chosen {chosen}");
        let captured = eventually(SETTLE, "capture is verified", || {
            let captured = mesh.captured(pod)?;
            ensure!(captured["verified"].is_u64(), "{captured}");
            Ok(captured)
        })?;
        ensure!(
            captured["backEnd"] == name && captured["capturedSince"].is_u64(),
            "{captured}"
        );
    }
    let capture = wire(&mesh)?;
    for (from, to) in [("client", "far"), ("far", "client")] {
        let listener = tcp::listen(mesh.netns(to), PORT)?;
        for address in mesh.pod(to).net.addresses {
            let to = SocketAddr::new(address, PORT);
            let (mut here, there) = tcp::pair(mesh.netns(from), &listener, to)?;
            here.write_all(MARKER.as_bytes())?;
            let mut word = [0; MARKER.len()];
            (&there).read_exact(&mut word)?;
            tcp::send(&there, 10_000)?;
            tcp::receive(&here, 10_000)?;
        }
    }
    let seen = capture.finish()?;
    ensure!(
        seen.payload_segments > 0 && seen.plain_payload_segments == 0 && seen.marker_frames == 0,
        "{seen:?}"
    );
    Ok(())
}

#[test]
#[ignore = "netns"]
fn a_node_program_killed_under_load_lets_no_plaintext_out_and_serves_again_at_once()
-> anyhow::Result<()> {
    let mut mesh = shop()?;
    let capture = wire(&mesh)?;
    let to = mesh.address("far", APP_PORT);
    let (stop, served) = (AtomicBool::new(false), AtomicUsize::new(0));
    let pause = Duration::from_secs(1) * CLIENTS / RATE;
    let clients = mesh.netns("client").try_clone()?;
    std::thread::scope(|scope| -> anyhow::Result<()> {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let began = Instant::now();
                    if ask(&clients, to).is_ok() {
                        served.fetch_add(1, Ordering::Relaxed);
                    }
                    std::thread::sleep(pause.saturating_sub(began.elapsed()));
                }
            });
        }
        let outcome = killed_and_restarted(&mut mesh, &served);
        stop.store(true, Ordering::Relaxed);
        outcome
    })?;
    let seen = capture.finish()?;
    ensure!(
        seen.payload_segments > 0 && seen.plain_payload_segments == 0 && seen.marker_frames == 0,
        "{seen:?}"
    );
    Ok(())
}

fn killed_and_restarted(mesh: &mut Mesh, served: &AtomicUsize) -> anyhow::Result<()> {
    let serve_more = |than: usize| {
        let now = served.load(Ordering::Relaxed);
        ensure!(now > than, "{now} connections were served");
        Ok(now)
    };
    eventually(SETTLE, "the load runs", || serve_more(RATE as usize))?;
    mesh.nodes[0].proxy.kill();
    mesh.nodes[0].redirect.kill();
    let left = served.load(Ordering::Relaxed);
    let began = (Instant::now(), SystemTime::now());
    let settings = NodeSettings::default();
    let programs = NodePrograms::start(
        &mesh.sandbox,
        &mesh.binaries,
        &mesh.topology.nodes[0],
        &settings,
    )?;
    mesh.nodes[0] = programs;
    let since = began.1.duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
    // One may still have been under way when the program was killed.
    eventually(SETTLE, "new connections are served", || {
        serve_more(left + CLIENTS as usize)
    })?;
    eventually(SETTLE, "capture is verified again", || {
        let verified = mesh.captured("client")?["verified"].as_u64();
        ensure!(verified.context("it is not verified")? >= since);
        Ok(())
    })?;
    let back = began.0.elapsed();
    println!("a killed node program was back after {back:?}");
    ensure!(back < BACK, "it took {back:?}");
    Ok(())
}

/// One request, with the marker in it, and its whole answer.
pub fn ask(from: &podveil_netns::NetNs, to: SocketAddr) -> anyhow::Result<()> {
    let mut stream = in_netns(from, || {
        Ok(TcpStream::connect_timeout(&to, Duration::from_millis(250))?)
    })?;
    stream.set_read_timeout(Some(Duration::from_millis(500)))?;
    stream.write_all(format!("GET / HTTP/1.0\r\nx-marker: {MARKER}\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.contains(MARKER));
    Ok(())
}
