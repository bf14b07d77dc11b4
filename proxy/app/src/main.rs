// SPDX-License-Identifier: Apache-2.0
//! `podveil-node`: the node program. One module a process; see `docs/configuration.md`.

#![forbid(unsafe_code)]

use anyhow::Context;
use clap::{Parser, Subcommand};
use podveil_node::config::{Module, NodeConfig};
use podveil_node::supervisor::{self, Supervisor};
use podveil_node::{log, proxy, ready, redirect};
use podveil_program::{
    ProcessEnvironment, forbid_core_dumps, raise_descriptor_limit, shutdown_signal,
};
use std::num::NonZero;
use std::path::PathBuf;
use tokio_util::sync::CancellationToken;

/// Returns freed memory to the system and does not fragment under many small connections, as the system's does.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Podveil's node program.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The configuration file; without one the environment says everything.
    #[arg(long, global = true)]
    config: Option<PathBuf>,
    /// Do nothing but run the module in a process of its own, and start that again at once whenever it is killed.
    #[arg(long)]
    supervise: bool,
    /// The supervisor that has started this process.
    #[arg(long, hide = true)]
    parent: Option<i32>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Clone, Debug, Subcommand)]
enum Command {
    /// Ask a program at its `readiness_socket` whether it is ready, and end with 0 if it is.
    Ready { socket: PathBuf },
    /// Take every rule, socket, folder and cgroup of this node out again, then end.
    Teardown,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let teardown = match arguments.command {
        // Without a configuration: that of the next program may be there already.
        Some(Command::Ready { socket }) => return ready::ask(&socket),
        Some(Command::Teardown) => true,
        None => false,
    };
    let config = NodeConfig::load(arguments.config.as_deref(), &ProcessEnvironment)?;
    log::init(config.log).context("the log cannot be written")?;
    forbid_core_dumps();
    if let Some(parent) = arguments.parent {
        supervisor::end_with(parent)?;
    }
    if arguments.supervise {
        return supervise();
    }
    let module = config.module()?;
    if module == Module::Redirect || teardown {
        podveil_netns::cgroup::enter_host_namespace()?;
    }
    let descriptors = raise_descriptor_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers(&config))
        .enable_all()
        .build()
        .context("the runtime cannot be started")?;
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        node = %config.node,
        ?module,
        descriptors,
        "podveil-node starts"
    );
    let result = runtime.block_on(run(config, module, teardown));
    // Nothing that still blocks may hold up the end.
    runtime.shutdown_background();
    log::flush();
    result
}

/// One thread, which starts the program and lives until the end.
fn supervise() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("the runtime cannot be started")?;
    let arguments = std::env::args_os().skip(1);
    let supervisor = Supervisor::new(arguments.filter(|one| one != "--supervise"))?;
    let result = runtime.block_on(supervisor.run());
    log::flush();
    result
}

async fn run(config: NodeConfig, module: Module, teardown: bool) -> anyhow::Result<()> {
    let stop = CancellationToken::new();
    tokio::spawn({
        let stop = stop.clone();
        async move {
            let signal = shutdown_signal().await;
            tracing::info!(signal, "asked to stop");
            stop.cancel();
        }
    });
    match (teardown, module) {
        (true, _) => redirect::teardown(&config).await,
        (false, Module::Proxy) => {
            // Before the first socket: a socket belongs to the cgroup of whoever made it.
            let joined = config.cgroup().and_then(|cgroup| cgroup.join());
            joined.context("the proxy's cgroup cannot be joined")?;
            proxy::run(config, stop).await
        }
        (false, Module::Redirect) => redirect::run(config, stop).await,
    }
}

fn workers(config: &NodeConfig) -> usize {
    let available = std::thread::available_parallelism().map_or(1, NonZero::get);
    config.worker_threads.unwrap_or(available).max(2)
}
