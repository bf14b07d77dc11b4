// SPDX-License-Identifier: Apache-2.0
//! Several replicas on one record.

use crate::world::{Ca, NAMESPACE, PATIENCE, World, holds, node};
use anyhow::{Context, ensure};
use podveil_proto::podveil::ca::v1::{RotateRequest, RotationEvent, RotationKind, RotationStep};
use serde_json::Value;
use std::collections::BTreeSet;

async fn holder(world: &World) -> anyhow::Result<String> {
    let path = "-o=jsonpath={.spec.holderIdentity}";
    world.kubectl(&["get", "lease", "podveil-ca", "-n", NAMESPACE, path], "")
}

async fn acts(world: &World, ca: &Ca) -> anyhow::Result<()> {
    let what = format!("{} acts", ca.name);
    holds(&what, async || Ok(holder(world).await? == ca.name)).await
}

/// The last event of a rotation, and the steps before it.
async fn rotate(ca: &Ca) -> anyhow::Result<(Vec<RotationStep>, RotationEvent)> {
    let request = RotateRequest {
        kind: RotationKind::Root.into(),
        timeout_seconds: 30,
    };
    let mut events = ca.admin().await?.rotate(request).await?.into_inner();
    let mut steps = Vec::new();
    let mut last = None;
    let reading = async {
        while let Some(event) = events.message().await? {
            if steps.last() != Some(&event.step()) {
                steps.push(event.step());
            }
            last = Some(event);
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(2 * PATIENCE, reading).await??;
    Ok((steps, last.context("no event")?))
}

pub async fn two_replicas_that_start_at_once_have_one_root_and_one_acts(
    world: &mut World,
) -> anyhow::Result<()> {
    let (a, b) = tokio::join!(world.ca("podveil-ca-a"), world.ca("podveil-ca-b"));
    let (a, b) = (a?, b?);
    ensure!(a.status().await?.authorities == b.status().await?.authorities);
    holds("one acts", async || Ok(!holder(world).await?.is_empty())).await?;
    let first = holder(world).await?;
    let (acting, other) = if first == a.name { (a, b) } else { (b, a) };
    let request = RotateRequest {
        kind: RotationKind::Leaf.into(),
        timeout_seconds: 0,
    };
    let refused = other.admin().await?.rotate(request).await.err();
    let refused = refused.context("two replicas act")?;
    ensure!(
        refused.code() == tonic::Code::FailedPrecondition,
        "{refused}"
    );
    ensure!(refused.message().contains(&acting.name), "{refused}");
    // One that ends in good order gives the lease back: nobody waits for it to run out.
    acting.stop().await?;
    acts(world, &other).await?;
    other.stop().await
}

pub async fn a_rotation_waits_for_programs_of_every_replica(
    world: &mut World,
) -> anyhow::Result<()> {
    let a = world.ca("podveil-ca-a").await?;
    acts(world, &a).await?;
    let b = world.ca("podveil-ca-b").await?;
    let mut programs = Vec::new();
    for (pod, on, ca) in [("node-1", "n1", &a), ("node-2", "n2", &b)] {
        world.pod(NAMESPACE, pod, "podveil-node", on)?;
        let token = world.token(NAMESPACE, "podveil-node", Some(pod), "podveil-ca", 3600)?;
        let program = world
            .program(ca.address(), node(on)?, &token, &ca.stop)
            .await?;
        tokio::time::timeout(PATIENCE, program.ready()).await?;
        holds("its bundle stream is there", async || {
            Ok(ca.status().await?.consumers.len() == 2)
        })
        .await?;
        programs.push(program);
    }
    let before = serials(&world.journal().await?);
    let (steps, last) = rotate(&a).await?;
    ensure!(last.step() == RotationStep::Done, "{steps:?} {last:?}");
    // Both CAs, both nodes.
    ensure!((last.acknowledged, last.expected) == (4, 4), "{last:?}");
    let after = serials(&world.journal().await?);
    ensure!(before.is_disjoint(&after), "{before:?} {after:?}");
    for program in &programs {
        let now = program.current().context("no SVID")?;
        ensure!(now.svid.generation() == 2 && now.bundle.roots.len() == 1);
    }
    holds("the other replica issues by the new root", async || {
        Ok(b.status().await?.authorities == a.status().await?.authorities)
    })
    .await?;
    let published = world.roots().await?.context("no roots")?;
    ensure!(published.matches("BEGIN CERTIFICATE").count() == 1);
    holds("nothing is left of the summaries", async || {
        let path = "-o=jsonpath={.data}";
        let arguments = [
            "get",
            "configmap",
            "podveil-ca-replicas",
            "-n",
            NAMESPACE,
            path,
        ];
        let left = world.kubectl(&arguments, "")?;
        Ok(left.is_empty() || left == "{}")
    })
    .await?;
    b.stop().await?;
    a.stop().await
}

pub async fn a_replica_that_runs_and_is_silent_stops_a_rotation_and_is_named(
    world: &mut World,
) -> anyhow::Result<()> {
    let a = world.ca("podveil-ca-a").await?;
    acts(world, &a).await?;
    // A pod that runs by what the API server knows, and no program that answers for it.
    world.pod(NAMESPACE, "podveil-ca-silent", "podveil-ca", "n2")?;
    let request = RotateRequest {
        kind: RotationKind::Root.into(),
        timeout_seconds: 3,
    };
    let mut events = a.admin().await?.rotate(request).await?.into_inner();
    let mut last = None;
    while let Some(event) = events.message().await? {
        last = Some(event);
    }
    let last = last.context("no event")?;
    ensure!(last.step() == RotationStep::Failed, "{last:?}");
    ensure!(
        last.waiting_for == ["podveil-ca podveil-ca-silent"],
        "{last:?}"
    );
    ensure!(
        serials(&world.journal().await?).len() == 3,
        "nothing is withdrawn"
    );

    world.delete(NAMESPACE, "pod", "podveil-ca-silent")?;
    let (steps, last) = rotate(&a).await?;
    ensure!(last.step() == RotationStep::Done, "{steps:?} {last:?}");
    a.stop().await
}

pub async fn a_rotation_survives_the_replica_that_acts(world: &mut World) -> anyhow::Result<()> {
    let a = world.ca("podveil-ca-a").await?;
    acts(world, &a).await?;
    let b = world.ca("podveil-ca-b").await?;
    world.pod(NAMESPACE, "podveil-ca-silent", "podveil-ca", "n2")?;
    let request = RotateRequest {
        kind: RotationKind::Root.into(),
        timeout_seconds: 60,
    };
    let mut events = a.admin().await?.rotate(request).await?.into_inner();
    // The new root is added, and the step waits for the silent replica.
    while let Some(event) = events.message().await? {
        if !event.waiting_for.is_empty() {
            break;
        }
    }
    ensure!(world.journal().await?["rotation"]["phase"] == "root_added");
    world.delete(NAMESPACE, "pod", "podveil-ca-a")?;
    a.stop().await?;
    world.delete(NAMESPACE, "pod", "podveil-ca-silent")?;
    holds("b brings it to its end", async || {
        Ok(world.journal().await?["rotation"].is_null())
    })
    .await?;
    ensure!(b.status().await?.certificate_generation == 2);
    ensure!(serials(&world.journal().await?).len() == 2);
    b.stop().await
}

fn serials(journal: &Value) -> BTreeSet<String> {
    let roots = journal["roots"].as_array().into_iter().flatten();
    roots
        .chain([&journal["issuing"]])
        .filter_map(|serial| serial.as_str().map(ToOwned::to_owned))
        .collect()
}
