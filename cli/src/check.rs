// SPDX-License-Identifier: Apache-2.0
//! `podveilctl check`: is the installation well, or with `--pre`: would one go well here? Gathering is apart from
//! judging: what was gathered is judged by pure functions, one file for each topic.

mod finding;
mod installed;
mod metrics;
mod pre;

use finding::Finding;

use crate::cluster::{Access, installation};
use crate::failure::Outcome;
use crate::output::{Output, Progress};
use std::time::SystemTime;

#[derive(clap::Args)]
pub struct Arguments {
    /// Before the installation: nodes, network, other meshes, permissions, and what a label would break.
    #[arg(long)]
    pre: bool,
    /// With `--pre`: judge as if this namespace were enrolled too. May be repeated.
    #[arg(long, value_name = "NAMESPACE", requires = "pre")]
    enrol: Vec<String>,
    /// With `--pre`: judge as if this namespace were enrolled and strict too. May be repeated.
    #[arg(long, value_name = "NAMESPACE", requires = "pre")]
    strict: Vec<String>,
    #[command(flatten)]
    access: Access,
    #[command(flatten)]
    output: Output,
}

/// [`Outcome::Bad`] if anything is a problem. Warnings are told and are none.
pub async fn run(arguments: &Arguments) -> anyhow::Result<Outcome> {
    let cluster = arguments.access.cluster().await?;
    let mut progress = Progress::new();
    let findings = if arguments.pre {
        let survey =
            pre::survey(&cluster, &arguments.enrol, &arguments.strict, &mut progress).await?;
        pre::judge(&survey)
    } else {
        let installation = installation::look(&cluster, &mut progress).await?;
        let counters = metrics::counters(&cluster, &installation.programs, &mut progress).await;
        installed::judge(&installation, &counters, SystemTime::now())
    };
    drop(progress);
    let report = finding::Report::new(findings);
    arguments.output.print(&report, finding::human)?;
    Ok(Outcome::good_if(report.problems == 0))
}
