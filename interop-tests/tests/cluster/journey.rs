// SPDX-License-Identifier: Apache-2.0
use anyhow::ensure;
use podveil_cluster::podveil::checkout_of_test;
use podveil_cluster::{Cluster, journey};

#[test]
#[ignore = "cluster"]
fn install_label_curl_and_uninstall_leave_everything_as_it_was() -> anyhow::Result<()> {
    let checkout = checkout_of_test()?;
    let cluster = Cluster::up(&checkout.podveilctl)?;
    let mut failed = Vec::new();
    journey::walk(&cluster, &checkout, &mut |promise, outcome| {
        match outcome {
            Ok(seen) => println!("holds: {promise}: {seen}"),
            Err(error) => failed.push(format!("{promise}: {error:#}")),
        }
        Ok(())
    })?;
    ensure!(failed.is_empty(), "\n{}", failed.join("\n"));
    Ok(())
}
