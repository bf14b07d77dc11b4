// SPDX-License-Identifier: Apache-2.0
//! `podveil-ca --config FILE`

use clap::Parser;
use podveil_ca::{Config, OVERRIDES};
use podveil_program::{ProcessEnvironment, config, forbid_core_dumps, init_log, shutdown_signal};
use std::path::PathBuf;
use tokio_util::sync::CancellationToken;

/// Issues the certificates of workloads and of Podveil's own programs.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Configuration file (YAML).
    #[arg(long)]
    config: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let config: Config = config::load(
        arguments.config.as_deref(),
        OVERRIDES,
        &[],
        &ProcessEnvironment,
    )?;
    init_log(config.log);
    forbid_core_dumps();
    let stop = CancellationToken::new();
    let signalled = stop.clone();
    tokio::spawn(async move {
        let signal = shutdown_signal().await;
        tracing::info!(signal, "stopping");
        signalled.cancel();
    });
    podveil_ca::run(config, stop).await
}
