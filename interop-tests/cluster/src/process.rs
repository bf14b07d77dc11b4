// SPDX-License-Identifier: Apache-2.0
use anyhow::{Context, bail};
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

/// A program of a cluster, its log in a file. Killed when dropped, and by the kernel when this process is killed.
#[derive(Debug)]
pub struct Program {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Program {
    /// Starts `command` with its log at `folder/<name>.log`.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(folder: &Path, name: &str, command: &[String]) -> anyhow::Result<Self> {
        let log = folder.join(format!("{name}.log"));
        let file = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("opening {}", log.display()))?;
        let mut process = Command::new("setpriv");
        process
            .args(["--pdeathsig", "KILL", "--"])
            .args(command)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .process_group(0);
        let child = spawn(process).with_context(|| format!("starting {name}"))?;
        Ok(Self {
            name: name.to_owned(),
            child,
            log,
        })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn log(&self) -> &Path {
        &self.log
    }

    /// # Errors
    /// With the end of its log, if it has ended by itself.
    pub fn check_running(&mut self) -> anyhow::Result<()> {
        let Some(status) = self.child.try_wait()? else {
            return Ok(());
        };
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        bail!(
            "{} ended ({status}):\n{}",
            self.name,
            lines[lines.len().saturating_sub(20)..].join("\n")
        );
    }

    /// Asks it to end (SIGTERM), and kills it after `patience`.
    pub fn terminate(&mut self, patience: Duration) {
        let deadline = Instant::now() + patience;
        self.signal(nix::sys::signal::Signal::SIGTERM);
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.kill();
    }

    /// Kills it without warning (SIGKILL) and waits.
    pub fn kill(&mut self) {
        if let Err(error) = self.child.kill() {
            tracing::debug!(name = self.name, %error, "it ended by itself");
        }
        if let Err(error) = self.child.wait() {
            tracing::debug!(name = self.name, %error, "waiting for its end");
        }
    }

    /// Sends a signal: SIGSTOP makes a slow program, SIGCONT ends that.
    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        let Ok(pid) = self.child.id().try_into() else {
            return;
        };
        if let Err(error) = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal) {
            tracing::debug!(name = self.name, %error, "it ended by itself");
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.kill();
    }
}

type Order = (Command, SyncSender<std::io::Result<Child>>);

/// The kernel sends the death signal when the *thread* that started a program ends. A test's thread may end before the
/// program's owner does, so that all are started by one thread that lives as long as the process.
fn spawn(command: Command) -> anyhow::Result<Child> {
    static STARTER: OnceLock<SyncSender<Order>> = OnceLock::new();
    let starter = STARTER.get_or_init(|| {
        let (orders, inbox): (_, Receiver<Order>) = sync_channel(16);
        std::thread::spawn(move || {
            for (mut command, answer) in inbox {
                let _nobody_waits = answer.send(command.spawn());
            }
        });
        orders
    });
    let (answer, started) = sync_channel(1);
    starter
        .send((command, answer))
        .context("the starting thread has ended")?;
    Ok(started.recv().context("the starting thread has ended")??)
}
