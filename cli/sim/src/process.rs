// SPDX-License-Identifier: Apache-2.0
use crate::Sandbox;
use anyhow::{Context, bail};
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A program of a simulation, in one of its namespaces, its log in the run folder. Killed when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command` in the namespace. The child dies with the thread that starts it.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(
        sandbox: &Sandbox,
        namespace: &str,
        name: &str,
        command: &[&str],
    ) -> anyhow::Result<Self> {
        let log = sandbox.folder().join(format!("{name}.log"));
        let file = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("opening {}", log.display()))?;
        let child = Command::new("nsenter")
            .arg(format!("--net=/run/netns/{namespace}"))
            .args(["setpriv", "--pdeathsig", "KILL", "--"])
            .args(command)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .process_group(0)
            .spawn()
            .with_context(|| format!("starting {name}"))?;
        sandbox.record_process(child.id())?;
        Ok(Self {
            name: name.to_owned(),
            child,
            log,
        })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Has it ended by itself?
    ///
    /// # Errors
    /// With the end of its log if it has.
    pub fn check_running(&mut self) -> anyhow::Result<()> {
        if let Some(status) = self.child.try_wait()? {
            let log = std::fs::read_to_string(&self.log).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            bail!(
                "{} ended ({status}):\n{}",
                self.name,
                lines[lines.len().saturating_sub(20)..].join("\n")
            );
        }
        Ok(())
    }

    /// Kills it without warning (SIGKILL).
    pub fn kill(&mut self) {
        if let Err(error) = self.child.kill() {
            tracing::debug!(name = self.name, %error, "it ended by itself");
        }
        if let Err(error) = self.child.wait() {
            tracing::debug!(name = self.name, %error, "waiting for its end");
        }
    }

    /// Asks it to end (SIGTERM).
    ///
    /// # Errors
    /// If it has ended.
    pub fn ask_to_end(&self) -> anyhow::Result<()> {
        let pid = nix::unistd::Pid::from_raw(self.child.id().try_into()?);
        Ok(nix::sys::signal::kill(
            pid,
            nix::sys::signal::Signal::SIGTERM,
        )?)
    }

    /// Asks it to end and waits.
    ///
    /// # Errors
    /// If it has not ended after `patience`; it is killed then.
    pub fn terminate(&mut self, patience: Duration) -> anyhow::Result<()> {
        self.ask_to_end()?;
        let deadline = Instant::now() + patience;
        while self.child.try_wait()?.is_none() {
            if Instant::now() > deadline {
                self.kill();
                bail!("{} did not end within {patience:?} of SIGTERM", self.name);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}
