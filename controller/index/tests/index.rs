// SPDX-License-Identifier: Apache-2.0
//! The index as the controller drives it: states of the cluster and reports in, snapshots out.

#[path = "index/world.rs"]
mod world;

use podveil_index::{
    Condition, Done, Held, Index, Module, NotBegun, Report, SILENCE, Saved, Start,
};
use podveil_model::{Epoch, External, Health, Mode, Stage};
use std::sync::Arc;
use std::time::Duration;
use world::World;

const LABELLED: &str = "
namespaces: [{name: shop, labels: {io.cilium/mtls-enabled: 'true'}}]
workloads:
- {name: web, namespace: shop, uid: web, node: n1, serviceAccount: web, addresses: [10.0.0.1]}
";
const UNLABELLED: &str = "
namespaces: [{name: shop}]
workloads:
- {name: web, namespace: shop, uid: web, node: n1, serviceAccount: web, addresses: [10.0.0.1]}
";

/// On two nodes, with all four programs connected and `web` ready on its own node from the first report.
fn mandatory() -> World {
    let mut world = World::new();
    world.apply(LABELLED);
    world.report_all(&["web"]);
    assert_eq!(world.stage("web"), Stage::Announced);
    world.report_all(&["web"]);
    assert_eq!(world.stage("web"), Stage::Mandatory);
    world
}

#[test]
fn a_labelled_workload_goes_all_the_way_in() {
    let mut world = World::new();
    world.apply(LABELLED);
    assert_eq!(world.stage("web"), Stage::Wanted);

    world.report("n1", Module::Redirect, &[("web", Condition::Ready)]);
    assert_eq!(
        world.stage("web"),
        Stage::Wanted,
        "the proxy is not ready yet"
    );
    world.report("n1", Module::Proxy, &[("web", Condition::Pending)]);
    assert_eq!(world.stage("web"), Stage::Wanted);
    assert_eq!(world.reason("web"), "proxy on n1: not ready");
    world.report("n1", Module::Proxy, &[("web", Condition::Ready)]);
    assert_eq!(world.stage("web"), Stage::Announced);
    assert_eq!(
        world.stages_published("web"),
        [Stage::Wanted, Stage::Capturable, Stage::Announced]
    );

    world.report("n1", Module::Proxy, &[("web", Condition::Ready)]);
    world.report("n1", Module::Redirect, &[("web", Condition::Ready)]);
    world.report("n2", Module::Proxy, &[]);
    assert_eq!(
        world.stage("web"),
        Stage::Announced,
        "one program is missing"
    );
    assert!(
        world.reason("web").contains("redirect on n2"),
        "{}",
        world.reason("web")
    );
    world.report("n2", Module::Redirect, &[]);
    assert_eq!(world.stage("web"), Stage::Mandatory);
    assert_eq!(world.reason("web"), "");
}

#[test]
fn an_old_readiness_does_not_count() {
    let mut world = mandatory();
    world.apply(UNLABELLED);
    world.report_all(&["web"]);
    assert_eq!(world.stage("web"), Stage::None);
    let before = world.number;
    world.apply(LABELLED);
    assert_eq!(world.stage("web"), Stage::Wanted);
    // A report on its way since before: ready, but not for this time.
    world.report_at("n1", Module::Proxy, before, &[("web", Condition::Ready)]);
    world.report_at("n1", Module::Redirect, before, &[("web", Condition::Ready)]);
    assert_eq!(world.stage("web"), Stage::Wanted);
    world.report_all(&["web"]);
    assert_eq!(world.stage("web"), Stage::Announced);
}

