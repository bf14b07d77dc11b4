// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask bench`: raw TCP, the plain path and the HBONE path side by side, between pods on two simulated nodes.
//!
//! All paths are measured in one run, in turn, several rounds; each figure is the median of its rounds. Processor time
//! is that of the clients, the servers and the proxies together, kernel work on their behalf included. What the kernel
//! does in interrupts for nobody in particular is not in it.

mod capture;
mod cost;
mod enrolment;
mod load;
mod on_demand;
mod scale;

use crate::{target, workspace};
use anyhow::{Context, ensure};
use cost::Cost;
use podveil_netns::NetNs;
use podveil_sim::{Binaries, NodeSettings, World, run as command};
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

const PORT: u16 = 9000;
const SETTLE: Duration = Duration::from_secs(20);
const IDLE_CONNECTIONS: usize = 1000;

#[derive(clap::Args)]
pub struct Arguments {
    /// Rounds; each figure is the median over them.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds of each measurement in each round.
    #[arg(long, default_value_t = 2)]
    seconds: u64,
    /// Something else than the paths.
    #[command(subcommand)]
    other: Option<Other>,
}

#[derive(clap::Subcommand)]
enum Other {
    /// What the way into the proxy costs: no capture, eBPF, nftables and iptables, both directions. Needs root.
    Capture(capture::Arguments),
    /// On real Kubernetes: from a new pod's address being known to its first encrypted connection.
    Enrolment(enrolment::Arguments),
    /// What a node that holds a part of a large cluster needs, beside one that holds everything. Needs root.
    OnDemand(on_demand::Arguments),
    /// A large cluster: the controller and a node program on a real API server, 1,000 nodes connected. Needs root and Go.
    Scale(scale::Arguments),
}

/// One way from a client's pod to a server's.
struct Path {
    name: &'static str,
    client: NetNs,
    to: SocketAddr,
}

/// # Errors
/// If something cannot be measured here.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    match &arguments.other {
        Some(Other::Capture(arguments)) => return capture::run(arguments),
        Some(Other::Enrolment(arguments)) => return enrolment::run(arguments),
        Some(Other::OnDemand(arguments)) => return on_demand::run(arguments),
        Some(Other::Scale(arguments)) => return scale::run(arguments),
        None => {}
    }
    let world = world(release()?)?;
    let paths = paths(&world)?;
    let proxies: Vec<u32> = world.nodes.iter().map(|node| node.proxy.pid()).collect();
    let _servers = ["far", "plain-far"]
        .map(|pod| load::serve(&world.pod(pod).net.netns, PORT))
        .into_iter()
        .collect::<Result<Vec<_>, _>>()?;
    let duration = Duration::from_secs(arguments.seconds);
    let mut rows = Rows::new(&paths);
    // Before anything else has made the proxies grow: what they keep afterwards would hide what a connection costs.
    for (column, path) in paths.iter().enumerate() {
        let before = cost::resident_bytes(&proxies)?;
        let idle = load::idle(path, IDLE_CONNECTIONS)?;
        let after = cost::resident_bytes(&proxies)?;
        rows.add(
            "resident memory per idle connection, both proxies, KiB",
            column,
            after.saturating_sub(before) as f64 / 1024.0 / IDLE_CONNECTIONS as f64,
        );
        drop(idle);
    }
    for round in 0..arguments.rounds {
        eprintln!("round {} of {}", round + 1, arguments.rounds);
        for (column, path) in paths.iter().enumerate() {
            measure(&mut rows, column, path, &proxies, duration)
                .with_context(|| format!("measuring {}", path.name))?;
        }
    }
    rows.print();
    Ok(())
}

/// Builds the programs as they are shipped.
fn release() -> anyhow::Result<Binaries> {
    let status = Command::new(env!("CARGO"))
        .current_dir(workspace())
        .args([
            "build",
            "--release",
            "--workspace",
            "--bins",
            "--exclude",
            "xtask",
        ])
        .status()?;
    ensure!(status.success(), "the release build failed");
    Binaries::in_folder(target()?.join("release"))
}

