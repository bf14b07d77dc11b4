// SPDX-License-Identifier: Apache-2.0
//! `podveilctl demo`: the promises, shown on this machine with the real programs.

mod forgery;
mod steps;
mod traffic;

use anyhow::Context;
use podveil_sim::{Binaries, NodeSettings, Report, World, missing_tools};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

#[derive(clap::Args)]
pub struct Arguments {
    /// Leave it up at the end and print the commands to look around; it is removed when this program ends.
    #[arg(long)]
    keep: bool,
}

/// Between two looks at whether the user wants to stop.
const LOOK: Duration = Duration::from_millis(100);

pub fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let missing = missing_tools();
    if !missing.is_empty() {
        for line in missing {
            eprintln!("{line}");
        }
        return Ok(ExitCode::FAILURE);
    }
    let interrupted = interrupts()?;
    let began = Instant::now();
    let folder = std::env::current_exe()?
        .parent()
        .context("this program is in no folder")?
        .to_owned();
    let mut report = Report::new(interrupted.clone());
    let mut world = set_up(Binaries::in_folder(folder)?)?;
    steps::all(&mut world, &mut report)?;
    println!(
        "\n{} in {:.1} s",
        report.summary(),
        began.elapsed().as_secs_f64()
    );
    if arguments.keep && !report.interrupted() {
        world.start_control_plane()?;
        print_tour(&world, &std::env::current_exe()?);
        while !interrupted.load(Ordering::Relaxed) {
            std::thread::sleep(LOOK);
        }
        drop(world);
        println!("\nRemoved.");
    }
    Ok(if report.succeeded() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Set when the user presses Ctrl-C or ends the terminal: the report stops at its next line and everything is removed.
fn interrupts() -> anyhow::Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let set = flag.clone();
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            let runtime = match crate::runtime() {
                Ok(runtime) => runtime,
                Err(error) => return eprintln!("{error:#}: only kill will end this"),
            };
            runtime.block_on(async {
                use tokio::signal::unix::{SignalKind, signal};
                let (Ok(mut interrupt), Ok(mut terminate), Ok(mut hangup)) = (
                    signal(SignalKind::interrupt()),
                    signal(SignalKind::terminate()),
                    signal(SignalKind::hangup()),
                ) else {
                    return eprintln!("signals cannot be watched: only kill will end this");
                };
                loop {
                    tokio::select! {
                        _ = interrupt.recv() => {}
                        _ = terminate.recv() => {}
                        _ = hangup.recv() => {}
                    }
                    set.store(true, Ordering::Relaxed);
                }
            });
        })?;
    Ok(flag)
}

/// Two pods on each node, one of them of a namespace without the label.
fn set_up(binaries: Binaries) -> anyhow::Result<World> {
    let mut world = World::new(binaries, NodeSettings::default())?;
    world.cluster.add_namespace("shop", true);
    world.cluster.add_namespace("legacy", false);
    world.add_pod(1, "shop", "client", "client")?;
    world.add_pod(1, "shop", "web-near", "web")?;
    world.add_pod(2, "shop", "web-far", "web")?;
    world.add_pod(2, "legacy", "plain", "plain")?;
    world.start()?;
    Ok(world)
}

fn print_tour(world: &World, podveilctl: &Path) {
    let (client, far) = (world.pod("client"), world.pod("web-far"));
    println!("\nStill up. Look around, Ctrl-C removes everything:");
    println!(
        "  ip netns exec {} curl -sS http://{}:8080/",
        client.net.namespace,
        far.net.v4()
    );
    println!("  ip netns exec {} ss -tln", client.net.namespace);
    println!(
        "  ip netns exec {} curl -sS http://127.0.0.1:15000/config_dump",
        world.topology.nodes[0].namespace
    );
    println!(
        "  ip netns exec {} curl -sS http://127.0.0.1:15020/metrics",
        world.topology.nodes[1].namespace
    );
    println!(
        "  ip netns exec {} curl -sS http://127.0.0.1:15300/status",
        world.topology.control_plane.0
    );
    println!(
        "  tail -f {}/n2-proxy.log",
        world.sandbox.folder().display()
    );
    println!(
        "  {} rotate root --socket {}",
        podveilctl.display(),
        podveil_sim::admin_socket(&world.sandbox).display()
    );
    println!(
        "  the cluster is the file {}: change a label and watch",
        world.cluster.path().display()
    );
}
