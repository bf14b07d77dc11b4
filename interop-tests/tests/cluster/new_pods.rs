// SPDX-License-Identifier: Apache-2.0
//! Pods that come into an enrolled namespace.

use anyhow::ensure;
use podveil_cluster::enrolment::{first_tunnels, percentile};
use podveil_cluster::podveil::Podveil;
use std::time::Duration;

/// Far above the goal (p99 under 250 ms on a machine of its own): this one also builds and runs everything else.
const BOUND: Duration = Duration::from_secs(2);

pub fn a_new_pod_is_soon_reached_through_a_tunnel(podveil: &Podveil<'_>) -> anyhow::Result<()> {
    let times = first_tunnels(podveil, 20, 5)?;
    let [half, most] =
        [0.5, 0.99].map(|share| percentile(&times, share).map_or(Duration::MAX, |one| one.after));
    println!(
        "from a new pod's address to its first encrypted connection: p50 {half:?}, p99 {most:?}"
    );
    ensure!(half < BOUND, "half of them take {half:?} or longer");
    Ok(())
}
