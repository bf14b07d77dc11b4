// SPDX-License-Identifier: Apache-2.0
//! Running the tool and kubectl.

use anyhow::{Context, ensure};
use podveil_cluster::ApiServer;
use podveil_cluster::tools::{self, Tool};
use serde_json::Value;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What a run of the tool said.
#[derive(Debug)]
pub struct Said {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Said {
    pub fn json(&self) -> anyhow::Result<Value> {
        serde_json::from_str(&self.out).with_context(|| format!("not JSON: {self:?}"))
    }
}

/// The programs that cargo built with this test: `target/<profile>`, above `deps`.
pub fn podveilctl() -> anyhow::Result<PathBuf> {
    let test = std::env::current_exe()?;
    let folder = test
        .ancestors()
        .nth(2)
        .context("this test lies in no target folder")?;
    Ok(folder.join("podveilctl"))
}

pub fn ctl(program: &Path, kubeconfig: &Path, arguments: &[&str]) -> anyhow::Result<Said> {
    let output = Command::new(program)
        .args(arguments)
        .env("KUBECONFIG", kubeconfig)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("running {}", program.display()))?;
    Ok(Said {
        code: output.status.code().context("ended by a signal")?,
        out: String::from_utf8(output.stdout)?,
        err: String::from_utf8(output.stderr)?,
    })
}

pub fn kubectl(api: &ApiServer, arguments: &[&str], input: &str) -> anyhow::Result<String> {
    let mut child = Command::new(tools::path(Tool::Kubectl)?)
        .arg(format!("--kubeconfig={}", api.kubeconfig().display()))
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("starting kubectl")?;
    child
        .stdin
        .take()
        .context("no stdin")?
        .write_all(input.as_bytes())?;
    let output = child.wait_with_output()?;
    ensure!(
        output.status.success(),
        "kubectl {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?)
}
