// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask bench scale`: what a large cluster costs. The programs measured lie beside this one.

use anyhow::Context;
use clap::Parser;
use podveil_cluster::ApiServer;
use podveil_scale::{Api, Bed, Size, load, measure};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// 1,000 nodes, 20,000 pods, 800 services of 20 endpoints and one of 4,000, on a real API server.
#[derive(Debug, Parser)]
struct Arguments {
    /// Kubeconfig of an API server that `--hold` has filled; else one is started and filled, which takes minutes.
    #[arg(long, conflicts_with = "hold")]
    kubeconfig: Option<PathBuf>,
    /// Start and fill an API server, say its kubeconfig, and wait for Ctrl-C.
    #[arg(long)]
    hold: bool,
    /// Nodes whose programs are connected.
    #[arg(long, default_value_t = Size::FULL.subscribers)]
    subscribers: usize,
    /// Changes of pods that are timed.
    #[arg(long, default_value_t = Size::FULL.changes)]
    changes: usize,
    /// Seconds for which requests are counted while nothing changes.
    #[arg(long, default_value_t = Size::FULL.rest.as_secs())]
    rest: u64,
    /// Leave out that the controller is killed and all nodes come back at once: they share the machine's processors here.
    #[arg(long)]
    without_restart: bool,
    /// The nodes' proxies hold no more than their pods talk to: 20 services each, and on a tenth of the nodes the large one.
    #[arg(long)]
    on_demand: bool,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let size = Size {
        subscribers: arguments.subscribers.clamp(1, Size::FULL.nodes),
        changes: arguments.changes.max(1),
        rest: Duration::from_secs(arguments.rest.max(1)),
        restart: !arguments.without_restart,
        on_demand: arguments.on_demand,
        ..Size::FULL
    };
    let (_server, kubeconfig) = match arguments.kubeconfig {
        Some(kubeconfig) => (None, kubeconfig),
        None => {
            let server = ApiServer::start()?;
            let kubeconfig = server.kubeconfig().to_owned();
            (Some(server), kubeconfig)
        }
    };
    let api = Api::new(&kubeconfig).await?;
    let began = Instant::now();
    load(&api, &size).await?;
    eprintln!(
        "{} nodes, {} pods, {} services after {:.0} s: {}",
        size.nodes,
        size.pods(),
        size.services + 1,
        began.elapsed().as_secs_f64(),
        kubeconfig.display()
    );
    if arguments.hold {
        tokio::signal::ctrl_c().await?;
        return Ok(());
    }
    let own = std::env::current_exe()?;
    let binaries = own.parent().context("a program lies in a folder")?;
    let figures = measure(Bed {
        api: &api,
        size,
        binaries,
    })
    .await?;
    print!("{figures}");
    Ok(())
}
