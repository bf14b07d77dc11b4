// SPDX-License-Identifier: Apache-2.0
//! Every fuzz target for a while. They lie beside the crates that they feed, each in a workspace of its own.

use crate::workspace;
use anyhow::{Context, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;

#[derive(clap::Args)]
pub struct Arguments {
    /// Seconds for each target.
    #[arg(long, default_value_t = 30)]
    seconds: u32,
    /// Only targets whose name contains this.
    filter: Option<String>,
}

/// # Errors
/// If a target finds something, or cannot be built.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let mut run = 0;
    for folder in folders(&workspace(), 3)? {
        for entry in std::fs::read_dir(folder.join("fuzz_targets"))? {
            let path = entry?.path();
            let target = path
                .file_stem()
                .context("a target without a name")?
                .to_string_lossy()
                .into_owned();
            if arguments
                .filter
                .as_ref()
                .is_some_and(|filter| !target.contains(filter))
            {
                continue;
            }
            println!("{target}: {} s", arguments.seconds);
            let status = Command::new("cargo")
                .args(["+nightly", "fuzz", "run", "--fuzz-dir"])
                .arg(&folder)
                .args(["--target-dir", "target/fuzz", &target, "--"])
                .args([
                    format!("-max_total_time={}", arguments.seconds),
                    "-verbosity=0".to_owned(),
                ])
                .current_dir(workspace())
                .status()
                .context(
                    "starting cargo fuzz: `cargo install cargo-fuzz`, and a nightly toolchain",
                )?;
            ensure!(
                status.success(),
                "{target} found something: its input is in {}/artifacts",
                folder.display()
            );
            run += 1;
        }
    }
    ensure!(run > 0, "no fuzz target has such a name");
    Ok(())
}

fn folders(under: &Path, depth: u32) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(under)? {
        let path = entry?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if !path.is_dir() || name == "target" || name.starts_with('.') {
            continue;
        }
        if name == "fuzz" && path.join("Cargo.toml").is_file() {
            found.push(path);
        } else if depth > 1 {
            found.extend(folders(&path, depth - 1)?);
        }
    }
    found.sort();
    Ok(found)
}
