// SPDX-License-Identifier: Apache-2.0
//! The chart on a real API server, without nodes: what is taken, what an upgrade leaves alone, what is left afterwards.

use crate::helm::{NAMESPACE, chart, helm};
use anyhow::{Context, ensure};
use podveil_cluster::ApiServer;
use podveil_cluster::tools::{self, Tool};
use podveil_sim::run;
use serde_json::{Value, json};
use std::path::Path;

fn kubectl(api: &ApiServer, arguments: &[&str]) -> anyhow::Result<String> {
    let kubectl = tools::path(Tool::Kubectl)?;
    let kubeconfig = format!("--kubeconfig={}", api.kubeconfig().display());
    let all = [&[kubeconfig.as_str(), "-n", NAMESPACE], arguments].concat();
    run(&kubectl.to_string_lossy(), all)
}

/// Everything of ours, in our namespace or outside of any: kind and name.
fn ours(api: &ApiServer) -> anyhow::Result<Vec<String>> {
    let kinds = "configmaps,daemonsets,deployments,leases,poddisruptionbudgets,rolebindings,roles,secrets,\
                 serviceaccounts,services,clusterroles,clusterrolebindings,priorityclasses";
    let text = kubectl(api, &["get", kinds, "-o", "name"])?;
    let system = kubectl(
        api,
        &[
            "get",
            "roles,rolebindings",
            "-n",
            "kube-system",
            "-o",
            "name",
        ],
    )?;
    let lines = text.lines().chain(system.lines());
    Ok(lines
        .filter(|line| line.contains("podveil"))
        .map(str::to_owned)
        .collect())
}

fn release(api: &ApiServer, arguments: &[&str]) -> anyhow::Result<String> {
    let kubeconfig = api.kubeconfig().to_str().context("a path")?.to_owned();
    let all = [
        arguments,
        &["-n", NAMESPACE, "--kubeconfig", kubeconfig.as_str()],
    ]
    .concat();
    helm(&all, "")
}

fn write(api: &ApiServer, object: &str, key: &str, value: &str) -> anyhow::Result<()> {
    let written = json!({ "data": { key: value } }).to_string();
    kubectl(api, &["patch", object, "--type=merge", "-p", &written]).map(drop)
}

fn data(api: &ApiServer, object: &str) -> anyhow::Result<Value> {
    let text = kubectl(api, &["get", object, "-o", "json"])?;
    Ok(serde_json::from_str::<Value>(&text)?["data"].clone())
}

#[test]
#[ignore = "cluster"]
fn what_programs_write_lives_through_an_upgrade_and_goes_with_the_release() -> anyhow::Result<()> {
    let api = ApiServer::start()?;
    let chart = chart();
    let path = Path::new(&chart).to_str().context("a path")?;
    let notes = release(&api, &["install", "podveil", path, "--create-namespace"])?;
    ensure!(notes.contains("kubectl label namespace"), "{notes}");
    let installed = ours(&api)?;
    for wanted in [
        "secret/podveil-ca",
        "configmap/podveil-roots",
        "daemonset.apps/podveil-node",
    ] {
        ensure!(
            installed.iter().any(|name| name == wanted),
            "{wanted}: {installed:?}"
        );
    }
    // As the programs do.
    write(&api, "configmap/podveil-roots", "bundle.pem", "roots")?;
    write(&api, "secret/podveil-ca", "journal", "a2V5cw==")?;
    release(
        &api,
        &["upgrade", "podveil", path, "--set", "ca.replicas=3"],
    )?;
    ensure!(data(&api, "configmap/podveil-roots")?["bundle.pem"] == "roots");
    ensure!(data(&api, "secret/podveil-ca")?["journal"] == "a2V5cw==");
    let replicas = kubectl(
        &api,
        &[
            "get",
            "deployment/podveil-ca",
            "-o",
            "jsonpath={.spec.replicas}",
        ],
    )?;
    ensure!(replicas == "3", "{replicas}");
    // No node here runs the hook.
    release(&api, &["uninstall", "podveil", "--no-hooks"])?;
    let left = ours(&api)?;
    ensure!(left.is_empty(), "left: {left:?}");
    Ok(())
}

#[test]
#[ignore = "cluster"]
fn keys_that_are_to_be_kept_are_taken_over_by_the_next_release() -> anyhow::Result<()> {
    let api = ApiServer::start()?;
    let chart = chart();
    let path = chart.to_str().context("a path")?;
    let keep = ["--set", "ca.keepOnUninstall=true"];
    let install = [
        &["install", "podveil", path, "--create-namespace"],
        keep.as_slice(),
    ]
    .concat();
    release(&api, &install)?;
    write(&api, "secret/podveil-ca", "journal", "a2V5cw==")?;
    release(&api, &["uninstall", "podveil", "--no-hooks"])?;
    let mut left = ours(&api)?;
    left.sort();
    ensure!(
        left == ["configmap/podveil-roots", "secret/podveil-ca"],
        "{left:?}"
    );
    release(&api, &install)?;
    ensure!(data(&api, "secret/podveil-ca")?["journal"] == "a2V5cw==");
    Ok(())
}
