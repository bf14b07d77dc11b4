// SPDX-License-Identifier: Apache-2.0
//! What the Job of an uninstallation waits for.

use crate::objects::Pod;
use crate::world::World;
use anyhow::{Context, ensure};
use podveil_controller::uninstall;
use podveil_model::Stage;
use serde_json::json;
use std::time::Duration;

/// Above the 10 s after which a node is silent, with room for a busy machine.
const LONG_ENOUGH: Duration = Duration::from_secs(15);

pub async fn a_silent_node_is_waited_for_and_named(world: &mut World) -> anyhow::Result<()> {
    let labels = json!({"io.cilium/mtls-enabled": "true"});
    world.objects.namespace("deserted", labels).await?;
    let pod = Pod::new("deserted", "web", "n2", &["10.244.2.250"]);
    let uid = world.objects.pod(&pod).await?;
    world.nodes[0]
        .reaches(Stage::Mandatory, &[uid.as_str()])
        .await?;
    let silent = world.nodes.pop().context("two nodes")?;
    drop(silent);

    let client = || world.objects.0.clone();
    let waited = uninstall(client(), crate::world::NAMESPACE, LONG_ENOUGH, false).await;
    let sentence = format!("{:#}", waited.err().context("nobody was waited for")?);
    ensure!(
        sentence.contains("for: redirect on n2, silent: ")
            && sentence.contains("delete the Node objects"),
        "{sentence}"
    );
    // The request has been taken back, and what could be heard is enrolled again or still is.
    uninstall(client(), crate::world::NAMESPACE, 3 * LONG_ENOUGH, true)
        .await
        .context("with silent nodes left out")?;
    // A machine that is gone is waited for by nobody.
    world.objects.delete("/api/v1/nodes/n2", 0).await?;
    uninstall(client(), crate::world::NAMESPACE, 3 * LONG_ENOUGH, false)
        .await
        .context("without the node")
}
