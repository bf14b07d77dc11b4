// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask cluster`: real Kubernetes on this machine, to look around in.
//!
//! A process in the background owns the cluster; its end, however it comes, is the cluster's end.

use crate::{build_programs, image, target, workspace};
use anyhow::{Context, bail, ensure};
use clap::Subcommand;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use podveil_cluster::podveil::Checkout;
use podveil_cluster::tools::{self, Tool};
use podveil_cluster::{Cluster, journey};
use podveil_sim::{Report, eventually};
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Long enough for a machine that has other work too; what is built for the first time is built before.
const UP: Duration = Duration::from_secs(300);
const DOWN: Duration = Duration::from_secs(60);

#[derive(Subcommand)]
pub enum Action {
    /// Install, label, curl, label off, uninstall: a check mark a line. Needs root.
    Demo,
    /// Build the programs of Kubernetes into the cache (once a machine, some twenty minutes on two cores).
    Build,
    /// Two nodes and a control plane, and how to use them. Needs root.
    Up,
    /// Remove them.
    Down,
    /// Own the cluster until SIGTERM.
    #[command(hide = true)]
    Own,
}

/// # Errors
/// If it cannot be done here; the reason says what is missing.
pub fn run(action: &Action) -> anyhow::Result<()> {
    match action {
        Action::Build => build(),
        Action::Demo => demo(),
        Action::Up => up(),
        Action::Down => down(),
        Action::Own => own(),
    }
}

fn build() -> anyhow::Result<()> {
    tools::ensure()?;
    println!("all in {}", tools::cache()?.display());
    Ok(())
}

/// All that a cluster needs of this checkout but the images.
///
/// # Errors
/// If something is missing, which is then named, or cannot be built.
pub fn checkout() -> anyhow::Result<Checkout> {
    let missing = podveil_cluster::missing_programs();
    ensure!(
        missing.is_empty(),
        "a cluster cannot run here: {}",
        missing.join("; ")
    );
    tools::ensure()?;
    build_programs()?;
    Ok(Checkout {
        root: workspace(),
        podveilctl: podveilctl()?,
    })
}

fn podveilctl() -> anyhow::Result<PathBuf> {
    Ok(target()?.join("debug/podveilctl"))
}

fn demo() -> anyhow::Result<()> {
    let checkout = checkout()?;
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = interrupted.clone();
    let signals = runtime()?;
    std::thread::spawn(move || {
        signals.block_on(podveil_program::shutdown_signal());
        flag.store(true, Ordering::Relaxed);
    });
    image::run(&image::Arguments::dev())?;
    let began = Instant::now();
    let mut report = Report::new(interrupted);
    let cluster = Cluster::up(&checkout.podveilctl)?;
    report.heading(
        "Podveil on Kubernetes: two nodes, the namespace shop gets the label, legacy does not",
    );
    report.line(
        "two nodes of Kubernetes v1.36 are ready",
        Ok(format!("after {:.1} s", began.elapsed().as_secs_f64())),
    )?;
    journey::walk(&cluster, &checkout, &[], &mut |promise, outcome| {
        report.line(promise, outcome)
    })?;
    drop(cluster);
    println!(
        "\n{} in {:.1} s",
        report.summary(),
        began.elapsed().as_secs_f64()
    );
    ensure!(report.succeeded(), "not all of it holds");
    Ok(())
}

/// For signals: handlers, unlike a mask, are not passed on to what the cluster starts.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the runtime")
}

fn up() -> anyhow::Result<()> {
    ensure!(
        owner().is_none(),
        "it is up already: `cargo xtask cluster down` first"
    );
    checkout()?;
    // Of an owner that was killed: its kubeconfig would be taken for the new one's.
    if state().exists() {
        fs::remove_dir_all(state())?;
    }
    fs::create_dir_all(state())?;
    let log = state().join("log");
    let output = fs::File::create(&log)?;
    let mut owner = Command::new(std::env::current_exe()?)
        .args(["cluster", "own"])
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        // Ctrl-C and the end of this terminal are not for it.
        .process_group(0)
        .spawn()?;
    fs::write(state().join("pid"), owner.id().to_string())?;
    let kubeconfig = eventually(UP, "the cluster is up", || {
        if owner.try_wait()?.is_some() {
            return Ok(None);
        }
        fs::read_to_string(state().join("kubeconfig"))
            .map(Some)
            .context("it is on its way")
    })?;
    let Some(kubeconfig) = kubeconfig else {
        let said = fs::read_to_string(&log).unwrap_or_default();
        fs::remove_dir_all(state())?;
        bail!("it did not come up: {said}");
    };
    let kubectl = tools::path(Tool::Kubectl)?;
    let folder = kubectl.parent().context("kubectl lies in a folder")?;
    let helm = tools::path(Tool::Helm)?;
    let helm = helm.parent().context("helm lies in a folder")?;
    println!("Up. To use it:\n");
    println!("  export KUBECONFIG={kubeconfig}");
    println!(
        "  export PATH={}:{}:$PATH",
        folder.display(),
        helm.display()
    );
    println!("  kubectl get pods --all-namespaces --output=wide\n");
    println!("  cargo xtask cluster down removes everything.");
    Ok(())
}

fn down() -> anyhow::Result<()> {
    let Some(owner) = owner() else {
        println!("No cluster is up.");
        return Ok(());
    };
    kill(owner, Signal::SIGTERM)?;
    eventually(DOWN, "the cluster is down", || {
        ensure!(
            !Path::new(&format!("/proc/{owner}")).exists(),
            "its owner still runs"
        );
        Ok(())
    })?;
    fs::remove_dir_all(state())?;
    println!("Down; nothing is left.");
    Ok(())
}

fn own() -> anyhow::Result<()> {
    let runtime = runtime()?;
    let cluster = Cluster::up(&podveilctl()?)?;
    fs::write(
        state().join("kubeconfig"),
        cluster.kubeconfig().display().to_string(),
    )?;
    runtime.block_on(podveil_program::shutdown_signal());
    drop(cluster);
    Ok(())
}

fn state() -> PathBuf {
    Path::new("/run/podveil-cluster").to_owned()
}

/// The process that owns the cluster, if one does.
fn owner() -> Option<Pid> {
    let pid: i32 = fs::read_to_string(state().join("pid")).ok()?.parse().ok()?;
    let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    // A number alone may be somebody else's by now.
    command
        .windows(b"cluster\0own".len())
        .any(|words| words == b"cluster\0own")
        .then(|| Pid::from_raw(pid))
}
