// SPDX-License-Identifier: Apache-2.0
//! What an operator does on a running cluster, under load.

use anyhow::Context;
use podveil_cluster::podveil::{Podveil, checkout_of_test, deployment, pod};
use podveil_cluster::{Cluster, Load};
use std::time::Duration;

const SETTLE: Duration = Duration::from_secs(60);

#[test]
#[ignore = "cluster"]
fn a_rollout_and_a_root_rotation_fail_no_request() -> anyhow::Result<()> {
    let checkout = checkout_of_test()?;
    let cluster = Cluster::up(&checkout.podveilctl)?;
    let podveil = Podveil::install(&cluster, &checkout, &[])?;
    cluster.apply(&format!(
        "apiVersion: v1\nkind: Namespace\nmetadata: {{ name: shop }}\n---\n{}{}",
        pod("shop", "client", "node-1"),
        deployment("shop", "web", 2)
    ))?;
    cluster.wait_for_pods("shop")?;
    podveil.label("shop", true)?;
    podveil.wait_for_stage("shop", "mandatory", SETTLE)?;
    let url = "http://web-service.shop/";

    let load = Load::start(&cluster, "shop", "client", &[url])?;
    for command in [["rollout", "restart"], ["rollout", "status"]] {
        cluster.kubectl(&[&command[..], &["deployment/web", "--namespace=shop"]].concat())?;
    }
    println!(
        "a rollout: {}",
        load.finish().context("while web was rolled out")?
    );

    let load = Load::start(&cluster, "shop", "client", &[url])?;
    podveil
        .ctl(&["rotate", "root"])
        .context("podveilctl rotate root")?;
    println!(
        "a rotation: {}",
        load.finish().context("while the root was rotated")?
    );
    Ok(())
}
