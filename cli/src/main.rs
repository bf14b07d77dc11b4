// SPDX-License-Identifier: Apache-2.0
//! `podveilctl`: a person's shell into Podveil; `kubectl podveil` where it is found as `kubectl-podveil`.

#![forbid(unsafe_code)]

mod ca;
mod check;
mod cluster;
mod config;
mod demo;
mod docs;
mod explain;
mod failure;
mod output;
mod rotate;
mod status;

use anyhow::Context;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use failure::Outcome;
use std::net::{Ipv6Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::SystemTime;

/// Look into Podveil and act on it.
#[derive(Parser)]
#[command(name = "podveilctl", version, after_long_help = EXIT_CODES)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "\
Exit codes:
  0  done, and nothing is wrong
  1  could not be done; the message says what, why and what to try
  2  the command line is wrong
  3  done, and what was looked at is not as it should be: a check found a problem, a connection would be refused";

#[derive(Subcommand)]
enum Command {
    /// Is the installation well? With `--pre`: would one go well on this cluster?
    Check(check::Arguments),
    /// Show what a program of Podveil knows, as JSON.
    Config(config::Arguments),
    /// Two simulated nodes with pods, the real programs, and a report of what holds. Needs root.
    Demo(demo::Arguments),
    /// What would become of a connection, and which object decides.
    Explain(explain::Arguments),
    /// Replace certificates, or root and certificates, and wait until every node uses the new ones.
    Rotate(rotate::Arguments),
    /// Where nodes, pods and certificates stand, and why a pod is not captured.
    Status(status::Arguments),
    /// `docs/podveilctl.md`.
    #[command(hide = true)]
    Docs,
    /// Waits until standard input ends, then removes what a simulation left. Started by the simulation.
    #[command(hide = true)]
    Janitor { folder: PathBuf },
    /// The application of a simulated pod.
    #[command(hide = true)]
    Serve { port: u16 },
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn".into()),
        )
        .with_writer(std::io::stderr)
        .init();
    let name = called_as(std::env::args_os().next().as_deref().map(Path::new));
    let matches = Arguments::command().bin_name(name).get_matches();
    let arguments = Arguments::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    match run(arguments.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("{name}: {}", failure::describe(&error));
            ExitCode::from(failure::ERROR)
        }
    }
}

/// kubectl finds its plugins by file name, and people type them as its commands.
fn called_as(program: Option<&Path>) -> &'static str {
    let stem = program.and_then(|path| path.file_stem()?.to_str());
    match stem {
        Some("kubectl-podveil") => "kubectl podveil",
        _ => "podveilctl",
    }
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    let outcome = match command {
        Command::Demo(arguments) => return demo::run(&arguments),
        Command::Check(arguments) => runtime()?.block_on(check::run(&arguments))?,
        Command::Config(arguments) => runtime()?.block_on(config::run(&arguments))?,
        Command::Docs => {
            print!("{}", docs::page(&Arguments::command()));
            Outcome::Good
        }
        Command::Explain(arguments) => runtime()?.block_on(explain::run(&arguments))?,
        Command::Rotate(arguments) => runtime()?.block_on(rotate::run(&arguments))?,
        Command::Status(arguments) => runtime()?.block_on(status::run(&arguments))?,
        Command::Janitor { folder } => {
            podveil_sim::janitor(&folder);
            Outcome::Good
        }
        Command::Serve { port } => {
            let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))?;
            println!("{}", podveil_sim::app::listens_since(SystemTime::now()));
            podveil_sim::app::serve(&listener)?;
            Outcome::Good
        }
    };
    Ok(outcome.into())
}

/// A runtime for one command.
///
/// # Errors
/// If the system gives no event queue.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the runtime")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn a_kubectl_plugin_calls_itself_as_kubectl_does() {
        for (program, name) in [
            ("/usr/local/bin/kubectl-podveil", "kubectl podveil"),
            ("target/debug/podveilctl", "podveilctl"),
            ("", "podveilctl"),
        ] {
            assert_eq!(called_as(Some(Path::new(program))), name);
        }
        assert_eq!(called_as(None), "podveilctl");
    }
}
