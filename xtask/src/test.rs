// SPDX-License-Identifier: Apache-2.0
//! Tests by what they need: nothing, or root and network namespaces, or real Kubernetes on this machine too; and those that
//! are too long for every change.

mod failures;
mod marked;

use crate::{image, workspace};
use anyhow::{Context, bail, ensure};
use clap::ValueEnum;
use std::io::BufReader;
use std::path::Path;
use std::process::{Command, Stdio};

#[derive(Clone, Copy, Eq, PartialEq, ValueEnum)]
pub enum Which {
    /// All but those marked `#[ignore = "all"]`.
    All,
    /// Those too: whole matrices, which `make test` has one of each kind of.
    Everything,
    /// Those marked `#[ignore = "netns"]` or `#[ignore = "cluster"]`: root, real namespaces, the real programs, Kubernetes.
    Netns,
    /// Those that need no privileges.
    Unit,
}

/// # Errors
/// If a test fails, or could not be set up: nothing passes by being skipped.
pub fn run(which: Which, filter: Option<&str>) -> anyhow::Result<()> {
    // By itself, with cargo's own progress: it takes minutes, and what runs below is quiet until something fails.
    cargo(&["test", "--workspace", "--no-run"], None, &[])?;
    if which != Which::Netns {
        cargo(
            &["test", "--workspace", "--quiet", "--no-fail-fast"],
            filter,
            &[],
        )?;
    }
    if which != Which::Unit {
        privileged(filter, which == Which::Everything)?;
    }
    Ok(())
}

fn privileged(filter: Option<&str>, everything: bool) -> anyhow::Result<()> {
    let missing = podveil_cluster::missing_programs();
    ensure!(
        missing.is_empty(),
        "the tests in network namespaces and on a cluster cannot run: {}",
        missing.join("; ")
    );
    // Nothing is skipped: without Go this says so, and ends.
    podveil_cluster::tools::ensure().context("building Kubernetes for the cluster tests")?;
    let before = things()?;
    // Builds the programs too.
    image::run(&image::Arguments::dev())?;
    let mut test_arguments = vec!["--ignored", "--test-threads=1"];
    let long = marked::names(&workspace(), "all")?;
    if !everything {
        for name in &long {
            test_arguments.extend(["--skip", name]);
        }
    }
    // One at a time: each has the machine's two cores and its clock to itself.
    cargo(
        &[
            "test",
            "--workspace",
            "--quiet",
            // One run tells of everything that is broken.
            "--no-fail-fast",
            "--lib",
            "--bins",
            "--tests",
        ],
        filter,
        &test_arguments,
    )?;
    if everything {
        // Whatever holds between the programs holds where nodes hold a part of the cluster.
        let again = [
            "test",
            "--package",
            "podveil-interop-tests",
            "--test",
            "netns",
        ];
        let ignored = ["--ignored", "--test-threads=1"];
        cargo_with(&[("PODVEIL_ON_DEMAND", "true")], &again, filter, &ignored)?;
    }
    let after = things()?;
    let left: Vec<&String> = after.iter().filter(|name| !before.contains(name)).collect();
    ensure!(left.is_empty(), "tests left something behind: {left:?}");
    Ok(())
}

/// What tests make and must remove: network namespaces, cgroups of clusters, folders of API servers and clusters.
fn things() -> anyhow::Result<Vec<String>> {
    let temporary = std::env::temp_dir();
    let mut found = Vec::new();
    for (folder, beginning) in [
        (Path::new("/run/netns"), ""),
        (Path::new("/sys/fs/cgroup/unified"), "bed"),
        (Path::new("/sys/fs/cgroup"), "bed"),
        (Path::new("/sys/class/net"), "bed"),
        (&temporary, "podveil-"),
    ] {
        let Ok(entries) = std::fs::read_dir(folder) else {
            continue;
        };
        for entry in entries {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with(beginning) {
                found.push(path.display().to_string());
            }
        }
    }
    Ok(found)
}

fn cargo(arguments: &[&str], filter: Option<&str>, test_arguments: &[&str]) -> anyhow::Result<()> {
    cargo_with(&[], arguments, filter, test_arguments)
}

fn cargo_with(
    environment: &[(&str, &str)],
    arguments: &[&str],
    filter: Option<&str>,
    test_arguments: &[&str],
) -> anyhow::Result<()> {
    let mut command = Command::new(env!("CARGO"));
    command
        .current_dir(workspace())
        .envs(environment.iter().copied())
        .args(arguments)
        .args(filter);
    if !test_arguments.is_empty() {
        command.arg("--").args(test_arguments);
    }
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {command:?}"))?;
    let output = child.stdout.take().expect("was piped");
    let failures = failures::forward(BufReader::new(output), std::io::stdout())
        .context("passing the output of the tests on")?;
    let status = child.wait().context("waiting for cargo")?;
    for failure in failures {
        eprintln!("{failure}");
    }
    if !status.success() {
        bail!("{command:?} failed ({status})");
    }
    Ok(())
}
