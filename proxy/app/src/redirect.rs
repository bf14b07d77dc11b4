// SPDX-License-Identifier: Apache-2.0
//! Hosts the `redirect` module: its configuration, credentials and endpoints. What it does is in `podveil-redirect`.

use crate::config::{BackEnd, FindPods, NodeConfig};
use crate::endpoints::Endpoints;
use crate::metrics::ProcessMetrics;
use crate::proxy::program;
use crate::remains;
use anyhow::Context;
use podveil_ca_client::{Module, ProgramCredentials};
use podveil_netns::cgroup::CgroupError;
use podveil_program::http::{Answer, Routes};
use podveil_redirect::{
    BackEndChoice, CniConfig, Ended, Find, PodCondition, RedirectConfig, Status, Unusable,
};
use prometheus::Registry;
use serde_json::{Value, json};
use std::time::SystemTime;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Runs the module until it is asked to stop. Capture stays where it stands; once Podveil is uninstalled and no pod is
/// captured any more, nothing stays on the node.
///
/// # Errors
/// An endpoint, a socket or the cgroup cannot be had: for the operator.
pub async fn run(config: NodeConfig, asked_to_stop: CancellationToken) -> anyhow::Result<()> {
    let stop = CancellationToken::new();
    let credentials =
        ProgramCredentials::start(program(&config, Module::Redirect), stop.child_token());
    let (status, seen) = watch::channel(Status::default());
    let registry = Registry::new();
    ProcessMetrics::register(&registry);
    podveil_redirect::register(&registry, seen.clone()).context("the metrics clash")?;
    let admin = {
        let (config, dumped) = (config.clone(), seen.clone());
        let dump = move || Answer::json(dump(&config, &dumped.borrow()).to_string());
        let status = seen.clone();
        let status = move || Answer::json(page(&status.borrow()).to_string());
        Routes::default()
            .get("/config_dump", dump)
            .get("/status", status)
    };
    let readiness = {
        let credentials = credentials.clone();
        Routes::default().readiness(move || pending(&credentials, &seen.borrow()))
    };
    let endpoints = Endpoints {
        admin,
        metrics: Routes::default().metrics(registry),
        readiness,
    };
    endpoints.serve(&config, &stop).await?;
    let ended = podveil_redirect::run(module(&config)?, credentials, status, asked_to_stop)
        .await
        .context("the redirect module cannot start")?;
    stop.cancel();
    match ended {
        Ended::Stopped => Ok(()),
        Ended::Uninstalled(_until_all_is_removed) => {
            tracing::info!("Podveil is uninstalled: nothing is left on this node");
            podveil_redirect::purge(&module(&config)?)?;
            remains::remove_state(&program(&config, Module::Redirect))?;
            remains::remove_shared(&config).await;
            Ok(())
        }
    }
}

/// Takes everything of this node out again.
///
/// # Errors
/// Something may be left behind; the error says where.
pub async fn teardown(config: &NodeConfig) -> anyhow::Result<()> {
    let pods = podveil_redirect::teardown(&module(config)?)
        .await
        .context("something is left of this node's capture")?;
    tracing::info!(pods, "capture is removed");
    remains::remove_state(&program(config, Module::Redirect))?;
    remains::remove_shared(config).await;
    Ok(())
}

fn module(config: &NodeConfig) -> Result<RedirectConfig, CgroupError> {
    let section = &config.redirect;
    Ok(RedirectConfig {
        node: config.node.clone(),
        xds_address: config.xds_address.to_string(),
        reports_address: config.reports_address().to_string(),
        cgroup: config.cgroup()?,
        find: match section.find {
            FindPods::Directory => Find::Directory(section.netns_dir.clone()),
            FindPods::Processes => Find::Processes {
                cri_socket: section.cri_socket.clone(),
            },
        },
        cni: CniConfig {
            enabled: section.cni,
            socket: section.cni_socket.clone(),
            plugin: section.cni_plugin.clone(),
            bin_dir: section.cni_bin_dir.clone(),
            conf_dir: section.cni_conf_dir.clone(),
            fail_closed: section.cni_fail_closed,
            exempt_namespaces: section.cni_exempt_namespaces.clone(),
        },
        back_end: match section.back_end {
            BackEnd::Auto => BackEndChoice::Auto,
            BackEnd::Ebpf => BackEndChoice::Only(podveil_redirect::BackEnd::Ebpf),
            BackEnd::Nftables => BackEndChoice::Only(podveil_redirect::BackEnd::Nftables),
            BackEnd::Iptables => BackEndChoice::Only(podveil_redirect::BackEnd::Iptables),
        },
        bpf_dir: section.bpf_dir.clone(),
        zds_socket: config.zds_socket.clone(),
        listeners_socket: config.listeners_socket.clone(),
        hold_bound: section.hold_bound.0,
        backlog: section.backlog,
        release_bound: section.release_bound.0,
        drain_bound: section.drain_bound.0,
    })
}

fn pending(credentials: &ProgramCredentials, status: &Status) -> Vec<String> {
    let mut pending = Vec::new();
    if credentials.current().is_none() {
        pending.push(no_certificate(credentials));
    }
    if !status.stands_by && !status.synced {
        pending.push("the control plane has not told everything yet".to_owned());
    }
    pending
}

/// What a program without a certificate waits for: the CA, the roots that prove it, or its own token.
pub(crate) fn no_certificate(credentials: &ProgramCredentials) -> String {
    match &*credentials.last_error().borrow() {
        Some(error) => format!("this program has no certificate yet: {error}"),
        None => "this program has no certificate yet".to_owned(),
    }
}

fn dump(config: &NodeConfig, status: &Status) -> Value {
    let mut page = page(status);
    page["config"] = json!(config);
    page
}

/// The body of `/status`.
fn page(status: &Status) -> Value {
    let seconds = |at: Option<SystemTime>| {
        at.and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok())
            .map(|since| since.as_secs())
    };
    let pods: Vec<Value> = status
        .pods
        .iter()
        .map(|pod| {
            json!({
                "uid": pod.uid.to_string(),
                "condition": pod.condition.to_string(),
                "reason": &*pod.reason,
                "obstacle": pod.obstacle.map(|obstacle| obstacle.to_string()),
                "backEnd": pod.back_end.map(|back_end| back_end.to_string()),
                "capturedSince": seconds(pod.captured_since),
                "verified": seconds(pod.verified),
                "repairs": pod.repairs,
                "startedUncaptured": pod.started_uncaptured,
                "connectionsOlder": pod.older,
                "connectionsCaptured": pod.captured,
                "draining": pod.condition == PodCondition::Releasing,
                "fence": {
                    "in": pod.fence.in_packets,
                    "out": pod.fence.out_packets,
                    "reply": pod.fence.lost_reply_packets,
                },
                "noListener": pod.no_listener_syns,
            })
        })
        .collect();
    let back_end = status.chosen.as_ref().map(|chosen| {
        let missing = |missing: &Unusable| {
            json!({
                "backEnd": missing.back_end.to_string(),
                "feature": missing.feature.to_string(),
                "reason": &*missing.reason,
            })
        };
        json!({
            "chosen": chosen.back_end.to_string(),
            "unusable": chosen.unusable.iter().map(missing).collect::<Vec<_>>(),
        })
    });
    json!({
        "version": { "version": env!("CARGO_PKG_VERSION"), "program": "podveil-node" },
        "standsBy": status.stands_by,
        "synced": status.synced,
        "proxyConnected": status.proxy_connected,
        "backEnd": back_end,
        "appliedVersion": &*status.applied_version,
        "cniPlugin": status.plugin.to_string(),
        "pods": pods,
    })
}
