// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask bench enrolment`: how long a new pod of an enrolled namespace is reached in plain.

use crate::cluster::checkout;
use crate::image;
use podveil_cluster::Cluster;
use podveil_cluster::enrolment::{Reached, Stages, first_tunnels, percentile};
use podveil_cluster::podveil::Podveil;
use std::fs;

#[derive(clap::Args)]
#[group(skip)]
pub struct Arguments {
    /// How many pods.
    #[arg(long, default_value_t = 200)]
    pods: usize,
    /// How many of them are made at once.
    #[arg(long, default_value_t = 10)]
    batch: usize,
    /// Chart values to install with, as `helm --set` takes them.
    #[arg(long)]
    set: Vec<String>,
    #[command(flatten)]
    image: image::Arguments,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let checkout = checkout()?;
    image::run(&arguments.image)?;
    let cluster = Cluster::up(&checkout.podveilctl)?;
    let set: Vec<String> = (arguments.set.iter())
        .map(|value| format!("--set={value}"))
        .collect();
    let set: Vec<&str> = set.iter().map(String::as_str).collect();
    let podveil = Podveil::install(&cluster, &checkout, &set)?;
    let times = first_tunnels(&podveil, arguments.pods, arguments.batch)?;
    let load = fs::read_to_string("/proc/loadavg")?;
    println!(
        "{} pods, {} at once; the machine's load was {}\n",
        times.len(),
        arguments.batch,
        load.split_whitespace().next().unwrap_or_default()
    );
    print_times(&times);
    let stages = Stages::read(&cluster)?;
    println!(
        "\n| step, ms after the API server's word of the address | p50 | p99 |\n|---|---:|---:|"
    );
    let told = times
        .iter()
        .map(|one| (one.pod.uid.clone(), one.pod.told))
        .collect();
    for (name, distances) in stages.since(&told) {
        let at = |share| percentile(&distances, share).copied().unwrap_or(f64::NAN);
        println!("| {name} | {:.0} | {:.0} |", at(0.5), at(0.99));
    }
    println!("\nThe slowest:");
    for one in times.iter().rev().take(5) {
        println!("  {one:?}");
    }
    podveil.uninstall()
}

fn print_times(times: &[Reached]) {
    let mut since_word: Vec<_> = times.iter().map(|one| one.after_word).collect();
    since_word.sort_unstable();
    let since: Vec<_> = times.iter().map(|one| one.after).collect();
    let ms = |sorted: &[std::time::Duration], share| {
        percentile(sorted, share).map_or(f64::NAN, |time| time.as_secs_f64() * 1e3)
    };
    println!("| to the first encrypted connection, ms, from | p50 | p90 | p99 | longest |");
    println!("|---|---:|---:|---:|---:|");
    for (name, sorted) in [
        ("the API server's word of the address", &since_word),
        (
            "that, or the application's listening where that is later",
            &since,
        ),
    ] {
        print!("| {name} |");
        for share in [0.5, 0.9, 0.99, 1.0] {
            print!(" {:.0} |", ms(sorted, share));
        }
        println!();
    }
}
