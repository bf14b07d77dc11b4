// SPDX-License-Identifier: Apache-2.0
//! Images for the cluster's own use, as docker archives that `ctr images import` takes: no daemon, no registry.

use crate::tools::{self, Tool};
use anyhow::Context;
use podveil_sim::run;
use serde_json::json;
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};

/// A shell, curl, and `podveilctl`, whose `serve` is the application of test pods.
pub const APP_IMAGE: &str = "podveil.test/app:1";
pub(crate) const PAUSE_IMAGE: &str = "podveil.test/pause:1";
pub(crate) const DNS_IMAGE: &str = "podveil.test/coredns:1";

const SUITE: &str = "bookworm";
const PACKAGES: &str = "coreutils,curl,dash,libc-bin,libgcc-s1";

/// Writes the archives into `folder`, for a `podveilctl` that is built already.
pub(crate) fn make(folder: &Path, podveilctl: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let base = base()?;
    let app = layer(folder, "app", &[(podveilctl, "usr/bin/podveilctl")])?;
    let dns = layer(folder, "dns", &[(&tools::path(Tool::Coredns)?, "coredns")])?;
    Ok(vec![
        archive(folder, APP_IMAGE, &[&base, &app], &["/usr/bin/podveilctl"])?,
        archive(folder, PAUSE_IMAGE, &[&base], &["/bin/sleep", "infinity"])?,
        archive(folder, DNS_IMAGE, &[&dns], &["/coredns"])?,
    ])
}

/// A small Debian, made once a machine.
fn base() -> anyhow::Result<PathBuf> {
    let name: String = Sha256::digest(format!("{SUITE} {PACKAGES}"))[..8]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let folder = tools::cache()?.join("images");
    fs::create_dir_all(&folder)?;
    let path = folder.join(format!("{name}.tar"));
    if !path.is_file() {
        let unfinished = folder.join(format!("{name}.{}.tar", std::process::id()));
        run(
            "mmdebstrap",
            [
                "--quiet",
                "--variant=extract",
                &format!("--include={PACKAGES}"),
                SUITE,
                &unfinished.to_string_lossy(),
            ],
        )
        .context("making the root of the test image")?;
        fs::rename(&unfinished, &path)?;
    }
    Ok(path)
}

fn layer(folder: &Path, name: &str, files: &[(&Path, &str)]) -> anyhow::Result<PathBuf> {
    let root = folder.join(format!("{name}.root"));
    for (from, to) in files {
        let to = root.join(to);
        fs::create_dir_all(to.parent().context("a file lies in a folder")?)?;
        fs::copy(from, &to).with_context(|| format!("copying {}", from.display()))?;
    }
    let path = folder.join(format!("{name}.layer.tar"));
    run(
        "tar",
        [
            "--create",
            "--owner=0",
            "--group=0",
            &format!("--file={}", path.display()),
            &format!("--directory={}", root.display()),
            ".",
        ],
    )?;
    fs::remove_dir_all(&root)?;
    Ok(path)
}

fn archive(
    folder: &Path,
    tag: &str,
    layers: &[&Path],
    entrypoint: &[&str],
) -> anyhow::Result<PathBuf> {
    let name = tag.replace(['/', ':'], "_");
    let root = folder.join(format!("{name}.archive"));
    fs::create_dir_all(&root)?;
    let (mut names, mut digests) = (Vec::new(), Vec::new());
    for layer in layers {
        let digest = run("sha256sum", [layer])?;
        let digest = digest.split_whitespace().next().context("a digest")?;
        let name = format!("{digest}.tar");
        fs::copy(layer, root.join(&name))?;
        names.push(name);
        digests.push(format!("sha256:{digest}"));
    }
    let config = json!({
        "architecture": match std::env::consts::ARCH { "aarch64" => "arm64", _ => "amd64" },
        "os": "linux",
        "config": {"Entrypoint": entrypoint, "Env": ["PATH=/usr/bin:/bin"]},
        "rootfs": {"type": "layers", "diff_ids": digests},
    });
    fs::write(root.join("config.json"), config.to_string())?;
    let manifest = json!([{"Config": "config.json", "RepoTags": [tag], "Layers": names}]);
    fs::write(root.join("manifest.json"), manifest.to_string())?;
    let path = folder.join(format!("{name}.tar"));
    run(
        "tar",
        [
            "--create",
            &format!("--file={}", path.display()),
            &format!("--directory={}", root.display()),
            ".",
        ],
    )?;
    fs::remove_dir_all(&root)?;
    Ok(path)
}
