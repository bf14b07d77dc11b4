// SPDX-License-Identifier: Apache-2.0
//! Helm and what it renders.

use anyhow::{Context, ensure};
use podveil_cluster::tools::{self, Tool};
use serde_json::Value;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

pub const NAMESPACE: &str = "podveil-system";

pub fn chart() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/podveil"))
}

pub fn values_schema() -> anyhow::Result<Value> {
    let text = std::fs::read_to_string(chart().join("values.schema.json"))?;
    serde_json::from_str(&text).context("values.schema.json")
}

pub fn default_values() -> anyhow::Result<Value> {
    let text = std::fs::read_to_string(chart().join("values.yaml"))?;
    serde_saphyr::from_str(&text).context("values.yaml")
}

/// Runs helm with `input` and returns what it says, or as error what it complains about.
pub fn helm(arguments: &[&str], input: &str) -> anyhow::Result<String> {
    let mut child = Command::new(tools::path(Tool::Helm)?)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("starting helm")?;
    let mut stdin = child.stdin.take().expect("it is piped");
    stdin.write_all(input.as_bytes())?;
    drop(stdin);
    let output = child.wait_with_output()?;
    let message = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "helm {arguments:?}: {message}");
    Ok(String::from_utf8(output.stdout)?)
}

/// The objects that these values give, hooks among them.
pub fn render(values: &Value) -> anyhow::Result<Vec<Value>> {
    let chart = chart();
    let chart = chart.to_str().context("a path in Unicode")?;
    let arguments = ["template", "podveil", chart, "-n", NAMESPACE, "-f", "-"];
    let text = helm(&arguments, &values.to_string())?;
    let objects: Vec<Value> = serde_saphyr::from_multiple(&text)?;
    Ok(objects
        .into_iter()
        .filter(|object| !object.is_null())
        .collect())
}

pub fn find<'a>(objects: &'a [Value], kind: &str, name: &str) -> anyhow::Result<&'a Value> {
    objects
        .iter()
        .find(|object| object["kind"] == kind && object["metadata"]["name"] == name)
        .with_context(|| format!("no {kind} {name} is rendered"))
}

pub fn items(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}
