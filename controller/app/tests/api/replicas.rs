// SPDX-License-Identifier: Apache-2.0
//! Two replicas, no leader: what each says, and what one Lease decides.

use crate::node::Node;
use crate::objects::Pod;
use crate::world::{NAMESPACE, World, curl, holds};
use anyhow::{Context, ensure};
use podveil_model::{Epoch, Stage, Uid};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Their number in one namespace, over both nodes.
const PODS: usize = 200;

fn labelled() -> Value {
    json!({"io.cilium/mtls-enabled": "true"})
}

fn off() -> Value {
    json!({"io.cilium/mtls-enabled": null})
}

/// Pods of the network `10.244.<node>.<from>` on, in turns on both nodes.
async fn pods(world: &World, namespace: &str, count: usize) -> anyhow::Result<Vec<String>> {
    let mut uids = Vec::with_capacity(count);
    for number in 0..count {
        let node = number % 2 + 1;
        // Outside of what the other parts use, and inside of the node's range.
        let ip = format!(
            "fd00:10:244:{node}::{namespace_part}:{number:x}",
            namespace_part = namespace.len()
        );
        let (name, node, ip) = (format!("p{number}"), format!("n{node}"), [ip.as_str()]);
        uids.push(
            world
                .objects
                .pod(&Pod::new(namespace, &name, &node, &ip))
                .await?,
        );
    }
    Ok(uids)
}

fn all(uids: &[String]) -> Vec<&str> {
    uids.iter().map(String::as_str).collect()
}

/// Where a replica has each of these workloads.
async fn states(
    world: &World,
    replica: usize,
    uids: &BTreeSet<&str>,
) -> anyhow::Result<BTreeMap<String, (String, String)>> {
    let status = world.status(replica).await?;
    let workloads = status["workloads"].as_array().context("no workloads")?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    Ok(workloads
        .iter()
        .filter(|one| uids.contains(one["uid"].as_str().unwrap_or_default()))
        .map(|one| {
            (
                text(&one["uid"]),
                (text(&one["stage"]), text(&one["epoch"])),
            )
        })
        .collect())
}

pub async fn a_token_opens_no_stream(world: &mut World) -> anyhow::Result<()> {
    let accounts = format!("/api/v1/namespaces/{NAMESPACE}/serviceaccounts");
    // The best there is, and one for somebody else.
    for audience in ["podveil-ca", "istio-ca"] {
        let token = world
            .objects
            .post(
                &format!("{accounts}/podveil-node/token"),
                json!({"spec": {"audiences": [audience]}}),
            )
            .await?;
        let token = token.pointer("/status/token").and_then(Value::as_str);
        let authorization = format!("authorization: Bearer {}", token.context("no token")?);
        for stream in [
            "envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources",
            "podveil.node.v1.Reports/Report",
        ] {
            let url = format!("https://{}/{stream}", world.replicas[0].controller.address);
            let arguments = [
                "--silent",
                "--show-error",
                "--insecure",
                "--include",
                "--http2",
                "--max-time",
                "20",
                "--header",
                "content-type: application/grpc",
                "--header",
                &authorization,
                "--data-binary",
                "",
                &url,
            ];
            let (said, done) = curl(&arguments).await?;
            // Without a certificate there is no connection, and so no service that could look at a token.
            ensure!(!done && !said.contains("HTTP/"), "{stream}: {said}");
        }
    }
    Ok(())
}

pub async fn both_replicas_reach_the_same_states(world: &mut World) -> anyhow::Result<()> {
    world.objects.namespace("same", labelled()).await?;
    let uids = pods(world, "same", 20).await?;
    let named: BTreeSet<&str> = uids.iter().map(String::as_str).collect();
    for (labels, stage) in [
        (None, Stage::Mandatory),
        (Some(off()), Stage::None),
        (Some(labelled()), Stage::Mandatory),
    ] {
        if let Some(labels) = labels {
            world.objects.label("same", labels).await?;
        }
        for node in &world.nodes {
            node.reaches(stage, &all(&uids)).await?;
        }
        holds("both replicas say the same", async || {
            let a = states(world, 0, &named).await?;
            let b = states(world, 1, &named).await?;
            Ok(a == b
                && a.len() == uids.len()
                && a.values().all(|(at, _)| *at == stage.to_string()))
        })
        .await?;
    }
    Ok(())
}

/// Leads connections to one of several places, and cuts them when it is another.
async fn lead(listener: TcpListener, place: watch::Receiver<SocketAddr>) {
    while let Ok((mut from, _)) = listener.accept().await {
        let mut place = place.clone();
        tokio::spawn(async move {
            let to = *place.borrow_and_update();
            let Ok(mut to) = TcpStream::connect(to).await else {
                return;
            };
            tokio::select! {
                _ = tokio::io::copy_bidirectional(&mut from, &mut to) => {}
                _ = place.changed() => {}
            }
        });
    }
}

