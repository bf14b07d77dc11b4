// SPDX-License-Identifier: Apache-2.0
//! A node program that stands by and follows another one.

use crate::capture::{ask, back_end, wire};
use anyhow::{Context, ensure};
use podveil_interop_tests::{Mesh, SETTLE, tcp};
use podveil_netns::NetNs;
use podveil_sim::{APP_PORT, NodePrograms, NodeSettings, eventually};
use serde_json::json;
use std::net::SocketAddr;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const PORT: u16 = 9000;
/// Of the proxy that is followed, and a little more of its holder.
const DRAIN: [(&str, &str); 2] = [("proxy", "6s"), ("redirect", "8s")];
/// Before and after.
const MORE: usize = 100;
const PODS: [(usize, &str, &str, &str); 4] = [
    (1, "shop", "client", "client"),
    (1, "shop", "near", "web"),
    (2, "shop", "far", "web"),
    (2, "shop", "other", "client"),
];
const WAYS: [(&str, &str); 3] = [("client", "far"), ("other", "near"), ("client", "near")];
/// After a kill.
const SERVED_AGAIN: Duration = Duration::from_secs(2);
const ENDED: Duration = Duration::from_secs(20);
/// The longest that new connections find nobody, on a machine that has other work too.
const NOT_SERVED: Duration = Duration::from_secs(1);

#[test]
#[ignore = "netns"]
fn a_node_program_that_follows_another_one_loses_no_connection() -> anyhow::Result<()> {
    for name in ["ebpf", "nftables"] {
        followed(name).context(name)?;
    }
    Ok(())
}

#[test]
#[ignore = "netns"]
fn who_stands_by_follows_whichever_module_is_killed_first() -> anyhow::Result<()> {
    for redirect_first in [true, false] {
        let what = format!("the redirect module first: {redirect_first}");
        killed(redirect_first).context(what)?;
    }
    Ok(())
}

fn killed(redirect_first: bool) -> anyhow::Result<()> {
    let mut mesh = Mesh::start(instance("ebpf", "first"), &PODS)?;
    let capture = wire(&mesh)?;
    let next = stand_by(&mesh, &instance("ebpf", "second"))?;
    let mut former = std::mem::replace(&mut mesh.nodes[0], next);
    let modules = match redirect_first {
        true => [&mut former.redirect, &mut former.proxy],
        false => [&mut former.proxy, &mut former.redirect],
    };
    for module in modules {
        module.kill();
        let killed = Instant::now();
        for (from, to) in WAYS {
            eventually(SERVED_AGAIN, "new connections are served", || {
                ask(mesh.netns(from), mesh.address(to, APP_PORT))
            })?;
        }
        println!(
            "{} killed: served after {:?}",
            module.name(),
            killed.elapsed()
        );
        holds_the_pods(&mesh)?;
    }
    mesh.wait_for_stage("shop", "mandatory", SETTLE)?;
    let seen = capture.finish()?;
    ensure!(
        seen.payload_segments > 0 && seen.plain_payload_segments == 0 && seen.marker_frames == 0,
        "{seen:?}"
    );
    Ok(())
}

fn instance(back_end_name: &str, name: &str) -> NodeSettings {
    let mut settings = NodeSettings {
        instance: Some(name.to_owned()),
        ..back_end(back_end_name)
    };
    for (section, bound) in DRAIN {
        let section = match section {
            "proxy" => &mut settings.proxy,
            _ => &mut settings.redirect,
        };
        section.insert("drain_bound".to_owned(), json!(bound));
    }
    settings
}

