// SPDX-License-Identifier: Apache-2.0
//! Podveil on real Kubernetes: two nodes, the chart, the images of this checkout.

mod new_pods;
mod operations;
mod outages;
mod restarts;
mod start_window;
mod strict;
mod upgrades;
mod workloads;

use anyhow::{Context, ensure};
use podveil_cluster::podveil::{Podveil, checkout_of_test};
use podveil_cluster::{Cluster, journey};

/// All on one cluster, since it takes longer to stand than to walk on; each part has namespaces of its own.
#[test]
#[ignore = "cluster"]
fn podveil_on_a_cluster() -> anyhow::Result<()> {
    let checkout = checkout_of_test()?;
    let cluster = Cluster::up(&checkout.podveilctl)?;
    let mut failed = Vec::new();
    let mut report = |promise: &str, outcome: anyhow::Result<String>| {
        said(&mut failed, promise, outcome);
        Ok(())
    };
    journey::walk(&cluster, &checkout, &[], &mut report)?;
    let values = [&journey::VALUES[..], &restarts::VALUES].concat();
    let podveil = Podveil::install(&cluster, &checkout, &values)?;
    for (promise, test) in [
        (
            "strict refuses everybody without identity but the kubelet",
            strict::strict_refuses_everybody_without_identity_but_the_kubelet
                as fn(&Podveil<'_>) -> anyhow::Result<()>,
        ),
        (
            "every kind of workload and Service is served",
            workloads::every_kind_of_workload_and_service_is_served,
        ),
        (
            "a new pod is soon reached through a tunnel",
            new_pods::a_new_pod_is_soon_reached_through_a_tunnel,
        ),
        (
            "a rollout and a root rotation fail no request",
            operations::a_rollout_and_a_root_rotation_fail_no_request,
        ),
        (
            "capture follows its pod through restarts, and leaves nothing of the old one",
            restarts::capture_follows_its_pod_and_leaves_nothing_of_the_old_one,
        ),
        (
            "an upgrade replaces what it changes, and connections notice only a new node program",
            upgrades::an_upgrade_replaces_what_it_changes_and_connections_notice_only_a_new_node_program,
        ),
        (
            "with the CNI plugin a pod sends and answers nothing in plain from its first instruction on",
            |podveil| start_window::a_pod_sends_and_answers_nothing_in_plain(podveil, 20, 5),
        ),
    ] {
        report(promise, test(&podveil).map(|()| String::new()))?;
    }
    report(
        "helm uninstall",
        podveil.uninstall().map(|()| String::new()),
    )?;
    report(
        "the CNI plugin is gone",
        start_window::no_node_has_the_plugin(&cluster).map(|()| String::new()),
    )?;
    all_hold(&failed)
}

fn said(failed: &mut Vec<String>, promise: &str, outcome: anyhow::Result<String>) {
    match outcome {
        Ok(seen) => println!("holds: {promise}: {seen}"),
        Err(error) => {
            println!("does NOT hold: {promise}: {error:#}");
            failed.push(format!("{promise}: {error:#}"));
        }
    }
}

fn all_hold(failed: &[String]) -> anyhow::Result<()> {
    let count = failed.len();
    ensure!(failed.is_empty(), "{count} do not hold: {failed:?}");
    Ok(())
}

/// The journey of `make test` is with what is chosen where nothing is set.
#[test]
#[ignore = "all"]
fn the_journey_by_nftables() -> anyhow::Result<()> {
    journey_with("--set=node.redirect.backEnd=nftables")
}

#[test]
#[ignore = "all"]
fn the_journey_by_iptables() -> anyhow::Result<()> {
    journey_with("--set=node.redirect.backEnd=iptables")
}

#[test]
#[ignore = "all"]
fn the_journey_on_demand() -> anyhow::Result<()> {
    journey_with("--set=node.proxy.onDemand=true")
}

fn journey_with(value: &str) -> anyhow::Result<()> {
    let checkout = checkout_of_test()?;
    let cluster = Cluster::up(&checkout.podveilctl)?;
    let mut failed = Vec::new();
    journey::walk(&cluster, &checkout, &[value], &mut |promise, outcome| {
        said(&mut failed, promise, outcome);
        Ok(())
    })?;
    all_hold(&failed)
}

/// A long one: `make test` has twenty pods of it.
#[test]
#[ignore = "all"]
fn two_hundred_pods_send_and_answer_nothing_in_plain() -> anyhow::Result<()> {
    let checkout = checkout_of_test()?;
    let cluster = Cluster::up(&checkout.podveilctl)?;
    let podveil = Podveil::install(&cluster, &checkout, &journey::VALUES)?;
    start_window::a_pod_sends_and_answers_nothing_in_plain(&podveil, 200, 10)
        .with_context(|| podveil.diagnosis())
}
