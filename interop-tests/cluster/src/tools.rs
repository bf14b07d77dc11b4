// SPDX-License-Identifier: Apache-2.0
//! The programs of Kubernetes, from pinned Go modules, each built once and kept outside the tree.
//!
//! The cache is `$PODVEIL_CACHE` (else `~/.cache/podveil`), in it `tools/<module>-<hash of go.mod, go.sum and flags>/`:
//! another version or flag is another folder, and nothing is ever built into one that is in use.

use anyhow::{Context, bail, ensure};
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The oldest Go that builds them all.
const GO: (u32, u32, u32) = (1, 26, 6);
const STRIPPED: &str = "-s -w";
/// Without a version clients cannot parse what the server says of itself.
const KUBERNETES_FLAGS: &str = "-s -w \
    -X k8s.io/component-base/version.gitVersion=v1.36.3 \
    -X k8s.io/component-base/version.gitMajor=1 \
    -X k8s.io/component-base/version.gitMinor=36";

/// A program that can be had with [`path`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Tool {
    CniHostLocal,
    CniLoopback,
    CniPortmap,
    CniPtp,
    Containerd,
    ContainerdShim,
    Coredns,
    Ctr,
    Etcd,
    Helm,
    KubeApiserver,
    KubeControllerManager,
    KubeProxy,
    KubeScheduler,
    Kubectl,
    Kubelet,
}

/// What an API server alone needs.
pub const API: [Tool; 3] = [Tool::Etcd, Tool::KubeApiserver, Tool::KubeControllerManager];

/// In the order in which they are built: what most tests wait for comes first.
pub const ALL: [Tool; 16] = [
    Tool::Etcd,
    Tool::KubeApiserver,
    Tool::KubeControllerManager,
    Tool::Kubectl,
    Tool::KubeScheduler,
    Tool::Kubelet,
    Tool::KubeProxy,
    Tool::Containerd,
    Tool::ContainerdShim,
    Tool::Ctr,
    Tool::CniHostLocal,
    Tool::CniLoopback,
    Tool::CniPortmap,
    Tool::CniPtp,
    Tool::Coredns,
    Tool::Helm,
];

impl Tool {
    /// The folder under `tools/` that pins it, its package, and the name of its file.
    const fn source(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::CniHostLocal => (
                "cni",
                "github.com/containernetworking/plugins/plugins/ipam/host-local",
                "host-local",
            ),
            Self::CniLoopback => (
                "cni",
                "github.com/containernetworking/plugins/plugins/main/loopback",
                "loopback",
            ),
            Self::CniPortmap => (
                "cni",
                "github.com/containernetworking/plugins/plugins/meta/portmap",
                "portmap",
            ),
            Self::CniPtp => (
                "cni",
                "github.com/containernetworking/plugins/plugins/main/ptp",
                "ptp",
            ),
            Self::Containerd => (
                "containerd",
                "github.com/containerd/containerd/v2/cmd/containerd",
                "containerd",
            ),
            Self::ContainerdShim => (
                "containerd",
                "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2",
                "containerd-shim-runc-v2",
            ),
            Self::Coredns => ("coredns", "github.com/coredns/coredns", "coredns"),
            Self::Ctr => (
                "containerd",
                "github.com/containerd/containerd/v2/cmd/ctr",
                "ctr",
            ),
            Self::Etcd => ("etcd", "go.etcd.io/etcd/server/v3", "etcd"),
            Self::Helm => ("helm", "helm.sh/helm/v4/cmd/helm", "helm"),
            Self::KubeApiserver => (
                "kubernetes",
                "k8s.io/kubernetes/cmd/kube-apiserver",
                "kube-apiserver",
            ),
            Self::KubeControllerManager => (
                "kubernetes",
                "k8s.io/kubernetes/cmd/kube-controller-manager",
                "kube-controller-manager",
            ),
            Self::KubeProxy => (
                "kubernetes",
                "k8s.io/kubernetes/cmd/kube-proxy",
                "kube-proxy",
            ),
            Self::KubeScheduler => (
                "kubernetes",
                "k8s.io/kubernetes/cmd/kube-scheduler",
                "kube-scheduler",
            ),
            Self::Kubectl => ("kubernetes", "k8s.io/kubernetes/cmd/kubectl", "kubectl"),
            Self::Kubelet => ("kubernetes", "k8s.io/kubernetes/cmd/kubelet", "kubelet"),
        }
    }

    fn flags(self) -> &'static str {
        match self.source().0 {
            "kubernetes" => KUBERNETES_FLAGS,
            _ => STRIPPED,
        }
    }
}

/// Builds whatever is not in the cache yet: the first time some twenty minutes on two cores, then nothing.
///
/// # Errors
/// If Go is missing or too old, or a build fails.
pub fn ensure() -> anyhow::Result<()> {
    ALL.into_iter().try_for_each(|tool| path(tool).map(drop))
}

