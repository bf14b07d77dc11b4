// SPDX-License-Identifier: Apache-2.0
use crate::command::run;
use anyhow::Context;
use podveil_netns::NetNs;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

const RUNS: &str = "/run/podveil-sim";
const CGROUP2: [&str; 2] = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"];
const KILL_WAIT: Duration = Duration::from_secs(5);

/// Everything that one simulation makes, and its removal.
///
/// Each thing is written into the run folder's `things` file *before* it is made, so that whoever cleans up (this
/// process, the janitor, or the next run) finds at least all that exists.
#[derive(Debug)]
pub struct Sandbox {
    folder: PathBuf,
    prefix: String,
    things: Mutex<fs::File>,
    /// Keeps the janitor waiting: it acts when this process, and with it the pipe, is gone.
    janitor: Option<Child>,
    keep: bool,
}

impl Sandbox {
    /// `podveilctl`: the binary that serves as janitor, if the sandbox should outlive a killed process by nothing.
    ///
    /// # Errors
    /// If the run folder cannot be made.
    pub fn new(podveilctl: Option<&Path>) -> anyhow::Result<Self> {
        remove_leftovers();
        let nonce = Instant::now().elapsed().subsec_nanos() ^ std::process::id();
        let mut number = nonce;
        let (prefix, folder) = loop {
            let prefix = format!("pv{:x}", number & 0xf_ffff);
            let folder = Path::new(RUNS).join(&prefix);
            fs::create_dir_all(RUNS)?;
            match fs::create_dir(&folder) {
                Ok(()) => break (prefix, folder),
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                    number = number.wrapping_add(1)
                }
                Err(error) => {
                    return Err(error).with_context(|| format!("making {}", folder.display()));
                }
            }
        };
        fs::write(folder.join("owner"), owner_line(std::process::id()))?;
        let things = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(folder.join("things"))?;
        let janitor = podveilctl
            .map(|binary| {
                Command::new(binary)
                    .args(["janitor", &folder.to_string_lossy()])
                    .stdin(Stdio::piped())
                    // Of a group of its own: Ctrl-C on the terminal is for the simulation, not for it.
                    .process_group(0)
                    .spawn()
                    .with_context(|| format!("starting the janitor {}", binary.display()))
            })
            .transpose()?;
        Ok(Self {
            folder,
            prefix,
            things: Mutex::new(things),
            janitor,
            keep: false,
        })
    }

    /// The folder for configuration, sockets, logs and data of this run.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A name of this run for a namespace or cgroup folder.
    pub fn name(&self, part: &str) -> String {
        format!("{}-{part}", self.prefix)
    }

    /// Makes a network namespace and opens it.
    ///
    /// # Errors
    /// If `ip netns add` fails.
    pub fn add_netns(&self, part: &str) -> anyhow::Result<(String, NetNs)> {
        let name = self.name(part);
        self.record("netns", &name)?;
        run("ip", ["netns", "add", &name])?;
        let netns = NetNs::open(Path::new("/run/netns").join(&name))
            .with_context(|| format!("opening netns {name}"))?;
        Ok((name, netns))
    }

    /// Removes one namespace before its sandbox ends.
    ///
    /// # Errors
    /// If it is not there.
    pub fn remove_netns(&self, name: &str) -> anyhow::Result<()> {
        run("ip", ["netns", "del", name]).map(drop)
    }

    /// A cgroup2 folder of this run, made by whoever joins it and removed with the sandbox.
    ///
    /// # Errors
    /// If the run folder cannot be written.
    pub fn cgroup(&self, part: &str) -> anyhow::Result<String> {
        let name = self.name(part);
        self.record("cgroup", &name)?;
        Ok(name)
    }

    /// A folder of this run that something may be mounted at by whoever uses it; unmounted with the sandbox.
    ///
    /// # Errors
    /// If the run folder cannot be written.
    pub fn mount_point(&self, part: &str) -> anyhow::Result<PathBuf> {
        self.record("mount", part)?;
        Ok(self.folder.join(part))
    }

    pub(crate) fn record_process(&self, pid: u32) -> anyhow::Result<()> {
        self.record("process", owner_line(pid).trim_end())
    }

    fn record(&self, kind: &str, what: &str) -> anyhow::Result<()> {
        let mut things = self
            .things
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        writeln!(things, "{kind} {what}").context("writing down what is made")
    }

    /// Removes everything now instead of at drop.
    pub fn close(self) {
        drop(self);
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        if !self.keep {
            remove(&self.folder);
        }
        if let Some(mut janitor) = self.janitor.take() {
            drop(janitor.stdin.take());
            if let Err(error) = janitor.wait() {
                tracing::warn!(%error, "waiting for the janitor");
            }
        }
    }
}