fn world(binaries: Binaries) -> anyhow::Result<World> {
    let mut world = World::new(binaries, NodeSettings::default())?;
    world
        .cluster
        .add_namespace("shop", true)
        .add_namespace("legacy", false);
    world.add_pod(1, "shop", "near", "client")?;
    world.add_pod(2, "shop", "far", "web")?;
    world.add_pod(1, "legacy", "plain-near", "client")?;
    world.add_pod(2, "legacy", "plain-far", "web")?;
    for pod in &world.pods {
        let netns = format!("--net=/run/netns/{}", pod.net.namespace);
        let wide = "echo 1 >/proc/sys/net/ipv4/tcp_tw_reuse; echo 1024 65000 >/proc/sys/net/ipv4/ip_local_port_range";
        command("nsenter", [&netns, "sh", "-c", wide])?;
    }
    world.start()?;
    world.wait_for_stage("shop", "mandatory", SETTLE)?;
    Ok(world)
}

fn paths(world: &World) -> anyhow::Result<[Path; 3]> {
    let path = |name, client: &str, server: &str| -> anyhow::Result<Path> {
        let client = world.pod(client).net.netns.try_clone()?;
        Ok(Path {
            name,
            client,
            to: SocketAddr::new(world.pod(server).net.v4(), PORT),
        })
    };
    Ok([
        path("raw TCP", "plain-near", "plain-far")?,
        path("plain path", "near", "plain-far")?,
        path("HBONE path", "near", "far")?,
    ])
}

fn measure(
    rows: &mut Rows,
    column: usize,
    path: &Path,
    proxies: &[u32],
    duration: Duration,
) -> anyhow::Result<()> {
    for (streams, throughput, per_gigabyte) in [
        (1, "one stream, MB/s", "one stream, CPU ms per GB"),
        (8, "eight streams, MB/s", "eight streams, CPU ms per GB"),
    ] {
        let cost = Cost::start(proxies)?;
        let bytes = load::stream(path, streams, duration)? as f64;
        rows.add(throughput, column, bytes / 1e6 / duration.as_secs_f64());
        rows.add(per_gigabyte, column, cost.milliseconds()? / (bytes / 1e9));
    }
    let cost = Cost::start(proxies)?;
    let mut latencies = load::request_response(path, duration)?;
    rows.add(
        "request and response, CPU us per request",
        column,
        cost.milliseconds()? * 1000.0 / latencies.len() as f64,
    );
    latencies.sort_unstable();
    let microseconds =
        |part: f64| latencies[((latencies.len() - 1) as f64 * part) as usize].as_secs_f64() * 1e6;
    rows.add("request and response, p50 us", column, microseconds(0.50));
    rows.add("request and response, p99 us", column, microseconds(0.99));
    let cost = Cost::start(proxies)?;
    let connections = load::connections(path, duration)? as f64;
    rows.add(
        "new connections per second",
        column,
        connections / duration.as_secs_f64(),
    );
    rows.add(
        "new connections, CPU us per connection",
        column,
        cost.milliseconds()? * 1000.0 / connections,
    );
    Ok(())
}

/// Samples by row and path, in the order in which rows first came.
struct Rows {
    paths: Vec<&'static str>,
    rows: Vec<(&'static str, Vec<Vec<f64>>)>,
}

impl Rows {
    fn new(paths: &[Path]) -> Self {
        Self {
            paths: paths.iter().map(|path| path.name).collect(),
            rows: Vec::new(),
        }
    }

    fn add(&mut self, name: &'static str, column: usize, sample: f64) {
        let place = self
            .rows
            .iter()
            .position(|(row, _)| *row == name)
            .unwrap_or_else(|| {
                self.rows.push((name, vec![Vec::new(); self.paths.len()]));
                self.rows.len() - 1
            });
        self.rows[place].1[column].push(sample);
    }

    fn print(&self) {
        print!("| median of rounds |");
        self.paths.iter().for_each(|path| print!(" {path} |"));
        println!("\n|---|{}", "---:|".repeat(self.paths.len()));
        for (name, columns) in &self.rows {
            print!("| {name} |");
            for samples in columns {
                match median(samples.clone()) {
                    Some(median) => print!(" {median:.1} |"),
                    None => print!(" - |"),
                }
            }
            println!();
        }
    }
}

fn median(mut samples: Vec<f64>) -> Option<f64> {
    samples.sort_by(f64::total_cmp);
    samples.get(samples.len() / 2).copied()
}