#[test]
fn a_silent_node_is_skipped_and_named() {
    let mut world = World::new();
    world.apply(LABELLED);
    world.report("n1", Module::Redirect, &[("web", Condition::Ready)]);
    world.report("n1", Module::Proxy, &[("web", Condition::Ready)]);
    world.advance(SILENCE / 2);
    world.report("n1", Module::Redirect, &[("web", Condition::Ready)]);
    world.report("n1", Module::Proxy, &[("web", Condition::Ready)]);
    assert_eq!(world.stage("web"), Stage::Announced);

    let wakeup = world.index.next_wakeup().unwrap();
    world.advance(wakeup - world.now);
    assert_eq!(world.stage("web"), Stage::Mandatory);
    let status = world.index.status(world.now);
    let silent: Vec<_> = status
        .nodes
        .iter()
        .filter(|node| node.is_silent())
        .collect();
    assert_eq!(silent.len(), 1);
    assert_eq!(silent.first().unwrap().name.as_str(), "n2");
    assert_eq!(world.index.next_wakeup(), None, "nothing waits any more");
}

#[test]
fn a_label_taken_off_drains_first() {
    let mut world = mandatory();
    world.apply(UNLABELLED);
    assert_eq!(world.stage("web"), Stage::Draining);
    world.report("n1", Module::Redirect, &[("web", Condition::Ready)]);
    world.report("n1", Module::Proxy, &[("web", Condition::Ready)]);
    world.report("n2", Module::Redirect, &[]);
    assert_eq!(world.stage("web"), Stage::Draining);
    world.report("n2", Module::Proxy, &[]);
    assert_eq!(world.stage("web"), Stage::None);
}

#[test]
fn a_label_put_back_while_draining_is_announced_again_at_once() {
    let mut world = mandatory();
    world.apply(UNLABELLED);
    assert_eq!(world.stage("web"), Stage::Draining);
    world.apply(LABELLED);
    assert_eq!(
        world.stage("web"),
        Stage::Announced,
        "peers never stopped tunnelling to it"
    );
    world.report_all(&["web"]);
    assert_eq!(world.stage("web"), Stage::Mandatory);
}

#[test]
fn a_label_taken_off_before_announcement_needs_no_draining() {
    for reports in 0..3 {
        let mut world = World::new();
        world.apply(LABELLED);
        for _ in 0..reports {
            world.report_all(&["web"]);
        }
        world.apply(UNLABELLED);
        let announced = reports > 0;
        let expected = if announced {
            Stage::Draining
        } else {
            Stage::None
        };
        assert_eq!(world.stage("web"), expected);
        world.report_all(&["web"]);
        assert_eq!(world.stage("web"), Stage::None);
    }
}

#[test]
fn epochs_grow_with_every_stage_published() {
    let mut world = mandatory();
    for text in [UNLABELLED, LABELLED, UNLABELLED] {
        world.apply(text);
        world.report_all(&["web"]);
        world.report_all(&["web"]);
    }
    let epochs = world.epochs_published("web");
    assert!(epochs.len() > 8);
    assert!(epochs.is_sorted_by(|a, b| a < b), "{epochs:?}");
}

#[test]
fn a_node_that_is_no_longer_ready_takes_nothing_out() {
    let mut world = mandatory();
    world.report("n1", Module::Proxy, &[("web", Condition::Pending)]);
    world.report("n1", Module::Redirect, &[]);
    world.disconnect("n1", Module::Proxy);
    world.advance(SILENCE * 2);
    assert_eq!(world.stage("web"), Stage::Mandatory);
}

#[test]
fn a_removed_workload_is_gone_at_once() {
    let mut world = mandatory();
    world.apply("namespaces: [{name: shop, labels: {io.cilium/mtls-enabled: 'true'}}]");
    assert!(world.find("web").is_none());
    assert!(world.index.saved().workloads.is_empty());
}