/// The body of the janitor process: waits until standard input ends, then removes what is left of the run.
pub fn janitor(folder: &Path) {
    let mut rest = Vec::new();
    if let Err(error) = std::io::stdin().read_to_end(&mut rest) {
        tracing::debug!(%error, "standard input ended early");
    }
    remove(folder);
}

/// Removes runs whose owner is gone (killed, or the machine's tools failed in the middle).
pub fn remove_leftovers() {
    let Ok(entries) = fs::read_dir(RUNS) else {
        return;
    };
    for entry in entries.flatten() {
        let owner = fs::read_to_string(entry.path().join("owner")).unwrap_or_default();
        if !is_alive(&owner) {
            remove(&entry.path());
        }
    }
}

/// `<pid> <start time>`: a pid alone may be somebody else's by now.
fn owner_line(pid: u32) -> String {
    format!("{pid} {}\n", start_time(pid).unwrap_or_default())
}

fn start_time(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is a name in brackets that may hold anything; the 20th after it is the start time.
    stat.rsplit_once(')')?
        .1
        .split_whitespace()
        .nth(19)
        .map(str::to_owned)
}

fn is_alive(owner: &str) -> bool {
    let mut parts = owner.split_whitespace();
    let (Some(pid), Some(started)) = (parts.next().and_then(|pid| pid.parse().ok()), parts.next())
    else {
        return false;
    };
    start_time(pid).as_deref() == Some(started)
}

fn remove(folder: &Path) {
    let things = fs::read_to_string(folder.join("things")).unwrap_or_default();
    let of_kind = |kind: &'static str| {
        things
            .lines()
            .filter_map(move |line| line.strip_prefix(kind)?.strip_prefix(' '))
    };
    let alive: Vec<&str> = of_kind("process").filter(|owner| is_alive(owner)).collect();
    for pid in alive
        .iter()
        .filter_map(|owner| owner.split_whitespace().next()?.parse().ok())
    {
        if let Err(error) = nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(pid),
            nix::sys::signal::Signal::SIGKILL,
        ) {
            tracing::debug!(pid, %error, "a process ended by itself");
        }
    }
    let deadline = Instant::now() + KILL_WAIT;
    // Zombies of our own are reaped by their `Process`; those of a dead owner by init. Either way the kernel has let go
    // of their namespaces when they no longer run.
    while alive.iter().any(|owner| is_running(owner)) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    for name in of_kind("netns") {
        if Path::new("/run/netns").join(name).exists()
            && let Err(error) = run("ip", ["netns", "del", name])
        {
            tracing::warn!(name, %error, "a namespace is left");
        }
    }
    for name in of_kind("cgroup") {
        for root in CGROUP2 {
            let path = Path::new(root).join(name);
            if path.is_dir()
                && let Err(error) = fs::remove_dir(&path)
            {
                tracing::warn!(path = %path.display(), %error, "a cgroup folder is left");
            }
        }
    }
    for part in of_kind("mount") {
        // Not mounted, or not even made: nothing to do.
        let _nothing_there =
            nix::mount::umount2(&folder.join(part), nix::mount::MntFlags::MNT_DETACH);
    }
    if let Err(error) = fs::remove_dir_all(folder)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(folder = %folder.display(), %error, "a run folder is left");
    }
    // The last run takes the folder of runs along; another run's presence keeps it.
    let _not_empty = fs::remove_dir(RUNS);
}

fn is_running(owner: &str) -> bool {
    let Some(pid) = owner.split_whitespace().next() else {
        return false;
    };
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    is_alive(owner)
        && !stat
            .rsplit_once(')')
            .is_some_and(|(_, rest)| rest.trim_start().starts_with('Z'))
}