/// Those that [`ensure`] would have to build.
///
/// # Errors
/// If the pinned modules cannot be read.
pub fn missing() -> anyhow::Result<Vec<Tool>> {
    let mut missing = Vec::new();
    for tool in ALL {
        if !folder(tool)?.join(tool.source().2).is_file() {
            missing.push(tool);
        }
    }
    Ok(missing)
}

/// Where the program lies; built first if it is not there.
///
/// # Errors
/// If Go is missing or too old, or the build fails.
pub fn path(tool: Tool) -> anyhow::Result<PathBuf> {
    let (_, _, name) = tool.source();
    let folder = folder(tool)?;
    let path = folder.join(name);
    if !path.is_file() {
        build(tool, &folder, &path).with_context(|| format!("building {name}"))?;
    }
    Ok(path)
}

fn modules() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tools")
}

fn folder(tool: Tool) -> anyhow::Result<PathBuf> {
    let (module, _, _) = tool.source();
    let mut hash = Sha256::new();
    for file in ["go.mod", "go.sum"] {
        let path = modules().join(module).join(file);
        hash.update(fs::read(&path).with_context(|| format!("reading {}", path.display()))?);
    }
    hash.update(tool.flags());
    let digest = hash.finalize();
    let short: String = digest[..8]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    Ok(cache()?.join("tools").join(format!("{module}-{short}")))
}

/// The folder of everything that is built once a machine.
///
/// # Errors
/// If neither `PODVEIL_CACHE` nor `HOME` is set.
pub fn cache() -> anyhow::Result<PathBuf> {
    if let Some(cache) = std::env::var_os("PODVEIL_CACHE") {
        return Ok(cache.into());
    }
    let home = std::env::var_os("HOME").context("neither PODVEIL_CACHE nor HOME is set")?;
    Ok(Path::new(&home).join(".cache/podveil"))
}

fn build(tool: Tool, folder: &Path, path: &Path) -> anyhow::Result<()> {
    check_go()?;
    let (module, package, name) = tool.source();
    fs::create_dir_all(folder)?;
    // Two tests that need the same program build it once.
    let lock = fs::File::create(folder.join(".lock"))?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, error)| error)?;
    if path.is_file() {
        return Ok(());
    }
    eprintln!("building {name} (once; kept in {})", folder.display());
    let unfinished = folder.join(format!("{name}.unfinished"));
    // Gently: whoever works on this machine comes first.
    let output = Command::new("nice")
        .args(["-n", "5", "go", "build", "-trimpath", "-buildvcs=false"])
        .args(["-ldflags", tool.flags(), "-o"])
        .arg(&unfinished)
        .arg(package)
        .current_dir(modules().join(module))
        .env("CGO_ENABLED", "0")
        .env("GOTOOLCHAIN", "local")
        .output()
        .context("starting go")?;
    ensure!(
        output.status.success(),
        "go build {package} failed ({}): {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    fs::rename(&unfinished, path).with_context(|| format!("placing {}", path.display()))
}

/// # Errors
/// With what to do about it, if there is no Go or it is too old.
pub fn check_go() -> anyhow::Result<()> {
    let needs = format!(
        "the cluster's programs are built with Go {}.{}.{} or newer",
        GO.0, GO.1, GO.2
    );
    let output = Command::new("go")
        .args(["env", "GOVERSION"])
        .env("GOTOOLCHAIN", "local")
        .output()
        .with_context(|| {
            format!("{needs}, and `go` is not on PATH (https://go.dev/doc/install)")
        })?;
    let version = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    match parse_go(&version) {
        Some(found) if found >= GO => Ok(()),
        _ => bail!("{needs}, and this is {version:?} (https://go.dev/doc/install)"),
    }
}

/// `go1.26.8`, `go1.27`, `go1.27rc1`.
fn parse_go(version: &str) -> Option<(u32, u32, u32)> {
    let mut parts = version.strip_prefix("go")?.split('.');
    let major = parts.next()?.parse().ok()?;
    let minor = parts.next()?;
    let release = minor
        .split(|character: char| !character.is_ascii_digit())
        .next()?;
    let patch = parts.next().map_or(Some(0), |patch| patch.parse().ok())?;
    Some((major, release.parse().ok()?, patch))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn go_versions_are_compared_as_numbers() {
        assert!(parse_go("go1.26.8").unwrap() >= GO);
        assert!(parse_go("go1.27rc1").unwrap() >= GO);
        assert!(parse_go("go1.27").unwrap() >= GO);
        assert!(parse_go("go1.26.5").unwrap() < GO);
        assert!(parse_go("go1.9").unwrap() < GO);
        assert_eq!(parse_go("devel"), None);
    }

    #[test]
    fn every_tool_is_pinned_by_a_tool_line() {
        for tool in ALL {
            let (module, package, _) = tool.source();
            let pins = fs::read_to_string(modules().join(module).join("go.mod")).unwrap();
            assert!(
                pins.lines()
                    .any(|line| line.trim().trim_start_matches("tool ") == package),
                "{package}"
            );
        }
    }
}
