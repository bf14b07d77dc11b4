// SPDX-License-Identifier: Apache-2.0
//! `podveilctl config dump`: what a program knows, as it says it.

use crate::cluster::{
    ADMIN_PORT, Access, Cluster, Program, ProgramPod, Programs, REDIRECT_ADMIN_PORT,
};
use crate::failure::{Failure, Outcome};
use crate::output::Output;
use clap::{Subcommand, ValueEnum};
use serde_json::Value;

#[derive(clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// The whole state of one program: its configuration, and for the proxy workloads, services, policies and
    /// certificates in the shape that istioctl reads. Never a private key.
    Dump(Dump),
}

#[derive(clap::Args)]
struct Dump {
    /// A node; without one, the controller.
    node: Option<String>,
    /// Which of the node's programs.
    #[arg(long, value_enum, default_value_t = Module::Proxy, requires = "node")]
    module: Module,
    #[command(flatten)]
    access: Access,
}

#[derive(Clone, Copy, ValueEnum)]
enum Module {
    Proxy,
    Redirect,
}

pub async fn run(arguments: &Arguments) -> anyhow::Result<Outcome> {
    let Command::Dump(dump) = &arguments.command;
    let cluster = dump.access.cluster().await?;
    let value = self::dump(&cluster, dump).await?;
    Output::JSON.print(&value, |_| String::new())?;
    Ok(Outcome::Good)
}

async fn dump(cluster: &Cluster, dump: &Dump) -> anyhow::Result<Value> {
    let programs = cluster.programs().await?;
    let Some(node) = &dump.node else {
        let controllers = programs.controllers();
        let pod = controllers
            .first()
            .ok_or_else(|| none(cluster, Program::Controller))?;
        return cluster.get_json(&pod.name, ADMIN_PORT, "/status").await;
    };
    let port = match dump.module {
        Module::Proxy => ADMIN_PORT,
        Module::Redirect => REDIRECT_ADMIN_PORT,
    };
    let pod = node_program(cluster, &programs, node)?;
    cluster.get_json(&pod.name, port, "/config_dump").await
}

/// The program on this node.
///
/// # Errors
/// If there is none, with the nodes that have one.
pub fn node_program<'a>(
    cluster: &Cluster,
    programs: &'a Programs,
    node: &str,
) -> Result<&'a ProgramPod, Failure> {
    programs.on_node(node).ok_or_else(|| {
        let nodes: Vec<_> = programs
            .of(Program::Node)
            .filter_map(|pod| pod.node.as_deref())
            .collect();
        if nodes.is_empty() {
            return none(cluster, Program::Node);
        }
        Failure::new(
            format!("no pod of podveil-node runs on node {node:?}"),
            format!("one of: {}", nodes.join(", ")),
        )
    })
}

fn none(cluster: &Cluster, program: Program) -> Failure {
    Failure::new(
        format!(
            "no pod of {} runs in namespace {}",
            program.service_account(),
            cluster.namespace
        ),
        "`podveilctl check`; another namespace is named by `-n`",
    )
}
