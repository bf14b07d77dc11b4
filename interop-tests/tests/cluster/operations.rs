// SPDX-License-Identifier: Apache-2.0
//! What an operator does on a running cluster, under load.

use anyhow::Context;
use podveil_cluster::Load;
use podveil_cluster::podveil::{Podveil, deployment, pod};
use std::time::Duration;

const SETTLE: Duration = Duration::from_secs(60);

pub fn a_rollout_and_a_root_rotation_fail_no_request(podveil: &Podveil<'_>) -> anyhow::Result<()> {
    let cluster = podveil.cluster;
    cluster.apply(&format!(
        "apiVersion: v1\nkind: Namespace\nmetadata: {{ name: market }}\n---\n{}{}",
        pod("market", "client", "node-1"),
        deployment("market", "web", 2)
    ))?;
    cluster.wait_for_pods("market")?;
    podveil.label("market", true)?;
    podveil.wait_for_stage("market", "mandatory", SETTLE)?;
    let url = "http://web-service.market/";

    let load = Load::start(cluster, "market", "client", &[url])?;
    for command in [["rollout", "restart"], ["rollout", "status"]] {
        cluster.kubectl(&[&command[..], &["deployment/web", "--namespace=market"]].concat())?;
    }
    println!(
        "a rollout: {}",
        load.finish().context("while web was rolled out")?
    );

    let load = Load::start(cluster, "market", "client", &[url])?;
    podveil
        .ctl(&["rotate", "root"])
        .context("podveilctl rotate root")?;
    println!(
        "a rotation: {}",
        load.finish().context("while the root was rotated")?
    );
    Ok(())
}