fn followed(back_end: &str) -> anyhow::Result<()> {
    let mut mesh = Mesh::start(instance(back_end, "first"), &PODS)?;
    let capture = wire(&mesh)?;
    let listener = tcp::listen(mesh.netns("far"), PORT)?;
    let open = tcp::pair(mesh.netns("client"), &listener, mesh.address("far", PORT))?;
    let ways: Vec<(NetNs, SocketAddr)> = WAYS
        .iter()
        .map(|(from, to)| Ok((mesh.netns(from).try_clone()?, mesh.address(to, APP_PORT))))
        .collect::<anyhow::Result<_>>()?;
    let (stop, served) = (AtomicBool::new(false), AtomicUsize::new(0));
    let loads = std::thread::scope(|scope| -> anyhow::Result<Vec<Load>> {
        let (stop, served) = (&stop, &served);
        let loads: Vec<_> = (ways.iter())
            .map(|(from, to)| scope.spawn(move || Load::run(from, *to, stop, served)))
            .collect();
        let serve_more = || {
            let than = served.load(Ordering::Relaxed) + MORE;
            eventually(SETTLE, "connections are served", || {
                ensure!(served.load(Ordering::Relaxed) > than);
                Ok(())
            })
        };
        let outcome = serve_more()
            .and_then(|()| follow(&mut mesh, &instance(back_end, "second"), open))
            .and_then(|()| serve_more());
        stop.store(true, Ordering::Relaxed);
        let loads = loads
            .into_iter()
            .map(|load| load.join().expect("no load panics"));
        outcome.map(|()| loads.collect())
    })?;
    for load in loads {
        println!("{back_end}: {load:?}");
        ensure!(
            load.served > 0 && load.failed.is_none() && load.longest_gap < NOT_SERVED,
            "{load:?}"
        );
    }
    let seen = capture.finish()?;
    ensure!(
        seen.payload_segments > 0 && seen.plain_payload_segments == 0 && seen.marker_frames == 0,
        "{seen:?}"
    );
    Ok(())
}

/// Node 1's programs give way to others.
fn follow(
    mesh: &mut Mesh,
    settings: &NodeSettings,
    open: (std::net::TcpStream, std::net::TcpStream),
) -> anyhow::Result<()> {
    let next = stand_by(mesh, settings)?;
    let mut former = std::mem::replace(&mut mesh.nodes[0], next);
    former.redirect.ask_to_end()?;
    former.proxy.ask_to_end()?;
    holds_the_pods(mesh)?;
    former.redirect.terminate(ENDED)?;
    // The one that drains has not ended it.
    for (one, other) in [(&open.0, &open.1), (&open.1, &open.0)] {
        tcp::send(one, 10_000).context("the open connection")?;
        tcp::receive(other, 10_000).context("the open connection")?;
    }
    drop(open);
    former.proxy.terminate(ENDED)?;
    mesh.wait_for_stage("shop", "mandatory", SETTLE)
}

/// Others beside node 1's programs, as soon as they count as ready.
fn stand_by(mesh: &Mesh, settings: &NodeSettings) -> anyhow::Result<NodePrograms> {
    let node = &mesh.topology.nodes[0];
    let mut next = NodePrograms::start(&mesh.sandbox, &mesh.binaries, node, settings)?;
    for module in ["redirect", "proxy"] {
        let instance = settings.instance.as_deref().unwrap_or_default();
        let socket = format!("{}-{module}-{instance}.sock", node.name);
        let socket = mesh.sandbox.folder().join(socket);
        eventually(SETTLE, "who stands by is ready", || {
            next.redirect.check_running()?;
            next.proxy.check_running()?;
            let program = mesh.binaries.text("podveil-node");
            let ready = Command::new(program).arg("ready").arg(&socket).output()?;
            let said = String::from_utf8_lossy(&ready.stderr);
            ensure!(ready.status.success(), "{module}: {said}");
            Ok(())
        })?;
    }
    Ok(next)
}

/// Node 1 has its pods under capture and a proxy that takes them.
fn holds_the_pods(mesh: &Mesh) -> anyhow::Result<()> {
    eventually(SETTLE, "node 1 holds its pods", || {
        let captured = mesh.captured("client")?;
        ensure!(captured["condition"] == "ready", "{captured}");
        let said = mesh.redirect_status(1)?;
        ensure!(said["proxyConnected"] == true, "{said}");
        Ok(())
    })
}

/// New connections, one after the other.
#[derive(Debug)]
struct Load {
    served: usize,
    failed: Option<String>,
    longest_gap: Duration,
}

impl Load {
    fn run(from: &NetNs, to: SocketAddr, stop: &AtomicBool, all: &AtomicUsize) -> Self {
        let mut load = Self {
            served: 0,
            failed: None,
            longest_gap: Duration::ZERO,
        };
        let mut last = Instant::now();
        while !stop.load(Ordering::Relaxed) {
            match ask(from, to) {
                Ok(()) => {
                    load.served += 1;
                    all.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) => load.failed = Some(format!("{error:#}")),
            }
            load.longest_gap = load.longest_gap.max(last.elapsed());
            last = Instant::now();
            std::thread::sleep(Duration::from_millis(5));
        }
        load
    }
}
