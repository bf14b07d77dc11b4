// SPDX-License-Identifier: Apache-2.0
//! The API server alone.

use anyhow::{Context, ensure};
use podveil_cluster::tools::{self, Tool};
use podveil_cluster::{ApiServer, Controllers};
use podveil_sim::{eventually, run};
use std::path::Path;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(30);

fn kubectl(kubeconfig: &Path, arguments: &[&str]) -> anyhow::Result<String> {
    let kubectl = tools::path(Tool::Kubectl)?;
    let kubeconfig = format!("--kubeconfig={}", kubeconfig.display());
    run(
        &kubectl.to_string_lossy(),
        [&[kubeconfig.as_str()], arguments].concat(),
    )
}

#[test]
#[ignore = "cluster"]
fn two_api_servers_run_side_by_side_and_leave_nothing() -> anyhow::Result<()> {
    tools::API
        .into_iter()
        .try_for_each(|tool| tools::path(tool).map(drop))?;
    let began = Instant::now();
    let one = ApiServer::start()?;
    println!("ready after {:?}", began.elapsed());
    let two = ApiServer::start()?;
    kubectl(one.kubeconfig(), &["create", "namespace", "only-in-one"])?;
    kubectl(one.kubeconfig(), &["get", "namespace", "only-in-one"])?;
    ensure!(kubectl(two.kubeconfig(), &["get", "namespace", "only-in-one"]).is_err());
    let (folder, url) = (one.folder().to_owned(), one.url().to_owned());
    drop(one);
    ensure!(!folder.exists(), "{} is left", folder.display());
    ensure!(
        run("curl", ["--silent", "--insecure", &url]).is_err(),
        "something still answers at {url}"
    );
    Ok(())
}

#[test]
#[ignore = "cluster"]
fn a_token_of_a_service_account_is_somebody_without_rights() -> anyhow::Result<()> {
    let api = ApiServer::start()?;
    kubectl(api.kubeconfig(), &["create", "serviceaccount", "nobody"])?;
    let token = kubectl(api.kubeconfig(), &["create", "token", "nobody"])?;
    let theirs = api.kubeconfig_for("nobody", token.trim())?;
    let user = kubectl(&theirs, &["auth", "whoami"])?;
    ensure!(
        user.contains("system:serviceaccount:default:nobody"),
        "{user}"
    );
    let refused = kubectl(&theirs, &["get", "pods"])
        .err()
        .context("it may list pods")?;
    ensure!(refused.to_string().contains("orbidden"), "{refused:#}");
    Ok(())
}

#[test]
#[ignore = "cluster"]
fn what_was_stored_survives_a_killed_api_server() -> anyhow::Result<()> {
    let mut api = ApiServer::start()?;
    kubectl(api.kubeconfig(), &["create", "namespace", "kept"])?;
    api.kill();
    ensure!(kubectl(api.kubeconfig(), &["get", "namespace", "kept"]).is_err());
    api.resume()?;
    kubectl(api.kubeconfig(), &["get", "namespace", "kept"]).map(drop)
}

#[test]
#[ignore = "cluster"]
fn with_controllers_a_namespace_gets_its_account_and_ends() -> anyhow::Result<()> {
    let api = ApiServer::start_with(Controllers::Objects)?;
    kubectl(api.kubeconfig(), &["create", "namespace", "short"])?;
    eventually(PATIENCE, "there is a default account", || {
        kubectl(
            api.kubeconfig(),
            &["-n", "short", "get", "serviceaccount", "default"],
        )
    })?;
    kubectl(
        api.kubeconfig(),
        &["delete", "namespace", "short", "--timeout=30s"],
    )?;
    ensure!(kubectl(api.kubeconfig(), &["get", "namespace", "short"]).is_err());
    Ok(())
}
