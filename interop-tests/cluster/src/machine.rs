// SPDX-License-Identifier: Apache-2.0
use crate::Program;
use anyhow::{Context, ensure};
use podveil_sim::{eventually, run};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

const START: Duration = Duration::from_secs(20);

/// A machine of the cluster: mount, network and PID namespaces of its own. Its end is the end of all that is in it.
#[derive(Debug)]
pub struct Machine {
    pub name: String,
    /// Its first process, as this host numbers it.
    pub init: u32,
    folder: PathBuf,
    _first: Program,
}

impl Machine {
    pub(crate) fn start(folder: &Path, name: &str) -> anyhow::Result<Self> {
        let script = folder.join("machine.sh");
        fs::write(&script, include_str!("../scripts/machine.sh"))?;
        let mut first = Program::start(
            folder,
            name,
            &words(&[
                "unshare --mount --net --pid --fork --kill-child --mount-proc sh",
                &script.to_string_lossy(),
                name,
                &folder.to_string_lossy(),
            ]),
        )?;
        let ready = folder.join(format!("{name}.ready"));
        eventually(START, "a machine stands", || {
            first.check_running()?;
            ensure!(ready.exists(), "{name} is not ready");
            Ok(())
        })?;
        let children = format!("/proc/{0}/task/{0}/children", first.pid());
        let init = fs::read_to_string(&children)
            .with_context(|| format!("reading {children}"))?
            .trim()
            .parse()
            .context("a machine has one first process")?;
        Ok(Self {
            name: name.to_owned(),
            init,
            folder: folder.to_owned(),
            _first: first,
        })
    }

    /// Starts a program on it; it ends with the [`Program`] and with the machine.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start_program(
        &self,
        name: &str,
        environment: &[String],
        command: &[String],
    ) -> anyhow::Result<Program> {
        let mut whole = self.enter();
        whole.extend(words(&["setpriv --pdeathsig KILL -- env"]));
        whole.extend_from_slice(environment);
        whole.extend_from_slice(command);
        Program::start(&self.folder, &format!("{}-{name}", self.name), &whole)
    }

    /// Runs a command on it to its end.
    ///
    /// # Errors
    /// With what it wrote to standard error, if it fails.
    pub fn run(&self, command: &[&str]) -> anyhow::Result<String> {
        let mut whole = self.enter();
        whole.extend(command.iter().map(|word| (*word).to_owned()));
        run(&whole[0].clone(), &whole[1..])
    }

    fn enter(&self) -> Vec<String> {
        words(&[&format!(
            "nsenter --target {} --mount --net --pid --",
            self.init
        )])
    }

    /// Its network namespace, to be opened.
    pub fn netns(&self) -> PathBuf {
        format!("/proc/{}/ns/net", self.init).into()
    }
}

/// The words of the first part, then the other parts as they are.
pub(crate) fn words(parts: &[&str]) -> Vec<String> {
    let (first, rest) = parts.split_first().unwrap_or((&"", &[]));
    first
        .split_whitespace()
        .chain(rest.iter().copied())
        .map(str::to_owned)
        .collect()
}
