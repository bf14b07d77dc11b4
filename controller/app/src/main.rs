// SPDX-License-Identifier: Apache-2.0
//! The `podveil-controller` program.

use anyhow::Context;
use clap::{Parser, Subcommand};
use podveil_controller::{Config, Controller, OVERRIDES, parse_timeout, uninstall};
use podveil_program::{
    LogFormat, ProcessEnvironment, config, forbid_core_dumps, init_log, raise_descriptor_limit,
    shutdown_signal,
};
use std::path::PathBuf;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Returns freed memory to the system: when all nodes come at once, much is in use for a moment.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Tells every node what the cluster is and who is enrolled.
#[derive(Debug, Parser)]
#[command(version, subcommand_negates_reqs = true)]
struct Arguments {
    /// The configuration, a YAML file.
    #[arg(long, required = true)]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Lets go of every pod, and waits until all nodes have. For the uninstallation.
    Uninstall {
        /// As 90s, 4m or 1h; then the request is taken back.
        #[arg(long, value_parser = parse_timeout, default_value = "2m")]
        timeout: Duration,
        /// Done when every node has let go that can be heard; pods of the others stay captured.
        #[arg(long)]
        skip_silent: bool,
        /// Where Podveil is installed.
        #[arg(long, env = "POD_NAMESPACE", default_value = "podveil-system")]
        namespace: String,
    },
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    if let Some(Command::Uninstall {
        timeout,
        skip_silent,
        namespace,
    }) = arguments.command
    {
        init_log(LogFormat::default());
        let client = podveil_kube::client().await?;
        return uninstall(client, &namespace, timeout, skip_silent).await;
    }
    let config: Config = config::load(
        arguments.config.as_deref(),
        OVERRIDES,
        &[],
        &ProcessEnvironment,
    )?;
    init_log(config.log);
    forbid_core_dumps();
    raise_descriptor_limit();
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