#[test]
fn who_is_enrolled() {
    // Labels of the namespace, the rest of the workload, is it wanted?
    let on = "io.cilium/mtls-enabled: 'true'";
    for (labels, workload, wanted) in [
        (on, "", true),
        ("", "", false),
        ("io.cilium/mtls-enabled: 'TRUE'", "", false),
        (on, "labels: {io.cilium/mtls-enabled: 'false'}", false),
        (on, "labels: {io.cilium/mtls-enabled: 'true'}", true),
        ("", "labels: {io.cilium/mtls-enabled: 'true'}", false),
        (
            "io.cilium/mtls-enabled: 'true', podveil.io/mode: strict",
            "labels: {io.cilium/mtls-enabled: 'false'}",
            true,
        ),
        (on, "hostNetwork: true", false),
        (on, "phase: Terminating", false),
        (on, "ready: false", true),
    ] {
        let mut world = World::new();
        world.apply(&format!(
            "
namespaces: [{{name: shop, labels: {{{labels}}}}}]
workloads:
- {{name: web, namespace: shop, uid: web, node: n1, serviceAccount: web, addresses: [10.0.0.1], {workload}}}
"
        ));
        let expected = if wanted { Stage::Wanted } else { Stage::None };
        assert_eq!(world.stage("web"), expected, "{labels} {workload}");
    }
}

#[test]
fn a_terminating_workload_keeps_its_stage() {
    let mut world = mandatory();
    world.apply(&LABELLED.replace("addresses", "phase: Terminating, addresses"));
    let web = world.workload("web");
    assert_eq!(
        (web.stage, web.health),
        (Stage::Mandatory, Health::Terminating)
    );
}

#[test]
fn a_change_that_decides_nothing_leaves_the_epoch() {
    let mut world = mandatory();
    let before = world.workload("web");
    world.apply(&LABELLED.replace("addresses", "ready: false, addresses"));
    let after = world.workload("web");
    assert_eq!(after.epoch, before.epoch);
    assert_eq!(after.health, Health::Unhealthy);
}

#[test]
fn a_mode_that_cannot_be_read_keeps_the_last_good_one() {
    let mut world = World::new();
    let with =
        |mode: &str| LABELLED.replace("'true'}", &format!("'true', podveil.io/mode: {mode}}}"));
    world.apply(&with("strict"));
    let strict = world.workload("web");
    assert_eq!(strict.mode, Mode::Strict);
    world.apply(&with("srtict"));
    assert_eq!(world.workload("web").mode, Mode::Strict);
    let namespaces = world.index.status(world.now).namespaces;
    let (shop, conditions) = namespaces.first_key_value().unwrap();
    assert_eq!(shop.as_str(), "shop");
    assert!(
        conditions.iter().any(|text| text.contains("srtict")),
        "{conditions:?}"
    );
    world.apply(&with("permissive"));
    let permissive = world.workload("web");
    assert_eq!(permissive.mode, Mode::Permissive);
    assert!(permissive.epoch > strict.epoch);
    world.apply(&with("srtict"));
    assert_eq!(world.workload("web").mode, Mode::Permissive);
}

#[test]
fn a_value_that_cannot_be_read_is_the_strictest_where_no_good_one_is_known() {
    let bad = LABELLED.replace(
        "'true'}",
        "'true', podveil.io/mode: Strict, podveil.io/external: none, podveil.io/pod-opt-out: no one}",
    );
    let out = bad.replace(
        "addresses",
        "labels: {io.cilium/mtls-enabled: 'false'}, addresses",
    );
    // Also where the namespace was there before: unlabelled, it had no setting of consequence.
    for before in [None, Some(UNLABELLED)] {
        let mut world = World::new();
        if let Some(before) = before {
            world.apply(before);
        }
        world.apply(&out);
        let web = world.workload("web");
        assert_eq!((web.mode, web.external), (Mode::Strict, External::Refuse));
        assert_eq!(web.stage, Stage::Wanted, "it may not opt out");
        let namespaces = world.index.status(world.now).namespaces;
        let conditions = namespaces.first_key_value().unwrap().1;
        assert_eq!(conditions.len(), 3);
        assert!(
            conditions
                .iter()
                .all(|text| text.ends_with("the strictest counts"))
        );
    }
    // Of before a restart the mode is known, and nothing else.
    let mut world = mandatory();
    world.apply(LABELLED);
    let mut world = World::restored(world.index.saved());
    world.apply(&bad);
    let web = world.workload("web");
    assert_eq!(
        (web.mode, web.external),
        (Mode::Permissive, External::Refuse)
    );
}

