// SPDX-License-Identifier: Apache-2.0
//! A process that serves runs below one that does nothing but start it again at once when it was killed or crashed. A
//! kubelet would do that too, but looks for ended containers once a second only, and then makes a new one.
//!
//! A process that ends by itself, or that lives for less than [`LEAST_LIFE`], is not started again: the supervisor ends
//! with it, and the kubelet goes on with its growing pauses.

use anyhow::{Context, bail};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getppid};
use podveil_program::shutdown_signal;
use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::{Duration, Instant};
use tokio::process::{Child, Command};

/// The argument by which a process is told who started it.
const PARENT: &str = "--parent";
const LEAST_LIFE: Duration = Duration::from_secs(10);

/// What is run, and run again.
#[derive(Debug)]
pub struct Supervisor {
    program: PathBuf,
    arguments: Vec<OsString>,
    least_life: Duration,
}

impl Supervisor {
    /// Of this program with these arguments.
    ///
    /// # Errors
    /// Where the program is cannot be told.
    pub fn new(arguments: impl IntoIterator<Item = OsString>) -> anyhow::Result<Self> {
        Ok(Self {
            program: std::env::current_exe().context("finding this program")?,
            arguments: arguments.into_iter().collect(),
            least_life: LEAST_LIFE,
        })
    }

    /// Until the program ends by itself or this process is asked to stop, of which the program is told. On the thread that
    /// lives as long as this process, since what it has started ends with it.
    ///
    /// # Errors
    /// The program cannot be started, has failed, or was killed right after it had begun.
    pub async fn run(&self) -> anyhow::Result<()> {
        let stop = shutdown_signal();
        tokio::pin!(stop);
        loop {
            let began = Instant::now();
            let mut child = self.start()?;
            let status = tokio::select! {
                status = child.wait() => status,
                signal = &mut stop => {
                    tracing::info!(signal, "asked to stop");
                    terminate(&child)?;
                    return outcome(child.wait().await.context("waiting for the program")?);
                }
            };
            let status = status.context("waiting for the program")?;
            if status.signal().is_none() || began.elapsed() < self.least_life {
                return outcome(status);
            }
            tracing::error!(%status, "the program did not end by itself: it is started again");
        }
    }

    fn start(&self) -> anyhow::Result<Child> {
        Command::new(&self.program)
            .args(&self.arguments)
            .arg(PARENT)
            .arg(std::process::id().to_string())
            .spawn()
            .context("the program cannot be started")
    }
}

fn terminate(child: &Child) -> anyhow::Result<()> {
    // Not there any more: it has ended by itself.
    let Some(pid) = child.id() else { return Ok(()) };
    let pid = Pid::from_raw(pid.try_into().context("a process's number")?);
    kill(pid, Signal::SIGTERM).context("the program cannot be asked to stop")
}

fn outcome(status: ExitStatus) -> anyhow::Result<()> {
    match status.success() {
        true => Ok(()),
        false => bail!("the program ended: {status}"),
    }
}

/// In the process that serves: ends with the supervisor, however that ends.
///
/// # Errors
/// The supervisor has ended already.
pub fn end_with(parent: i32) -> anyhow::Result<()> {
    set_pdeathsig(Signal::SIGKILL).context("this process cannot be tied to its supervisor")?;
    match getppid().as_raw() == parent {
        true => Ok(()),
        false => bail!("the supervisor has ended"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often the script ran, which writes a line each time, and how it came out.
    async fn runs(script: &str, least_life: Duration) -> (usize, anyhow::Result<()>) {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("runs");
        let path = file.display();
        let script = format!("echo run >> {path}; count=$(wc -l < {path}); {script}");
        let supervisor = Supervisor {
            program: "/bin/sh".into(),
            arguments: ["-c".into(), script.into()].into(),
            least_life,
        };
        let outcome = supervisor.run().await;
        let runs = std::fs::read_to_string(file).unwrap().lines().count();
        (runs, outcome)
    }

    #[tokio::test]
    async fn who_is_killed_is_started_again_unless_that_comes_at_once() {
        let killed_twice = "[ $count = 3 ] || kill -KILL $$";
        let (count, outcome) = runs(killed_twice, Duration::ZERO).await;
        assert_eq!(count, 3);
        outcome.unwrap();
        let (count, outcome) = runs(killed_twice, LEAST_LIFE).await;
        assert_eq!(count, 1);
        assert!(outcome.unwrap_err().to_string().contains("signal: 9"));
    }

    #[tokio::test]
    async fn who_ends_by_itself_is_not() {
        let (count, outcome) = runs("exit 3", Duration::ZERO).await;
        assert_eq!(count, 1);
        assert!(outcome.unwrap_err().to_string().contains("status: 3"));
    }
}
