// SPDX-License-Identifier: Apache-2.0
//! Tests by what they need: nothing, or root and network namespaces.

use crate::workspace;
use anyhow::{Context, bail, ensure};
use clap::ValueEnum;
use std::process::Command;

#[derive(Clone, Copy, Eq, PartialEq, ValueEnum)]
pub enum Which {
    All,
    /// Those marked `#[ignore = "netns"]`: root, real namespaces, the real programs.
    Netns,
    /// Those that need no privileges.
    Unit,
}

/// # Errors
/// If a test fails, or could not be set up: nothing passes by being skipped.
pub fn run(which: Which, filter: Option<&str>) -> anyhow::Result<()> {
    if which != Which::Netns {
        cargo(&["test", "--workspace", "--quiet"], filter, &[])?;
    }
    if which != Which::Unit {
        privileged(filter)?;
    }
    Ok(())
}

fn privileged(filter: Option<&str>) -> anyhow::Result<()> {
    let missing = podveil_sim::missing_tools();
    ensure!(
        missing.is_empty(),
        "the tests in network namespaces cannot run: {}",
        missing.join("; ")
    );
    let before = namespaces()?;
    cargo(&["build", "--workspace", "--bins"], None, &[])?;
    // One at a time: each has the machine's two cores and its clock to itself.
    cargo(
        &[
            "test",
            "--workspace",
            "--quiet",
            "--lib",
            "--bins",
            "--tests",
        ],
        filter,
        &["--ignored", "--test-threads=1"],
    )?;
    let after = namespaces()?;
    let left: Vec<&String> = after.iter().filter(|name| !before.contains(name)).collect();
    ensure!(
        left.is_empty(),
        "tests left network namespaces behind: {left:?}"
    );
    Ok(())
}

fn namespaces() -> anyhow::Result<Vec<String>> {
    let Ok(entries) = std::fs::read_dir("/run/netns") else {
        return Ok(Vec::new());
    };
    entries
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect()
}

fn cargo(arguments: &[&str], filter: Option<&str>, test_arguments: &[&str]) -> anyhow::Result<()> {
    let mut command = Command::new(env!("CARGO"));
    command
        .current_dir(workspace())
        .args(arguments)
        .args(filter);
    if !test_arguments.is_empty() {
        command.arg("--").args(test_arguments);
    }
    let status = command
        .status()
        .with_context(|| format!("starting {command:?}"))?;
    if !status.success() {
        bail!("{command:?} failed ({status})");
    }
    Ok(())
}
