// SPDX-License-Identifier: Apache-2.0
//! The source against a real API server: Kubernetes' traps, one test each.

mod relay;
mod world;

use podveil_source::{Phase, Pod, Target};
use serde_json::json;
use std::sync::Arc;
use std::time::Instant;
use world::{PATIENCE, World, named};

#[tokio::test(flavor = "multi_thread")]
#[ignore = "cluster"]
async fn the_cluster_is_read_as_it_behaves() {
    // One server for all of it: each part has a namespace of its own.
    let mut world = World::start().await;
    pods_are_known_by_uid_and_finished_ones_are_named(&world).await;
    what_nobody_reads_wakes_nobody(&world).await;
    endpoints_come_from_all_slices(&world).await;
    absurd_objects_are_cut_down(&world).await;
    a_label_is_seen_and_its_removal(&world).await;
    a_watch_that_is_dead_or_gone_is_followed_again_and_nothing_else_changes(&mut world).await;
    a_server_that_dies_changes_nothing_and_is_said(&mut world).await;
}

async fn pods_are_known_by_uid_and_finished_ones_are_named(world: &World) {
    world.namespace("pods", json!({})).await;
    world.pod("pods", "db-0", json!({})).await;
    world
        .pod_status(
            "pods",
            "db-0",
            json!({"phase": "Running", "podIPs": [{"ip": "10.244.0.5"}, {"ip": "fd00::5"}]}),
        )
        .await;
    let first = world
        .until("both families", |cluster| {
            named(cluster, "db-0").filter(|pod| pod.addresses.len() == 2)
        })
        .await;
    assert_eq!(first.phase, Phase::Running);
    assert!(!first.ready);

    // A StatefulSet's pod is replaced under the same name, and a finished one keeps its address in its status.
    world.delete_pod("pods", "db-0").await;
    world.pod("pods", "db-0", json!({})).await;
    let second = world
        .until("the new one alone", |cluster| {
            named(cluster, "db-0").filter(|pod| pod.uid != first.uid)
        })
        .await;
    assert!(
        second.addresses.is_empty(),
        "bound, and without an address yet"
    );
    assert!(second.version > first.version);
    world
        .pod_status(
            "pods",
            "db-0",
            json!({"phase": "Succeeded", "podIPs": [{"ip": "10.244.0.5"}]}),
        )
        .await;
    world
        .until("finished", |cluster| {
            named(cluster, "db-0").filter(|pod| pod.phase == Phase::Succeeded)
        })
        .await;
}

async fn what_nobody_reads_wakes_nobody(world: &World) {
    world.namespace("quiet", json!({})).await;
    world.pod("quiet", "idle", json!({})).await;
    world.until("there", |cluster| named(cluster, "idle")).await;
    let before = world.changes();
    world
        .annotate_pod("quiet", "idle", json!({"example.com/heartbeat": "1"}))
        .await;
    // What comes after it on the same watch has come: so has the annotation.
    world.pod("quiet", "after", json!({})).await;
    world
        .until("after", |cluster| named(cluster, "after"))
        .await;
    assert_eq!(world.changes(), before + 1);
}

async fn endpoints_come_from_all_slices(world: &World) {
    world.namespace("shop", json!({})).await;
    world.pod("shop", "web", json!({})).await;
    let web = world.until("web", |cluster| named(cluster, "web")).await;
    world
        .service(
            "shop",
            "web",
            json!({
                "selector": {"app": "web"}, "type": "NodePort", "internalTrafficPolicy": "Local",
                "sessionAffinity": "ClientIP", "externalIPs": ["192.0.2.7"],
                "ports": [{"name": "http", "port": 80, "targetPort": "http", "nodePort": 30080}],
            }),
        )
        .await;
    world
        .service(
            "shop",
            "headless",
            json!({"clusterIP": "None", "ports": [{"port": 80}]}),
        )
        .await;
    world
        .service(
            "shop",
            "elsewhere",
            json!({"type": "ExternalName", "externalName": "example.com"}),
        )
        .await;
    let endpoint = |address: &str, conditions: serde_json::Value| json!({"addresses": [address], "conditions": conditions});
    let pod =
        json!({"kind": "Pod", "namespace": "shop", "name": "web", "uid": web.uid.to_string()});
    for (slice, port, endpoints) in [
        (
            "web-a",
            8080,
            json!([
                {"addresses": ["10.244.0.9"], "targetRef": pod, "conditions": {"ready": true}},
                endpoint("192.0.2.1", json!({"ready": true})),
                endpoint("192.0.2.2", json!({"ready": false, "serving": false})),
                endpoint("192.0.2.3", json!({"ready": false, "serving": true, "terminating": true})),
            ]),
        ),
        // During a move one address is in two slices.
        (
            "web-b",
            8080,
            json!([{"addresses": ["10.244.0.9"], "targetRef": pod, "conditions": {"ready": true}}]),
        ),
        ("web-c", 9090, json!([endpoint("192.0.2.4", json!({}))])),
    ] {
        world
            .slice("shop", slice, "web", "http", port, endpoints)
            .await;
    }
    let entry = world
        .until("all slices", |cluster| {
            cluster
                .services
                .iter()
                .find(|service| &*service.name == "web" && service.endpoints.len() == 3)
                .cloned()
        })
        .await;
    let ports = |target: &Target| {
        let found = entry.endpoints.iter().find(|one| one.target == *target);
        found.and_then(|one| one.ports.get(&80)).copied()
    };
    assert_eq!(ports(&Target::Pod(web.uid.clone())), Some(8080));
    assert_eq!(
        ports(&Target::Address("192.0.2.1".parse().unwrap())),
        Some(8080)
    );
    assert_eq!(
        ports(&Target::Address("192.0.2.4".parse().unwrap())),
        Some(9090)
    );
    assert_eq!(entry.node_ports.get(&30080), Some(&80));
    assert!(entry.addresses.contains(&"192.0.2.7".parse().unwrap()));
    assert!(entry.balancing.only_preferred && entry.balancing.affinity.is_some());
    let cluster = world.cluster();
    let find = |name: &str| cluster.services.iter().find(|one| &*one.name == name);
    assert!(find("headless").unwrap().addresses.is_empty());
    assert!(find("elsewhere").is_none());
}

