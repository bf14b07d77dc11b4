// SPDX-License-Identifier: Apache-2.0
//! The goals of a large cluster, in small. `cargo xtask bench scale` measures the large one.

use anyhow::{Context, ensure};
use podveil_cluster::ApiServer;
use podveil_scale::{Api, Bed, Size, load, measure};
use std::path::PathBuf;

/// The folder that cargo has built the programs into: the parent of the one that this test is in.
fn binaries() -> anyhow::Result<PathBuf> {
    let test = std::env::current_exe()?;
    let folder = test.ancestors().nth(2).context("a test lies in deps")?;
    Ok(folder.to_owned())
}

#[test]
#[ignore = "cluster"]
fn the_cost_of_a_cluster_does_not_grow_with_its_nodes() -> anyhow::Result<()> {
    let server = ApiServer::start()?;
    let runtime = tokio::runtime::Runtime::new()?;
    let api = runtime.block_on(Api::new(server.kubeconfig()))?;
    runtime.block_on(load(&api, &Size::SMALL))?;
    let binaries = binaries()?;
    let measure = |size| {
        let figures = runtime.block_on(measure(Bed {
            api: &api,
            size,
            binaries: &binaries,
        }))?;
        println!("{figures}");
        // Of counts, not of time: programs built for tests share the machine. Renewals of the lease, and a watch that the
        // server ends now and then.
        let at_rest = figures.requests_at_rest_alone.max(figures.requests_at_rest);
        ensure!(at_rest <= 60.0, "{at_rest} requests a minute at rest");
        ensure!(
            figures.requests_per_change < 0.5,
            "{} requests for each change",
            figures.requests_per_change
        );
        let restart = figures.restart.context("the controller was restarted")?;
        ensure!(restart.sent_again == 0, "{restart:?}");
        ensure!(figures.connected.peak < 200.0 && figures.node.peak < 100.0);
        anyhow::Ok(figures.updates_per_change)
    };
    // To each proxy once, and to no redirect module, since it is a change of who is ready.
    let sent = measure(Size::SMALL)?;
    ensure!(
        (1.0..1.5).contains(&sent),
        "{sent} resources sent to each node for each change"
    );
    let sent = measure(Size {
        on_demand: true,
        ..Size::SMALL
    })?;
    ensure!(
        sent < 0.8,
        "{sent} resources sent to each node for each change, though half of them do not talk to the pod"
    );
    Ok(())
}
