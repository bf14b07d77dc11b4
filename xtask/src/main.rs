// SPDX-License-Identifier: Apache-2.0
//! What cargo alone cannot express: generated files, privileged tests, benches.

#![forbid(unsafe_code)]

mod bench;
mod cluster;
mod codegen;
mod docs;
mod fuzz;
mod image;
mod test;

use anyhow::{Context, ensure};
use clap::{Parser, Subcommand};
use std::path::{Path, PathBuf};
use std::process::{Command as Process, ExitCode};

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    about = "Build, generation, test and bench commands of Podveil"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Raw TCP, the plain path and the HBONE path side by side, in network namespaces. Needs root.
    Bench(bench::Arguments),
    /// Real Kubernetes on this machine, two nodes.
    #[command(subcommand)]
    Cluster(cluster::Action),
    /// Generate Rust from the .proto files; with --check only compare with what is committed.
    Codegen {
        #[arg(long)]
        check: bool,
    },
    /// Write docs/configuration.md from the configuration types; with --check only compare.
    Docs {
        #[arg(long)]
        check: bool,
    },
    /// Every fuzz target for a while (nightly Rust and cargo-fuzz).
    Fuzz(fuzz::Arguments),
    /// Container images in target/images, for `ctr -n k8s.io images import`. Needs neither a daemon nor a registry.
    Image(image::Arguments),
    /// Run the tests.
    Test {
        #[arg(value_enum, default_value_t = test::Which::All)]
        which: test::Which,
        /// Only tests whose name contains this.
        filter: Option<String>,
    },
}

/// The error's message and no backtrace, whatever the environment asks of panics: where a command failed says nothing that its
/// message does not, and it would stand below the message.
fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("Error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    match Arguments::parse().command {
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Cluster(action) => cluster::run(&action),
        Command::Codegen { check } => codegen::run(check),
        Command::Docs { check } => docs::run(check),
        Command::Fuzz(arguments) => fuzz::run(&arguments),
        Command::Image(arguments) => image::run(&arguments),
        Command::Test { which, filter } => test::run(which, filter.as_deref()),
    }
}

/// Builds every program as tests and demos run it. All at once, as `make build` does: a choice of packages has a choice of
/// features, with which everything would be compiled again.
///
/// # Errors
/// If one does not compile.
fn build_programs() -> anyhow::Result<()> {
    let status = Process::new(env!("CARGO"))
        .current_dir(workspace())
        .args(["build", "--workspace", "--bins"])
        .status()
        .context("starting cargo")?;
    ensure!(status.success(), "the programs cannot be built ({status})");
    Ok(())
}

/// The root of the checkout, from where this program was built.
fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask lies in the workspace")
        .to_owned()
}

/// Where cargo has put this program, and puts the others: `target`, or wherever it was told to.
fn target() -> anyhow::Result<PathBuf> {
    let program = std::env::current_exe().context("finding this program")?;
    // <target>/<profile>/xtask
    let folder = program.ancestors().nth(2);
    Ok(folder
        .context("this program lies in no target folder")?
        .to_owned())
}