async fn absurd_objects_are_cut_down(world: &World) {
    world.namespace("absurd", json!({})).await;
    let ports: Vec<_> = (1..=10_000)
        .map(|port| json!({"containerPort": port, "hostPort": port}))
        .collect();
    let annotations = json!({
        "podveil.io/exclude-inbound-ports": "1,".repeat(50_000),
        "example.com/large": "x".repeat(150_000),
    });
    world
        .pod(
            "absurd",
            "huge",
            json!({"ports": ports, "annotations": annotations}),
        )
        .await;
    let huge: Arc<Pod> = world.until("huge", |cluster| named(cluster, "huge")).await;
    assert!(huge.host_ports.len() <= 256, "{}", huge.host_ports.len());
    assert_eq!(huge.annotations.len(), 1);
    assert!(huge.annotations.values().all(|value| value.len() < 4096));
}

async fn a_label_is_seen_and_its_removal(world: &World) {
    let labels = json!({"io.cilium/mtls-enabled": "true", "other": "x"});
    world.namespace("labelled", labels).await;
    world.pod("labelled", "in", json!({})).await;
    let wants = |cluster: &podveil_source::Cluster| {
        named(cluster, "in").map(|pod| cluster.wants_enrolment(&pod))
    };
    world
        .until("wanted", |cluster| wants(cluster).filter(|wants| *wants))
        .await;
    world
        .label_namespace("labelled", json!({"io.cilium/mtls-enabled": null}))
        .await;
    world
        .until("not wanted", |cluster| {
            wants(cluster).filter(|wants| !wants)
        })
        .await;
}

/// The API server's machine answers for it, and it says nothing; and one that has forgotten where the watch was.
async fn a_watch_that_is_dead_or_gone_is_followed_again_and_nothing_else_changes(
    world: &mut World,
) {
    world.namespace("relayed", json!({})).await;
    world.pod("relayed", "stays", json!({})).await;
    world.pod("relayed", "goes", json!({})).await;
    let far = world.relayed().await;
    let before = far
        .until("both", |cluster| {
            named(cluster, "goes").and_then(|_| named(cluster, "stays"))
        })
        .await;

    // Nothing is said any more on what is open, and nobody is told.
    far.relay.stall();
    let stalled = Instant::now();
    world.pod("relayed", "comes", json!({})).await;
    far.until("seen in spite of it", |cluster| named(cluster, "comes"))
        .await;
    println!(
        "a dead watch is followed again after {:.1?}",
        stalled.elapsed()
    );
    assert!(
        stalled.elapsed() < 4 * PATIENCE.silence,
        "{:?}",
        stalled.elapsed()
    );

    // While it is away things change, and the server forgets how.
    let version = far.cluster().version;
    far.relay.close();
    far.until_status("a fault", |status| status.error.is_some())
        .await;
    world.delete_pod("relayed", "goes").await;
    world.kill_server();
    world.resume_server();
    assert_eq!(
        world.watch_from(version).await,
        Some(410),
        "it has not forgotten"
    );
    far.relay.open();
    let after = far
        .until("the list is read again", |cluster| {
            match named(cluster, "goes") {
                None => named(cluster, "stays"),
                Some(_) => None,
            }
        })
        .await;
    // What has not changed is what it was: nothing of it is told again.
    assert!(Arc::ptr_eq(&before, &after));
}

async fn a_server_that_dies_changes_nothing_and_is_said(world: &mut World) {
    let pods = world.cluster().pods.len();
    world.kill_server();
    world
        .until_status("a fault", |status| status.error.is_some())
        .await;
    assert_eq!(world.cluster().pods.len(), pods);
    world.resume_server();
    // Whether the watch goes on or has to list again: what was deleted meanwhile is gone.
    world.delete_pod("quiet", "idle").await;
    world.pod("shop", "later", json!({})).await;
    world
        .until("later", |cluster| named(cluster, "later"))
        .await;
    world
        .until("gone", |cluster| {
            named(cluster, "idle").is_none().then_some(())
        })
        .await;
    world
        .until_status("no fault", |status| status.error.is_none())
        .await;
}
