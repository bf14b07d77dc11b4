// SPDX-License-Identifier: Apache-2.0
use crate::workspace;
use anyhow::ensure;
use std::process::Command;

/// Of `podveil-scale`: see its `--help`.
#[derive(clap::Args)]
pub struct Arguments {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let mut cargo = Command::new(env!("CARGO"));
    cargo
        .current_dir(workspace())
        .args(["build", "--release", "--bins"]);
    for program in [
        "podveil-ca",
        "podveil-controller",
        "podveil-node",
        "podveil-scale",
    ] {
        cargo.args(["--package", program]);
    }
    ensure!(cargo.status()?.success(), "the release build failed");
    let scale = workspace().join("target/release/podveil-scale");
    let status = Command::new(scale).args(&arguments.arguments).status()?;
    ensure!(status.success(), "the bench failed");
    Ok(())
}
