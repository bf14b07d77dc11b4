// SPDX-License-Identifier: Apache-2.0
//! The bed itself, without Podveil.

use anyhow::ensure;
use podveil_cluster::Cluster;
use podveil_cluster::podveil::{checkout_of_test, pod, wait_for_ways};
use podveil_sim::run;
use std::time::Instant;

#[test]
#[ignore = "cluster"]
fn pods_reach_each_other_by_name_and_address_and_nothing_is_left() -> anyhow::Result<()> {
    let began = Instant::now();
    let cluster = Cluster::up(&checkout_of_test()?.podveilctl)?;
    println!("up after {:?}", began.elapsed());
    cluster.apply(&format!(
        "{}{}{}",
        pod("default", "client", "node-1"),
        pod("default", "near", "node-1"),
        pod("default", "far", "node-2")
    ))?;
    cluster.wait_for_pods("default")?;
    println!("pods after {:?}", began.elapsed());
    for server in ["client", "near", "far"] {
        wait_for_ways(&cluster, ("default", "client"), ("default", server))?;
    }
    println!("curls after {:?}", began.elapsed());
    let folder = cluster.folder().to_owned();
    drop(cluster);
    println!("down after {:?}", began.elapsed());
    ensure!(!folder.exists(), "{} is left", folder.display());
    let cgroups = run("find", ["/sys/fs/cgroup", "-name", "bed*-node-*"])?;
    ensure!(cgroups.is_empty(), "cgroups are left: {cgroups}");
    let links = run("ip", ["-brief", "link"])?;
    ensure!(!links.contains("bed"), "a link is left: {links}");
    Ok(())
}