#[test]
fn ports_that_cannot_be_read_keep_the_last_good_ones() {
    let mut world = World::new();
    let with = |ports: &str| {
        let annotations =
            format!("annotations: {{podveil.io/exclude-inbound-ports: '{ports}'}}, addresses");
        LABELLED.replace("addresses", &annotations)
    };
    world.apply(&with("9090, 9091"));
    assert_eq!(world.workload("web").exclude_inbound_ports.len(), 2);
    world.apply(&with("9090, many"));
    assert_eq!(world.workload("web").exclude_inbound_ports.len(), 2);
    assert!(world.conditions("web").contains("many"));
    world.apply(&with("9090").replace("'true'}", "'true', podveil.io/mode: strict}"));
    assert!(world.workload("web").exclude_inbound_ports.is_empty());
    assert!(world.conditions("web").contains("strict"));
}

#[test]
fn an_address_claimed_twice_belongs_to_the_newest_running_one() {
    let mut world = World::new();
    let old = "- {name: old, namespace: shop, uid: old, node: n1, serviceAccount: a, addresses: [10.0.0.1, 10.0.0.2]}";
    world.apply(&format!("workloads:\n{old}\n"));
    let new = "- {name: new, namespace: shop, uid: new, node: n2, serviceAccount: b, addresses: [10.0.0.1]}";
    // Written first, and yet newer.
    world.apply(&format!("workloads:\n{new}\n{old}\n"));
    assert_eq!(world.addresses("new"), ["10.0.0.1"]);
    assert_eq!(world.addresses("old"), ["10.0.0.2"]);
    assert!(
        world
            .conditions("old")
            .contains("10.0.0.1 belongs to the newer new")
    );

    let ending = new.replace("serviceAccount", "phase: Terminating, serviceAccount");
    world.apply(&format!("workloads:\n{ending}\n{old}\n"));
    assert_eq!(world.addresses("old"), ["10.0.0.1", "10.0.0.2"]);
    assert!(world.addresses("new").is_empty());
}

#[test]
fn a_finished_pod_owns_nothing() {
    for phase in ["Succeeded", "Failed"] {
        let mut world = World::new();
        world.apply(&format!(
            "
workloads:
- {{name: web, namespace: shop, uid: web, node: n1, serviceAccount: a, addresses: [10.0.0.1]}}
- {{name: job, namespace: shop, uid: job, node: n1, serviceAccount: a, addresses: [10.0.0.1], phase: {phase}}}
"
        ));
        assert!(world.find("job").is_none());
        assert_eq!(world.addresses("web"), ["10.0.0.1"]);
    }
}

#[test]
fn a_host_network_pods_addresses_are_not_its_own() {
    let mut world = World::new();
    world.apply(
        "
workloads:
- {name: web, namespace: shop, uid: web, node: n1, serviceAccount: a, addresses: [10.0.0.1]}
- {name: ds, namespace: shop, uid: ds, node: n1, serviceAccount: a, addresses: [10.0.0.1], hostNetwork: true}
",
    );
    // They lead to it through a service, and take nothing from anybody.
    assert!(world.workload("ds").host_network);
    assert_eq!(world.addresses("ds"), ["10.0.0.1"]);
    assert_eq!(world.addresses("web"), ["10.0.0.1"]);
    assert!(world.conditions("ds").is_empty());
}

