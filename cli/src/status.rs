// SPDX-License-Identifier: Apache-2.0
//! `podveilctl status`: where everything stands.

mod human;
mod report;

use crate::ca::{CaStatus, Where};
use crate::cluster::installation;
use crate::failure::Outcome;
use crate::output::{Output, Progress};
use report::Filter;
use std::time::SystemTime;

#[derive(clap::Args)]
pub struct Arguments {
    /// Only pods of this namespace, or this pod (`NAMESPACE/POD`).
    #[arg(value_name = "NAMESPACE[/POD]")]
    of: Option<String>,
    /// Also pods that nobody asked to enrol.
    #[arg(long, short = 'A')]
    all: bool,
    /// With `--socket`: only what the CA says.
    #[command(flatten)]
    ca: Where,
    #[command(flatten)]
    output: Output,
}

pub async fn run(arguments: &Arguments) -> anyhow::Result<Outcome> {
    if arguments.ca.socket.is_some() {
        let status: CaStatus = arguments.ca.connect().await?.status().await?;
        arguments.output.print(&status, human::ca)?;
        return Ok(Outcome::Good);
    }
    let cluster = arguments.ca.access.cluster().await?;
    let mut progress = Progress::new();
    let installation = installation::look(&cluster, &mut progress).await?;
    drop(progress);
    let filter = Filter::new(arguments.of.as_deref(), arguments.all);
    if let Ok(controller) = &installation.controller {
        filter.known(controller)?;
    }
    let report = report::report(&installation, &filter, SystemTime::now());
    arguments.output.print(&report, human::status)?;
    Ok(Outcome::Good)
}
