// SPDX-License-Identifier: Apache-2.0
//! The `podveil-controller` program.

use anyhow::Context;
use clap::Parser;
use podveil_controller::{Config, Controller, OVERRIDES};
use podveil_program::{ProcessEnvironment, config, forbid_core_dumps, init_log, shutdown_signal};
use std::path::PathBuf;
use tokio_util::sync::CancellationToken;

/// Tells every node what the cluster is and who is enrolled.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The configuration, a YAML file.
    #[arg(long)]
    config: PathBuf,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let config: Config =
        config::load(Some(&arguments.config), OVERRIDES, &[], &ProcessEnvironment)?;
    init_log(config.log);
    forbid_core_dumps();
    let stop = CancellationToken::new();
    let credentials = config.credentials(stop.clone())?;
    let controller = Controller::start(&config, credentials, stop.clone())
        .await
        .context("the controller cannot start")?;
    let stopped = tokio::select! {
        signal = shutdown_signal() => {
            tracing::info!(signal, "stopping");
            Ok(())
        }
        () = controller.ended() => Err(anyhow::anyhow!("the controller stopped by itself")),
    };
    stop.cancel();
    controller.ended().await;
    stopped
}