#[test]
fn endpoints_follow_from_services() {
    let mut world = World::new();
    world.apply(
        "
workloads:
- {name: web, namespace: shop, uid: web, node: n1, serviceAccount: a, addresses: [10.0.0.1]}
- {name: web, namespace: other, uid: other, node: n1, serviceAccount: a, addresses: [10.0.0.2]}
services:
- {name: web, namespace: shop, addresses: [10.96.0.1, 10.0.0.2], ports: [{port: 80, targetPort: 8080}], endpoints: [web, later]}
",
    );
    let web = world.workload("web");
    let (key, ports) = web.services.first_key_value().unwrap();
    assert_eq!(key.to_string(), "shop/web.shop.svc.cluster.local");
    assert_eq!(ports.get(&80), Some(&8080));
    assert!(world.workload("other").services.is_empty());
    // The address of a pod stays the pod's.
    let service = world
        .last
        .as_ref()
        .unwrap()
        .services
        .first()
        .unwrap()
        .clone();
    assert_eq!(
        service.addresses,
        ["10.96.0.1".parse::<std::net::IpAddr>().unwrap()]
    );
    assert_eq!(world.index.status(world.now).conditions.len(), 1);
}

#[test]
fn a_policy_that_selects_is_named_by_the_workload() {
    let mut world = World::new();
    world.apply(
        "
workloads:
- {name: web, namespace: shop, uid: web, node: n1, serviceAccount: a}
- {name: db, namespace: shop, uid: db, node: n1, serviceAccount: a}
policies:
- {name: p, namespace: shop, scope: workloads, workloads: [web], action: deny}
- {name: q, namespace: shop, scope: namespace, action: deny}
",
    );
    let named: Vec<_> = world.workload("web").policies.iter().cloned().collect();
    assert_eq!(named, ["shop/p".into()]);
    assert!(world.workload("db").policies.is_empty());
    assert_eq!(world.last.as_ref().unwrap().policies.len(), 2);
}

#[test]
fn a_restart_goes_on_where_it_stopped() {
    let world = mandatory();
    let before = world.workload("web");
    let mut again = World::restored(world.index.saved());
    again.apply(LABELLED);
    let after = again.workload("web");
    assert_eq!((after.stage, after.epoch), (before.stage, before.epoch));

    // The label was taken off meanwhile: peers are told first, as ever.
    let mut again = World::restored(world.index.saved());
    again.apply(UNLABELLED);
    let after = again.workload("web");
    assert_eq!(after.stage, Stage::Draining);
    assert!(after.epoch > before.epoch);
}

#[test]
fn epochs_are_not_reset_by_a_clock_set_back() {
    let mut world = World::restored(Saved {
        version: 1_000_000,
        workloads: Default::default(),
    });
    world.apply(LABELLED);
    let epoch = world.workload("web").epoch;
    assert!(
        epoch
            >= Epoch {
                resource_version: 1_000_000,
                stage: 0
            },
        "{epoch}"
    );
}

#[test]
fn nothing_is_published_twice() {
    let mut world = mandatory();
    let number = world.number;
    world.report_all(&["web"]);
    world.advance(Duration::from_secs(1));
    assert_eq!(world.number, number);
    assert!(world.index.poll(world.now).is_none());
}

#[test]
fn nothing_is_published_before_the_first_state() {
    let mut index = Index::new(Saved::default(), Start::AtOnce);
    assert!(index.poll(std::time::Instant::now()).is_none());
}

#[test]
fn an_unchanged_mesh_keeps_its_epoch() {
    let mut world = World::new();
    world.apply("ranges: {pods: [10.0.0.0/8]}");
    let first = world.last.clone().unwrap().mesh;
    assert!(first.ranges_known);
    world.apply("ranges: {pods: [10.0.0.0/8]}\nworkloads: []");
    assert_eq!(world.last.clone().unwrap().mesh, first);
    world.apply("");
    let changed = world.last.clone().unwrap().mesh;
    assert!(!changed.ranges_known && changed.epoch > first.epoch);
}