pub async fn a_node_that_changes_replica_gets_only_what_changed(
    world: &mut World,
) -> anyhow::Result<()> {
    world.objects.namespace("moving", labelled()).await?;
    let uids = pods(world, "moving", 20).await?;
    let addresses = [0, 1].map(|replica: usize| world.replicas[replica].controller.address);
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let leading = listener.local_addr()?;
    let (place, led) = watch::channel(addresses[0]);
    let leader = tokio::spawn(lead(listener, led));
    // In the place of n1, which is dropped: one node has one program of each kind.
    world.nodes[0] = Node::start(&world.authorities, "n1", leading, &addresses);
    let n1 = &world.nodes[0];
    n1.reaches(Stage::Mandatory, &all(&uids)).await?;
    let epochs = || -> BTreeMap<Uid, Epoch> {
        let view = n1.state.view();
        view.workloads()
            .map(|one| (one.uid.clone(), one.epoch))
            .collect()
    };
    for to in [addresses[1], addresses[0]] {
        // What is on its way has arrived when both replicas and the node agree.
        let named: BTreeSet<&str> = uids.iter().map(String::as_str).collect();
        holds("both replicas say the same", async || {
            Ok(states(world, 0, &named).await? == states(world, 1, &named).await?)
        })
        .await?;
        let (before, held) = (n1.updates(), epochs());
        ensure!(held.len() > uids.len());
        place.send_replace(to);
        let name = format!("after-{}", to.port());
        let ip = format!("fd00:10:244:2::77:{:x}", to.port());
        let new = world
            .objects
            .pod(&Pod::new("moving", &name, "n2", &[&ip]))
            .await?;
        n1.reaches(Stage::Mandatory, &[&new]).await?;
        // Its own steps (none, wanted, capturable, announced, mandatory; with an address and without, ready or not).
        let sent = n1.updates() - before;
        ensure!(sent <= 12, "{sent} updates after a change of replica");
        let now = epochs();
        for (uid, epoch) in &held {
            ensure!(
                now.get(uid).is_none_or(|now| now >= epoch),
                "{uid} went back"
            );
        }
    }
    leader.abort();
    world.nodes[0] = Node::start(&world.authorities, "n1", addresses[0], &addresses);
    world.nodes[0].reaches(Stage::Mandatory, &all(&uids)).await
}

pub async fn pods_that_flap_make_no_storm_of_events_and_one_replica_writes_them(
    world: &mut World,
) -> anyhow::Result<()> {
    world.objects.namespace("flapping", labelled()).await?;
    let uids = pods(world, "flapping", PODS).await?;
    for round in 0..3 {
        for node in &world.nodes {
            node.reaches(Stage::Mandatory, &all(&uids)).await?;
        }
        if round < 2 {
            world.objects.label("flapping", off()).await?;
            for node in &world.nodes {
                node.reaches(Stage::None, &all(&uids)).await?;
            }
            world.objects.label("flapping", labelled()).await?;
        }
    }
    holds("each pod is told once", async || {
        Ok(world.all_events("flapping").await?.len() >= PODS)
    })
    .await?;
    // A round later, seen by what comes after it.
    let last = Pod::new("flapping", "last", "n1", &["fd00:10:244:1::99:1"]);
    world.objects.pod(&last).await?;
    world.event("flapping", "last", "Enrolled", "").await?;
    let events = world.all_events("flapping").await?;
    ensure!(events.len() == PODS + 1, "{} events", events.len());
    let by: BTreeSet<_> = events.iter().map(|one| one.by.clone()).collect();
    ensure!(by.len() == 1, "written by {by:?}");

    // The Lease goes to the other one, which writes from then on, and nothing again.
    let holder = by.first().cloned().context("one")?;
    let index = world.replicas.iter().position(|one| one.name == holder);
    let gone = world.replicas.remove(index.context("one of ours")?);
    gone.stop().await?;
    let addresses = [world.replicas[0].controller.address];
    world.nodes = ["n1", "n2"]
        .map(|name| Node::start(&world.authorities, name, addresses[0], &addresses))
        .into();
    // It writes when it tells of this; good news from before are not told again.
    let typo = json!({"io.cilium/mtls-enabled": "jawohl"});
    world.objects.label("first", typo).await?;
    world.event("", "first", "BadSetting", "jawohl").await?;
    let next = Pod::new("flapping", "next", "n2", &["fd00:10:244:2::99:2"]);
    world.objects.pod(&next).await?;
    world.event("flapping", "next", "Enrolled", "").await?;
    let events = world.all_events("flapping").await?;
    ensure!(events.len() == PODS + 2, "{} events", events.len());
    let other = &world.replicas[0].name;
    let by_other = events.iter().filter(|one| one.by == *other).count();
    ensure!(by_other == 1, "{by_other} by {other}");
    Ok(())
}
