// SPDX-License-Identifier: Apache-2.0
use anyhow::{Context, ensure};
use std::ffi::OsStr;
use std::io::Write;
use std::process::{Command, Stdio};

/// Tools of the system that simulations and captures call, with the Debian package that brings each.
const TOOLS: &[(&str, &str)] = &[
    ("ip", "iproute2"),
    ("nft", "nftables"),
    ("nsenter", "util-linux"),
    ("setpriv", "util-linux"),
    ("curl", "curl"),
];

/// One line for each tool or privilege that is not here; empty when a simulation can start.
pub fn missing_tools() -> Vec<String> {
    let mut missing = Vec::new();
    if !nix::unistd::geteuid().is_root() {
        missing.push("this needs root: network namespaces and nftables are made".to_owned());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = |tool: &str| {
        std::env::split_paths(&path)
            .chain(["/usr/sbin".into(), "/sbin".into()])
            .any(|folder| folder.join(tool).is_file())
    };
    missing.extend(
        TOOLS
            .iter()
            .filter(|(tool, _)| !found(tool))
            .map(|(tool, package)| format!("{tool} is missing: apt-get install {package}")),
    );
    missing
}

/// Runs a command to its end.
///
/// # Errors
/// With the command and what it wrote to standard error, if it cannot be started or fails.
pub fn run<S: AsRef<OsStr>>(
    program: &str,
    arguments: impl IntoIterator<Item = S>,
) -> anyhow::Result<String> {
    run_with_input(program, arguments, "")
}

pub(crate) fn run_with_input<S: AsRef<OsStr>>(
    program: &str,
    arguments: impl IntoIterator<Item = S>,
    input: &str,
) -> anyhow::Result<String> {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command
        .spawn()
        .with_context(|| format!("starting {program}"))?;
    let mut stdin = child.stdin.take().expect("it was piped just above");
    // A command that does not read its input closes it; what it answers decides.
    if stdin.write_all(input.as_bytes()).is_err() {
        tracing::trace!(program, "a command closed its input early");
    }
    drop(stdin);
    let output = child.wait_with_output()?;
    ensure!(
        output.status.success(),
        "{command:?} failed ({}): {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Commands of `ip` in one go, in a namespace.
pub(crate) fn ip_batch(namespace: &str, lines: &[String]) -> anyhow::Result<()> {
    run_with_input(
        "ip",
        ["-n", namespace, "-batch", "-"],
        &(lines.join("\n") + "\n"),
    )
    .map(drop)
}