#[test]
fn every_node_is_told_which_namespaces_are_not_enrolled() {
    let mut world = World::new();
    world.apply(
        "namespaces: [{name: shop, labels: {io.cilium/mtls-enabled: 'true'}}, {name: plain}]",
    );
    let first = world.last.clone().unwrap().mesh;
    assert_eq!(first.not_enrolled, ["plain".parse().unwrap()].into());
    world.apply("namespaces: [{name: shop}, {name: plain}]");
    let changed = world.last.clone().unwrap().mesh;
    assert_eq!(changed.not_enrolled.len(), 2);
    assert!(changed.epoch > first.epoch);
}

#[test]
fn a_report_about_another_nodes_workload_is_left_out() {
    let mut world = World::new();
    world.apply(LABELLED);
    world.report("n2", Module::Proxy, &[("web", Condition::Ready)]);
    world.report("n2", Module::Redirect, &[("web", Condition::Ready)]);
    assert_eq!(world.stage("web"), Stage::Wanted);
}

/// A replica whose program of the node holds `stage` at this epoch already, from elsewhere.
fn reported(world: &mut World, stage: Stage, resource_version: u64, ordinal: u32) {
    let epoch = Epoch {
        resource_version,
        stage: ordinal,
    };
    for module in Module::ALL {
        world.report_held("n1", module, "web", Held { stage, epoch });
        world.report("n2", module, &[]);
    }
}

#[test]
fn without_saved_state_nothing_is_published_until_every_program_has_reported() {
    let mut world = World::after_reports();
    world.apply(LABELLED);
    assert!(world.last.is_none());
    reported(&mut world, Stage::Mandatory, 50, 4);
    // Never back to wanted: peers would go plain.
    assert_eq!(world.stages_published("web"), [Stage::Mandatory]);
}

#[test]
fn programs_that_do_not_report_are_waited_for_no_longer_than_the_silence() {
    let mut world = World::after_reports();
    world.apply(LABELLED);
    world.advance(SILENCE);
    assert!(world.last.is_none());
    world.advance(Duration::from_secs(1));
    assert_eq!(world.stage("web"), Stage::Wanted);
}

#[test]
fn without_saved_state_the_epochs_in_use_are_gone_on_with() {
    let mut world = World::after_reports();
    world.apply(LABELLED);
    assert!(world.last.is_none());
    // The pod's object has changed since another replica decided; the decision has not.
    reported(&mut world, Stage::Announced, 50, 3);
    let epoch = world.workload("web").epoch;
    assert_eq!((epoch.resource_version, epoch.stage), (50, 3));
}

#[test]
fn replicas_that_first_see_a_pod_at_different_versions_begin_alike() {
    let begun = |version: u64| {
        let mut world = World::new();
        world.apply_with(LABELLED, |cluster| {
            for pod in &mut cluster.pods {
                let pod = Arc::make_mut(pod);
                (pod.version, pod.decided) = (version, version);
            }
        });
        assert_eq!(world.stage("web"), Stage::Wanted);
        world.workload("web").epoch
    };
    assert_eq!(begun(687), begun(778));
}

#[test]
fn what_is_under_way_at_its_node_goes_on_where_it_would_not_be_begun_with() {
    let ending = LABELLED.replace("addresses", "phase: Terminating, addresses");
    let mut world = World::after_reports();
    world.apply(&ending);
    reported(&mut world, Stage::Mandatory, 50, 4);
    assert_eq!(world.stages_published("web"), [Stage::Mandatory]);
    let mut world = World::after_reports();
    world.apply_with(LABELLED, |cluster| cluster.cilium_encrypts = true);
    reported(&mut world, Stage::Announced, 50, 3);
    assert_eq!(
        world.stages_published("web").first(),
        Some(&Stage::Announced)
    );
}

#[test]
fn where_cilium_encrypts_nothing_is_begun_and_each_labelled_namespace_is_told() {
    let mut world = World::new();
    world.apply_with(LABELLED, |cluster| cluster.cilium_encrypts = true);
    assert_eq!(world.stage("web"), Stage::None);
    assert!(world.reason("web").contains("takeOver"));
    let (why, namespaces) = world.index.status(world.now).not_begun.unwrap();
    assert_eq!(why, NotBegun::CiliumEncrypts);
    assert_eq!(namespaces, ["shop".parse().unwrap()]);
    world.apply(LABELLED);
    assert_eq!(world.stage("web"), Stage::Wanted);
    // And back: it has been begun with.
    world.apply_with(LABELLED, |cluster| cluster.cilium_encrypts = true);
    assert_eq!(world.stage("web"), Stage::Wanted);
}

