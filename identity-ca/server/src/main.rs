// SPDX-License-Identifier: Apache-2.0
//! `podveil-ca --config FILE`, and `podveil-ca admin-stdio` beside it.

use anyhow::Context;
use clap::{Parser, Subcommand};
use podveil_ca::{Config, DEFAULT_ADMIN_SOCKET, OVERRIDES};
use podveil_program::{
    ProcessEnvironment, config, forbid_core_dumps, init_log, raise_descriptor_limit,
    shutdown_signal,
};
use std::path::PathBuf;
use tokio_util::sync::CancellationToken;

/// Issues the certificates of workloads and of Podveil's own programs.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Configuration file (YAML).
    #[arg(long)]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Connects standard input and output to the admin socket of the CA that runs here: what `podveilctl` calls through
    /// the Kubernetes API's exec.
    AdminStdio {
        #[arg(long, default_value = DEFAULT_ADMIN_SOCKET)]
        socket: PathBuf,
    },
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    match arguments.command {
        Some(Command::AdminStdio { socket }) => podveil_ca::admin_stdio(&socket)
            .with_context(|| format!("the admin socket {}", socket.display())),
        None => run(arguments.config),
    }
}

#[tokio::main]
async fn run(file: Option<PathBuf>) -> anyhow::Result<()> {
    let config: Config = config::load(file.as_deref(), OVERRIDES, &[], &ProcessEnvironment)?;
    init_log(config.log);
    forbid_core_dumps();
    raise_descriptor_limit();
    let stop = CancellationToken::new();
    let signalled = stop.clone();
    tokio::spawn(async move {
        let signal = shutdown_signal().await;
        tracing::info!(signal, "stopping");
        signalled.cancel();
    });
    podveil_ca::run(config, stop).await
}
