// SPDX-License-Identifier: Apache-2.0
//! `podveilctl`: a person's shell into Podveil.

#![forbid(unsafe_code)]

mod ca_admin;
mod demo;
mod rotate;
mod status;

use clap::{Parser, Subcommand};
use std::net::{Ipv6Addr, TcpListener};
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Parser)]
#[command(
    name = "podveilctl",
    version,
    about = "Look into Podveil and act on it"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Two simulated nodes with pods, the real programs, and a report of what holds. Needs root.
    Demo(demo::Arguments),
    /// Replace certificates, or root and certificates, and wait until every node uses the new ones.
    Rotate(rotate::Arguments),
    /// The CA's authorities, and which program uses which bundle and certificates.
    Status(status::Arguments),
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
    match run(Arguments::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("podveilctl: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Demo(arguments) => return demo::run(&arguments),
        Command::Rotate(arguments) => rotate::run(&arguments)?,
        Command::Status(arguments) => status::run(&arguments)?,
        Command::Janitor { folder } => podveil_sim::janitor(&folder),
        Command::Serve { port } => {
            podveil_sim::app::serve(&TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))?)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