#[test]
fn what_labels_do_not_say_the_defaults_do() {
    let out = LABELLED.replace(
        "addresses",
        "labels: {io.cilium/mtls-enabled: 'false'}, addresses",
    );
    let mut world = World::new();
    world.apply(&out);
    assert_eq!(world.stage("web"), Stage::None);
    let defaults = |text: &str| serde_json::from_str(text).unwrap();
    world.apply_with(&out, |cluster| {
        cluster.defaults = defaults(r#"{"pod_opt_out": "refuse"}"#);
    });
    assert_eq!(world.stage("web"), Stage::Wanted);
    assert_eq!(world.workload("web").mode, Mode::Permissive);
    world.apply_with(LABELLED, |cluster| {
        cluster.defaults = defaults(r#"{"mode": "strict"}"#);
    });
    assert_eq!(world.workload("web").mode, Mode::Strict);
}

#[test]
fn a_label_taken_off_while_no_controller_ran_is_drained() {
    let mut world = World::after_reports();
    world.apply(UNLABELLED);
    reported(&mut world, Stage::Mandatory, 50, 4);
    assert_eq!(world.stage("web"), Stage::Draining);
    assert!(world.workload("web").epoch.resource_version > 50);
}

#[test]
fn a_replica_learns_from_the_node_how_far_another_one_is() {
    let mut world = World::new();
    world.apply(LABELLED);
    assert_eq!(world.stage("web"), Stage::Wanted);
    let epoch = world.workload("web").epoch;
    reported(&mut world, Stage::Announced, epoch.resource_version, 3);
    assert_eq!(world.stage("web"), Stage::Announced);
}

#[test]
fn what_was_decided_by_newer_objects_waits_until_they_are_here() {
    let mut world = mandatory();
    let before = world.workload("web").epoch;
    reported(
        &mut world,
        Stage::Draining,
        before.resource_version + 1000,
        1,
    );
    assert_eq!(world.stage("web"), Stage::Mandatory);
    assert_eq!(world.workload("web").epoch, before);
}

#[test]
fn a_replica_that_lags_takes_nobody_out() {
    // This one knows of the label; the node holds the older state, without it, from a replica that lags.
    let mut world = mandatory();
    reported(&mut world, Stage::None, 1, 2);
    assert_eq!(world.stage("web"), Stage::Mandatory);
}

#[test]
fn what_is_awaited_names_workloads_and_their_epochs() {
    let mut world = World::new();
    world.apply(LABELLED);
    assert!(world.index.awaited().workloads.is_empty());
    world.report_all(&["web"]);
    let awaited = world.index.awaited();
    let [web] = awaited.workloads.as_slice() else {
        panic!("one: {awaited:?}")
    };
    assert_eq!(web.uid.to_string(), "web");
    assert_eq!(web.epoch, world.workload("web").epoch);
    assert_eq!(awaited.number, world.number);
    world.report_all(&["web"]);
    assert!(world.index.awaited().workloads.is_empty());
}

#[test]
fn each_pod_that_is_not_enrolled_says_why() {
    let mut world = World::new();
    world.apply(
        "
namespaces:
- {name: shop, labels: {io.cilium/mtls-enabled: 'true'}}
- {name: plain}
workloads:
- {name: a, namespace: plain, uid: plain, node: n1, serviceAccount: a}
- {name: b, namespace: shop, uid: host, node: n1, serviceAccount: a, hostNetwork: true}
- {name: c, namespace: shop, uid: out, node: n1, serviceAccount: a, labels: {io.cilium/mtls-enabled: 'false'}}
- {name: d, namespace: shop, uid: ending, node: n1, serviceAccount: a, phase: Terminating}
",
    );
    for (uid, reason) in [
        ("plain", "has no label io.cilium/mtls-enabled=true"),
        ("host", "shares its node's network"),
        ("out", "opts out"),
        ("ending", "is ending"),
    ] {
        assert!(world.reason(uid).contains(reason), "{}", world.reason(uid));
    }
}

#[test]
fn it_has_let_go_when_nothing_is_enrolled_and_no_node_captures() {
    let mut world = mandatory();
    let waits_for = |world: &World| world.index.letting_go(world.now).to_string();
    assert!(waits_for(&world).starts_with("1 pod still enrolled"));
    world.apply(UNLABELLED);
    world.report_all(&["web"]);
    assert_eq!(world.stage("web"), Stage::None);
    // Its rules stand until the last connection has ended.
    for condition in [Condition::Ready, Condition::Releasing] {
        world.report("n1", Module::Redirect, &[("web", condition)]);
        assert!(waits_for(&world).contains("redirect on n1: 1 pod still captured"));
    }
    world.report("n1", Module::Redirect, &[("web", Condition::Released)]);
    world.report("n2", Module::Redirect, &[]);
    assert_eq!(world.index.letting_go(world.now).done(), Some(Done::All));
    // A program that has not heard of it would leave its folders behind.
    for (knows, expected) in [(false, None), (true, Some(Done::All))] {
        let node = "n1".parse().unwrap();
        let report = Report {
            uninstalling: Some(knows),
            ..Report::default()
        };
        world.index.report(world.now, &node, Module::Proxy, report);
        assert_eq!(world.index.letting_go(world.now).done(), expected);
    }
}

#[test]
fn a_silent_node_that_captured_is_waited_for_until_it_is_gone() {
    let mut world = mandatory();
    world.apply(UNLABELLED);
    // The redirect module of n1 says nothing more; all others have let go.
    for silent in [false, true] {
        if silent {
            world.advance(SILENCE + Duration::from_secs(1));
        }
        world.report("n1", Module::Proxy, &[]);
        for module in Module::ALL {
            world.report("n2", module, &[]);
        }
    }
    assert_eq!(world.stage("web"), Stage::None);
    let left = world.index.letting_go(world.now);
    assert_eq!(left.done(), Some(Done::ExceptSilent));
    assert_eq!(
        left.to_string(),
        "redirect on n1, silent: 1 pod still captured"
    );
    world.apply_with(UNLABELLED, |cluster| {
        cluster.nodes.remove(&"n1".parse().unwrap());
    });
    world.advance(Duration::from_millis(1));
    assert_eq!(world.index.letting_go(world.now).done(), Some(Done::All));
}

#[test]
fn a_node_that_was_never_heard_is_waited_for_where_our_program_is() {
    let own = "
namespaces: [{name: shop}, {name: podveil-system}]
workloads:
- {name: node-2, namespace: podveil-system, uid: node-2, node: n2, serviceAccount: podveil-node, hostNetwork: true, addresses: [172.30.0.2]}
";
    let mut world = World::new();
    let mut apply = |text: &str| {
        world.apply_with(text, |cluster| {
            let own = "podveil-system".parse().unwrap();
            if let Some(namespace) = cluster.namespaces.get_mut(&own) {
                Arc::make_mut(namespace).own = true;
            }
        });
        world.advance(SILENCE + Duration::from_secs(1));
        world.index.letting_go(world.now)
    };
    // Nothing of ours was ever there: a node that the chart leaves out.
    assert_eq!(apply(UNLABELLED).done(), Some(Done::All));
    let left = apply(own);
    assert_eq!(left.done(), Some(Done::ExceptSilent));
    assert!(
        left.to_string()
            .contains("redirect on n2, silent: has not reported"),
        "{left}"
    );
    assert!(!left.to_string().contains("n1"), "{left}");
}
