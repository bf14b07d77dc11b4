// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask bench enrolment`: how long a new pod of an enrolled namespace is reached in plain.

use crate::cluster::checkout;
use crate::image;
use podveil_cluster::Cluster;
use podveil_cluster::enrolment::{first_tunnels, percentile};
use podveil_cluster::podveil::Podveil;

#[derive(clap::Args)]
pub struct Arguments {
    /// How many pods.
    #[arg(long, default_value_t = 200)]
    pods: usize,
    /// How many of them are made at once.
    #[arg(long, default_value_t = 10)]
    batch: usize,
    #[command(flatten)]
    image: image::Arguments,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let checkout = checkout()?;
    image::run(&arguments.image)?;
    let cluster = Cluster::up(&checkout.podveilctl)?;
    let podveil = Podveil::install(&cluster, &checkout, &[])?;
    let times = first_tunnels(&podveil, arguments.pods, arguments.batch)?;
    println!(
        "| from a pod's address being known to its first encrypted connection, {} pods, {} at once | ms |\n|---|---:|",
        times.len(),
        arguments.batch
    );
    for (name, share) in [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("longest", 1.0)] {
        println!(
            "| {name} | {:.0} |",
            percentile(&times, share).as_secs_f64() * 1e3
        );
    }
    println!("\nThe slowest:");
    for one in times.iter().rev().take(5) {
        println!("  {one:?}");
    }
    podveil.uninstall()
}
