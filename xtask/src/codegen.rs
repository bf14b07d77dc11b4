// SPDX-License-Identifier: Apache-2.0
//! Rust from the `.proto` files of `xds/proto`, and objects from the eBPF programs. The results are committed, so a build
//! needs neither a protobuf compiler nor clang.

mod objects;

use crate::workspace;
use anyhow::{Context, ensure};
use std::collections::BTreeMap;
use std::path::Path;

const FILES: &[&str] = &[
    "envoy/discovery.proto",
    "google/rpc/status.proto",
    "istio/ca/ca.proto",
    "istio/security/authorization.proto",
    "istio/workload/workload.proto",
    "istio/zds/zds.proto",
    "podveil/ca.proto",
    "podveil/node.proto",
];

/// Writes the generated code, or with `check` fails if what is committed differs from it.
pub fn run(check: bool) -> anyhow::Result<()> {
    protos(check)?;
    objects::run(check)
}

fn protos(check: bool) -> anyhow::Result<()> {
    let crate_dir = workspace().join("xds/proto");
    let committed = crate_dir.join("src/generated");
    let scratch = workspace().join("target/codegen");
    std::fs::create_dir_all(&scratch).context("making the scratch folder")?;
    for stale in read(&scratch)?.keys() {
        std::fs::remove_file(scratch.join(stale))?;
    }
    let descriptors =
        protox::compile(FILES, [crate_dir.join("proto")]).context("compiling the .proto files")?;
    tonic_prost_build::configure()
        .out_dir(&scratch)
        .btree_map(".")
        .compile_fds(descriptors)
        .context("generating Rust")?;
    // Formatted as the tree is, so that `cargo fmt --check` and this check agree.
    let status = std::process::Command::new("rustfmt")
        .args(["--edition", "2024", "--config-path"])
        .arg(workspace())
        .args(read(&scratch)?.keys().map(|name| scratch.join(name)))
        .status()?;
    ensure!(status.success(), "rustfmt failed on generated code");
    let (fresh, old) = (read(&scratch)?, read(&committed)?);
    if check {
        ensure!(
            fresh == old,
            "generated code differs from xds/proto/src/generated: run `cargo xtask codegen`"
        );
        return Ok(());
    }
    for name in old.keys() {
        std::fs::remove_file(committed.join(name))?;
    }
    for (name, text) in &fresh {
        std::fs::write(committed.join(name), text)?;
    }
    println!("{} files in {}", fresh.len(), committed.display());
    Ok(())
}

fn read(folder: &Path) -> anyhow::Result<BTreeMap<String, String>> {
    let mut files = BTreeMap::new();
    for entry in
        std::fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?
    {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.ends_with(".rs") {
            files.insert(name, std::fs::read_to_string(entry.path())?);
        }
    }
    Ok(files)
}
