// SPDX-License-Identifier: Apache-2.0
//! The rules in a real kernel: a pod and a peer joined by a veth, with the test in the place of the proxy.
//!
//! Root, `ip`, `nft` and a cgroup2 mount are needed. Namespaces have no name and go with the descriptors that hold
//! them.

#![forbid(unsafe_code)]

#[path = "netns/half_way.rs"]
mod half_way;
#[path = "netns/layouts.rs"]
mod layouts;
#[path = "netns/raw.rs"]
mod raw;
#[path = "netns/world.rs"]
mod world;

use futures::future::join_all;
use half_way::HalfWay;
use podveil_apply::{
    BackEnd, BackEndChoice, BackEndError, BackEnds, Backend, Ebpf, Feature, Flavour, Iptables,
    Nftables, VerifyError,
};
use podveil_netns::NetNs;
use podveil_plan::{Capture, Fence, FenceStep, Phase};
use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use world::{Family, Tested, World, both_ways, ended, original_dst, reset};

/// These rules are held by this back end.
macro_rules! held {
    ($module:ident, $backend:ty, $flavour:expr, [$($rule:ident),* $(,)?]) => {
        mod $module {
            $(#[tokio::test]
            #[ignore = "netns"]
            async fn $rule() {
                super::world::FLAVOUR.set($flavour);
                super::$rule::<$backend>().await;
            })*
        }
    };
}

/// All rules, by the back ends that nodes are to have.
macro_rules! on_every_back_end {
    ($($rule:ident),* $(,)?) => {
        held!(nftables, super::Nftables, super::Flavour::Nft, [$($rule),*]);
        held!(ebpf, super::Ebpf, super::Flavour::Nft, [$($rule),*]);
    };
}

held!(
    iptables,
    super::Iptables,
    super::Flavour::Nft,
    [
        new_connections_come_to_the_proxy,
        answers_to_a_kept_client_address_come_back,
        flushed_capture_leaks_nothing,
        a_mandatory_peers_plain_syn_is_refused,
        open_connections_live_through_label_on_and_off,
        a_port_used_again_after_an_unseen_end_is_captured,
        nothing_is_left_and_removal_may_be_repeated,
        datagrams_and_frames_for_others_are_untouched,
        capture_outlasts_the_process_that_made_it,
        an_applications_mark_proves_nothing,
        syn_cookies_change_nothing,
        a_second_interface_is_captured_too,
        namespaces_come_and_go,
        capture_is_verified_by_a_connection_that_comes_to_the_proxy,
        what_a_killed_process_leaves_half_done_is_taken_out,
    ]
);
held!(
    iptables_legacy,
    super::Iptables,
    super::Flavour::Legacy,
    [
        new_connections_come_to_the_proxy,
        answers_to_a_kept_client_address_come_back,
        flushed_capture_leaks_nothing,
        a_mandatory_peers_plain_syn_is_refused,
        open_connections_live_through_label_on_and_off,
        nothing_is_left_and_removal_may_be_repeated,
        what_a_killed_process_leaves_half_done_is_taken_out,
    ]
);

on_every_back_end! {
    new_connections_come_to_the_proxy,
    answers_to_a_kept_client_address_come_back,
    flushed_capture_leaks_nothing,
    a_mandatory_peers_plain_syn_is_refused,
    open_connections_live_through_label_on_and_off,
    a_port_used_again_after_an_unseen_end_is_captured,
    nothing_is_left_and_removal_may_be_repeated,
    datagrams_and_frames_for_others_are_untouched,
    capture_outlasts_the_process_that_made_it,
    an_applications_mark_proves_nothing,
    a_port_in_time_wait_is_captured_again,
    a_half_closed_connection_waits_as_long_as_its_ends_do,
    syn_cookies_change_nothing,
    a_second_interface_is_captured_too,
    fast_open_changes_nothing,
    namespaces_come_and_go,
    capture_is_verified_by_a_connection_that_comes_to_the_proxy,
    fragments_and_extension_headers_pass_neither_capture_nor_fence,
    multipath_tcp_is_captured_too,
}

const CAPTURING: fn() -> Capture = || Capture {
    phase: Phase::Capturing,
    ..Capture::release()
};

fn fence_of<B: Tested>(world: &World<B>) -> Arc<Fence> {
    let peers: BTreeSet<_> = [world.peer_ip(Family::V4), world.peer_ip(Family::V6)].into();
    Arc::new(Fence {
        enrolled: peers.clone(),
        mandatory: peers,
    })
}

async fn new_connections_come_to_the_proxy<B: Tested>() {
    let world = World::<B>::new();
    let capture = Capture {
        exclude_outbound_ports: [8081].into(),
        exclude_inbound_ports: [9090].into(),
        ..CAPTURING()
    };
    let older = world
        .backend
        .apply(&world.pod, &capture, &Arc::default())
        .await
        .unwrap();
    assert_eq!(older, BTreeSet::new());
    world.backend.verify(&world.pod, &capture).await.unwrap();
    for family in Family::BOTH {
        let (pod, peer) = (world.pod_ip(family), world.peer_ip(family));
        let outbound = world.proxy_listens(family, 15001);
        let inbound = world.proxy_listens(family, 15006);
        let tunnels = world.proxy_listens(family, 15008);
        let server = world.peer_listens(family, 8080);
        let excluded = world.peer_listens(family, 8081);
        let open = world.app_listens(family, 9090);
        let application = world.app_listens(family, 8080);

        let client = world.app_connects((peer, 8080)).unwrap();
        let accepted = outbound.accept();
        assert_eq!(original_dst(&accepted), (peer, 8080).into());
        both_ways(&client, &accepted);

        let upstream = world.proxy_connects((peer, 8080)).unwrap();
        both_ways(&upstream, &server.accept());

        let past = world.app_connects((peer, 8081)).unwrap();
        both_ways(&past, &excluded.accept());

        let client = world.peer_connects((pod, 8080)).unwrap();
        let accepted = inbound.accept();
        assert_eq!(original_dst(&accepted), (pod, 8080).into());
        both_ways(&client, &accepted);

        let tunnel = world.peer_connects((pod, 15008)).unwrap();
        both_ways(&tunnel, &tunnels.accept());

        let past = world.peer_connects((pod, 9090)).unwrap();
        both_ways(&past, &open.accept());

        let own = world.app_connects((pod, 8080)).unwrap();
        both_ways(&own, &application.accept());
    }
}

async fn answers_to_a_kept_client_address_come_back<B: Tested>() {
    for family in Family::BOTH {
        let world = World::<B>::new();
        world
            .backend
            .apply(&world.pod, &CAPTURING(), &fence_of(&world))
            .await
            .unwrap();
        let (pod, peer) = (world.pod_ip(family), world.peer_ip(family));
        let application = world.app_listens(family, 8080);
        let hop = world.proxy_connects_as(peer, (pod, 8080)).unwrap();
        let accepted = application.accept();
        assert_eq!(accepted.peer_addr().unwrap().ip(), peer);
        both_ways(&hop, &accepted);
        let refused = world.proxy_connects_as(peer, (pod, 8081)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        let mut older = BTreeSet::new();
        let seen = world.backend.observe(&world.pod, &mut older).await.unwrap();
        assert_eq!(seen.captured, 1);
        assert_eq!(seen.fence, Default::default());

        // Without its mark the answer is stopped at the pod's edge.
        B::lose_answers(&world);
        drop(accepted);
        let seen = world.backend.observe(&world.pod, &mut older).await.unwrap();
        assert_ne!(seen.fence, Default::default());
    }
}

async fn flushed_capture_leaks_nothing<B: Tested>() {
    let world = World::<B>::new();
    for family in Family::BOTH {
        let (pod, peer) = (world.pod_ip(family), world.peer_ip(family));
        let server = world.peer_listens(family, 8080);
        let application = world.app_listens(family, 8080);
        let old = world.app_connects((peer, 8080)).unwrap();
        let old_server = server.accept();
        world
            .backend
            .apply(&world.pod, &CAPTURING(), &fence_of(&world))
            .await
            .unwrap();
        let outbound = world.proxy_listens(family, 15001);
        let tunnels = world.proxy_listens(family, 15008);
        let captured = world.app_connects((peer, 8080)).unwrap();
        let captured_proxy = outbound.accept();

        B::flush_capture(&world);
        let verdict = world.backend.verify(&world.pod, &CAPTURING()).await;
        assert!(B::names_capture(&verdict.unwrap_err()));

        let refused = world.app_connects((peer, 8080)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        let unanswered = world.peer_connects((pod, 8080)).unwrap_err();
        assert_ne!(unanswered.kind(), ErrorKind::NotConnected);
        assert!(application.is_idle());
        both_ways(&old, &old_server);
        both_ways(&captured, &captured_proxy);
        let upstream = world.proxy_connects((peer, 8080)).unwrap();
        both_ways(&upstream, &server.accept());
        let tunnel = world.peer_connects((pod, 15008)).unwrap();
        both_ways(&tunnel, &tunnels.accept());
        assert!(server.is_idle());

        let mut older = BTreeSet::new();
        let seen = world.backend.observe(&world.pod, &mut older).await.unwrap();
        assert!(seen.fence.out_packets >= 2, "{seen:?}");
        world.backend.remove(&world.pod).await.unwrap();
    }
}

async fn a_mandatory_peers_plain_syn_is_refused<B: Tested>() {
    let world = World::<B>::new();
    let capture = Capture {
        plain_inbound_ports: [8443].into(),
        refuses_plain: true,
        ..CAPTURING()
    };
    world
        .backend
        .apply(&world.pod, &capture, &fence_of(&world))
        .await
        .unwrap();
    for family in Family::BOTH {
        let pod = world.pod_ip(family);
        let inbound = world.proxy_listens(family, 15006);
        let tunnels = world.proxy_listens(family, 15008);
        let refused = world.peer_connects((pod, 8080)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        assert!(inbound.is_idle());
        let tunnel = world.peer_connects((pod, 15008)).unwrap();
        both_ways(&tunnel, &tunnels.accept());
        let plain = world.peer_connects((pod, 8443)).unwrap();
        both_ways(&plain, &inbound.accept());
    }
    let mut older = BTreeSet::new();
    let seen = world.backend.observe(&world.pod, &mut older).await.unwrap();
    assert_eq!((seen.fence.in_packets, seen.fence.out_packets), (2, 0));
    // Not mandatory any more: plain again, through the proxy.
    let fence = fence_of(&world);
    let nobody = Arc::new(Fence {
        mandatory: BTreeSet::new(),
        ..Fence::clone(&fence)
    });
    world
        .backend
        .change_fence(&world.pod, &FenceStep::between(&fence, &nobody))
        .await
        .unwrap();
    let inbound = world.proxy_listens(Family::V4, 15006);
    let plain = world
        .peer_connects((world.pod_ip(Family::V4), 8080))
        .unwrap();
    both_ways(&plain, &inbound.accept());
}

async fn open_connections_live_through_label_on_and_off<B: Tested>() {
    let world = World::<B>::new();
    let mut old = Vec::new();
    let mut new = Vec::new();
    let mut held = Vec::new();
    for family in Family::BOTH {
        let (pod, peer) = (world.pod_ip(family), world.peer_ip(family));
        let server = world.peer_listens(family, 8080);
        let application = world.app_listens(family, 8080);
        let out = world.app_connects((peer, 8080)).unwrap();
        old.push((out, server.accept()));
        let inward = world.peer_connects((pod, 8080)).unwrap();
        old.push((inward, application.accept()));
        held.push((server, application));
    }
    let mut older = world
        .backend
        .apply(&world.pod, &CAPTURING(), &fence_of(&world))
        .await
        .unwrap();
    assert_eq!(older.len(), 4, "{older:?}");
    for (one, two) in &old {
        both_ways(one, two);
    }
    for (family, (_, application)) in Family::BOTH.into_iter().zip(&held) {
        let (pod, peer) = (world.pod_ip(family), world.peer_ip(family));
        let outbound = world.proxy_listens(family, 15001);
        let inbound = world.proxy_listens(family, 15006);
        let out = world.app_connects((peer, 8080)).unwrap();
        new.push((out, outbound.accept()));
        let inward = world.peer_connects((pod, 8080)).unwrap();
        new.push((inward, inbound.accept()));
        let hop = world.proxy_connects_as(peer, (pod, 8080)).unwrap();
        new.push((hop, application.accept()));
    }
    // Written again, as after a restart: the same connections are known as older, none is added.
    let again = world
        .backend
        .apply(&world.pod, &CAPTURING(), &fence_of(&world))
        .await
        .unwrap();
    assert_eq!(again, older);
    for (one, two) in old.iter().chain(&new) {
        both_ways(one, two);
    }
    let seen = world.backend.observe(&world.pod, &mut older).await.unwrap();
    assert_eq!((seen.captured, seen.older), (6, 4));
    assert_eq!(seen.fence, Default::default());

    let releasing = Capture::release();
    world
        .backend
        .apply(&world.pod, &releasing, &Arc::default())
        .await
        .unwrap();
    world.backend.verify(&world.pod, &releasing).await.unwrap();
    for (one, two) in old.iter().chain(&new) {
        both_ways(one, two);
    }
    for (family, (server, application)) in Family::BOTH.into_iter().zip(&held) {
        let out = world.app_connects((world.peer_ip(family), 8080)).unwrap();
        both_ways(&out, &server.accept());
        let inward = world.peer_connects((world.pod_ip(family), 8080)).unwrap();
        both_ways(&inward, &application.accept());
    }
    let mut none = BTreeSet::new();
    let seen = world.backend.observe(&world.pod, &mut none).await.unwrap();
    assert_eq!(seen.captured, 6);
    new.clear();
    world.until_nothing_is_captured().await;
    world.backend.remove(&world.pod).await.unwrap();
    for (one, two) in &old {
        both_ways(one, two);
    }
    assert!(!world.backend.stands(&world.pod).await.unwrap());
}

async fn a_port_used_again_after_an_unseen_end_is_captured<B: Tested>() {
    let world = World::<B>::new();
    for family in Family::BOTH {
        let peer = world.peer_ip(family);
        let server = world.peer_listens(family, 8080);
        // Seen by conntrack while released, and ended when nothing stands.
        let apply = async |capture: Capture| {
            let backend = &world.backend;
            backend.apply(&world.pod, &capture, &Arc::default()).await
        };
        apply(Capture::release()).await.unwrap();
        let direct = world.app_connects((peer, 8080)).unwrap();
        let port = direct.local_addr().unwrap().port();
        let accepted = server.accept();
        both_ways(&direct, &accepted);
        world.backend.remove(&world.pod).await.unwrap();
        reset(accepted);
        drop(direct);

        apply(CAPTURING()).await.unwrap();
        let outbound = world.proxy_listens(family, 15001);
        let again = world.app_connects_from(port, (peer, 8080)).unwrap();
        both_ways(&again, &outbound.accept());
        assert!(server.is_idle());
        reset(again);
        world.backend.remove(&world.pod).await.unwrap();
    }
}

async fn nothing_is_left_and_removal_may_be_repeated<B: Tested>() {
    let world = World::<B>::new();
    let before = world.everything();
    for _ in 0..2 {
        assert!(!world.backend.stands(&world.pod).await.unwrap());
        for capture in [CAPTURING(), Capture::release(), CAPTURING()] {
            for _ in 0..2 {
                world
                    .backend
                    .apply(&world.pod, &capture, &fence_of(&world))
                    .await
                    .unwrap();
                world.backend.verify(&world.pod, &capture).await.unwrap();
            }
        }
        assert!(world.backend.stands(&world.pod).await.unwrap());
        assert!(world.backend.owns(&world.pod).await.unwrap());
        assert!(!world.is_anothers().await);
        for _ in 0..2 {
            world.backend.remove(&world.pod).await.unwrap();
        }
        assert_eq!(world.everything(), before);
    }
}

async fn what_a_killed_process_leaves_half_done_is_taken_out<B: Tested>() {
    if let Some(task) = half_way::task() {
        let backend = B::open(&world::cgroup_of(std::os::unix::process::parent_id()));
        let netns = NetNs::current().unwrap();
        match task.as_str() {
            "apply" => drop(
                (backend.apply(&netns, &CAPTURING(), &Arc::default()))
                    .await
                    .unwrap(),
            ),
            _ => backend.remove(&netns).await.unwrap(),
        }
        return;
    }
    let world = World::<B>::new();
    let half_way = HalfWay::new();
    let module = match world::FLAVOUR.get() {
        Flavour::Nft => "iptables",
        Flavour::Legacy => "iptables_legacy",
    };
    let test = format!("{module}::what_a_killed_process_leaves_half_done_is_taken_out");
    let before = world.everything();
    for task in ["apply", "remove"] {
        let mut steps = 0;
        loop {
            if task == "remove" {
                (world
                    .backend
                    .apply(&world.pod, &CAPTURING(), &fence_of(&world)))
                .await
                .unwrap();
            }
            let killed = half_way.is_killed(&world, &test, task, steps);
            if killed {
                assert!(world.backend.stands(&world.pod).await.unwrap());
                assert!(
                    world.backend.owns(&world.pod).await.unwrap(),
                    "{task}, {steps}"
                );
            }
            // Another back end is chosen now.
            let start = BackEnds::left(&world.pins(), world.cgroup().clone()).unwrap();
            start.remove(&world.pod).await.unwrap();
            assert_eq!(world.everything(), before, "{task}, {steps} steps");
            if !killed {
                break;
            }
            steps += 1;
        }
        assert!(steps > 6, "a table each");
    }
}

#[tokio::test]
#[ignore = "netns"]
async fn a_table_of_iptables_that_holds_anything_of_anothers_stays() {
    for others in [
        "add chain ip nat other",
        "add set ip nat other { type ipv4_addr; }",
        "add rule ip nat OUTPUT counter accept",
    ] {
        let world = World::<Iptables>::new();
        let pod = &world.pod;
        (world.backend.apply(pod, &CAPTURING(), &fence_of(&world)))
            .await
            .unwrap();
        world::run(pod, "nft", &[others]);
        world.backend.remove(pod).await.unwrap();
        let left = world::run(pod, "nft", &["list", "tables"]);
        assert_eq!(left.trim(), "table ip nat", "{others}");
        let table = world::run(pod, "nft", &["list", "table", "ip", "nat"]);
        assert!(!table.contains("PODVEIL"), "{table}");
        assert!(
            table.contains("other") || table.contains("accept\n"),
            "{table}"
        );
    }
}

async fn datagrams_and_frames_for_others_are_untouched<B: Tested>() {
    let world = World::<B>::new();
    world
        .backend
        .apply(&world.pod, &CAPTURING(), &fence_of(&world))
        .await
        .unwrap();
    for family in Family::BOTH {
        world.datagrams_pass(family);
        let inbound = world.proxy_listens(family, 15006);
        let foreign = world.foreign_ip(family);
        let unanswered = world.peer_connects((foreign, 80)).unwrap_err();
        assert_ne!(unanswered.kind(), ErrorKind::NotConnected);
        assert!(inbound.is_idle());
    }
}

async fn capture_outlasts_the_process_that_made_it<B: Tested>() {
    let mut world = World::<B>::new();
    let peer = world.peer_ip(Family::V4);
    let server = world.peer_listens(Family::V4, 8080);
    let old = world.app_connects((peer, 8080)).unwrap();
    let old_server = server.accept();
    let outbound = world.proxy_listens(Family::V4, 15001);
    let older = world
        .backend
        .apply(&world.pod, &CAPTURING(), &fence_of(&world))
        .await
        .unwrap();
    let client = world.app_connects((peer, 8080)).unwrap();
    let accepted = outbound.accept();
    world.restart();
    assert!(world.backend.owns(&world.pod).await.unwrap());
    let fence = fence_of(&world);
    world
        .backend
        .verify(&world.pod, &CAPTURING())
        .await
        .unwrap();
    let again = world
        .backend
        .apply(&world.pod, &CAPTURING(), &fence)
        .await
        .unwrap();
    assert_eq!((older.len(), again), (1, older));
    both_ways(&old, &old_server);
    both_ways(&client, &accepted);
    let client = world.app_connects((peer, 8080)).unwrap();
    both_ways(&client, &outbound.accept());
    assert!(server.is_idle());
}

async fn an_applications_mark_proves_nothing<B: Tested>() {
    let world = World::<B>::new();
    world
        .backend
        .apply(&world.pod, &CAPTURING(), &Arc::default())
        .await
        .unwrap();
    for family in Family::BOTH {
        let peer = world.peer_ip(family);
        let server = world.peer_listens(family, 8080);
        let outbound = world.proxy_listens(family, 15001);
        // What the proxy's own packets carry.
        let marked = world.app_connects_marked(0x539, (peer, 8080)).unwrap();
        both_ways(&marked, &outbound.accept());
        assert!(server.is_idle());
    }
}

async fn a_port_in_time_wait_is_captured_again<B: Tested>() {
    let world = World::<B>::new();
    world
        .backend
        .apply(&world.pod, &CAPTURING(), &Arc::default())
        .await
        .unwrap();
    for family in Family::BOTH {
        let (pod, peer) = (world.pod_ip(family), world.peer_ip(family));
        let application = world.app_listens(family, 8080);
        let inbound = world.proxy_listens(family, 15006);
        let outbound = world.proxy_listens(family, 15001);
        for _ in 0..3 {
            let client = world.peer_connects_from(45_000, (pod, 8080)).unwrap();
            let accepted = inbound.accept();
            both_ways(&client, &accepted);
            // Whoever ends first keeps the TIME-WAIT: here the proxy.
            ended(accepted, client);

            let client = world.app_connects_from(45_001, (peer, 8080)).unwrap();
            let accepted = outbound.accept();
            both_ways(&client, &accepted);
            ended(accepted, client);
        }
        assert!(application.is_idle());
    }
}

/// A request that ends with a FIN and is answered when the work is done: conntrack forgets such a connection after one
/// minute unless it is told otherwise, and what comes then has neither translation nor mark.
async fn a_half_closed_connection_waits_as_long_as_its_ends_do<B: Tested>() {
    let world = World::<B>::new();
    for state in ["fin_wait", "close_wait", "last_ack"] {
        world.sysctl(&format!("net.netfilter.nf_conntrack_tcp_timeout_{state}=1"));
    }
    world
        .backend
        .apply(&world.pod, &CAPTURING(), &Arc::default())
        .await
        .unwrap();
    let mut waiting = Vec::new();
    for family in Family::BOTH {
        let (pod, peer) = (world.pod_ip(family), world.peer_ip(family));
        let outbound = world.proxy_listens(family, 15001);
        let inbound = world.proxy_listens(family, 15006);
        let application = world.app_listens(family, 8080);
        let captured_out = world.app_connects((peer, 8080)).unwrap();
        let captured_in = world.peer_connects((pod, 8080)).unwrap();
        let hop = world.proxy_connects_as(peer, (pod, 8080)).unwrap();
        for (client, server) in [
            (captured_out, outbound.accept()),
            (captured_in, inbound.accept()),
            (hop, application.accept()),
        ] {
            both_ways(&client, &server);
            waiting.push((client, server));
        }
        let hop = world.proxy_connects_as(peer, (pod, 8080)).unwrap();
        let server = application.accept();
        both_ways(&hop, &server);
        // The other end first.
        waiting.push((server, hop));
    }
    for (first, second) in &waiting {
        first.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!((&*second).read(&mut [0]).unwrap(), 0);
    }
    // Time itself is what this rule is about.
    std::thread::sleep(Duration::from_millis(1500));
    for (first, second) in &waiting {
        let mut second = second;
        second.write_all(b"done").unwrap();
        second.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        (&*first).read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "done");
    }
}

async fn syn_cookies_change_nothing<B: Tested>() {
    let world = World::<B>::new();
    // For every SYN, not only for those of a flood.
    world.sysctl("net.ipv4.tcp_syncookies=2");
    world
        .backend
        .apply(&world.pod, &CAPTURING(), &fence_of(&world))
        .await
        .unwrap();
    for family in Family::BOTH {
        let (pod, peer) = (world.pod_ip(family), world.peer_ip(family));
        let application = world.app_listens(family, 8080);
        let inbound = world.proxy_listens(family, 15006);
        let outbound = world.proxy_listens(family, 15001);
        let client = world.app_connects((peer, 8080)).unwrap();
        let accepted = outbound.accept();
        assert_eq!(original_dst(&accepted), (peer, 8080).into());
        both_ways(&client, &accepted);
        let client = world.peer_connects((pod, 8080)).unwrap();
        let accepted = inbound.accept();
        assert_eq!(original_dst(&accepted), (pod, 8080).into());
        both_ways(&client, &accepted);
        let hop = world.proxy_connects_as(peer, (pod, 8080)).unwrap();
        both_ways(&hop, &application.accept());
        assert!(inbound.is_idle());
    }
    let mut older = BTreeSet::new();
    let seen = world.backend.observe(&world.pod, &mut older).await.unwrap();
    assert_eq!(seen.fence, Default::default());
}

async fn a_second_interface_is_captured_too<B: Tested>() {
    let world = World::<B>::new();
    let (pod, peer) = world.second_interface();
    world
        .backend
        .apply(&world.pod, &CAPTURING(), &Arc::default())
        .await
        .unwrap();
    let application = world.app_listens(Family::V4, 8080);
    let server = world.peer_listens(Family::V4, 8080);
    let inbound = world.proxy_listens(Family::V4, 15006);
    let outbound = world.proxy_listens(Family::V4, 15001);
    let client = world.app_connects((peer, 8080)).unwrap();
    let accepted = outbound.accept();
    assert_eq!(original_dst(&accepted), (peer, 8080).into());
    both_ways(&client, &accepted);
    let client = world.peer_connects((pod, 8080)).unwrap();
    let accepted = inbound.accept();
    assert_eq!(original_dst(&accepted), (pod, 8080).into());
    both_ways(&client, &accepted);
    assert!(application.is_idle() && server.is_idle());
}

async fn fast_open_changes_nothing<B: Tested>() {
    let world = World::<B>::new();
    world.sysctl("net.ipv4.tcp_fastopen=1027");
    world
        .backend
        .apply(&world.pod, &CAPTURING(), &fence_of(&world))
        .await
        .unwrap();
    for family in Family::BOTH {
        let peer = world.peer_ip(family);
        let server = world.peer_listens(family, 8080);
        let outbound = world.proxy_listens(family, 15001);
        for _ in 0..2 {
            let client = world.app_fast_opens((peer, 8080), b"data");
            let mut accepted = outbound.accept();
            assert_eq!(original_dst(&accepted), (peer, 8080).into());
            let mut buffer = [0; 4];
            accepted.read_exact(&mut buffer).unwrap();
            assert_eq!(&buffer, b"data");
            both_ways(&client, &accepted);
        }
        assert!(server.is_idle());
    }
}

async fn multipath_tcp_is_captured_too<B: Tested>() {
    let world = World::<B>::new();
    world
        .backend
        .apply(&world.pod, &CAPTURING(), &fence_of(&world))
        .await
        .unwrap();
    for family in Family::BOTH {
        let peer = world.peer_ip(family);
        let server = world.peer_listens(family, 8080);
        let outbound = world.proxy_listens(family, 15001);
        let client = world.app_connects_by_mptcp((peer, 8080)).unwrap();
        let accepted = outbound.accept();
        assert_eq!(original_dst(&accepted), (peer, 8080).into());
        both_ways(&client, &accepted);
        assert!(server.is_idle());
    }
}

/// A SYN in two fragments (IPv4), or behind an extension header (IPv6), sent by hand.
async fn fragments_and_extension_headers_pass_neither_capture_nor_fence<B: Tested>() {
    let world = World::<B>::new();
    world
        .backend
        .apply(&world.pod, &CAPTURING(), &fence_of(&world))
        .await
        .unwrap();
    for family in Family::BOTH {
        // Nobody else listens there: whoever answers is the proxy.
        let inbound = world.proxy_listens(family, 15006);
        assert!(world.odd_syn_is_taken(family, false, 8080), "{family:?}");
        drop(inbound);
        let _server = world.peer_listens(family, 8081);
        assert!(!world.odd_syn_is_taken(family, true, 8081), "{family:?}");
    }
}

/// Everything of ours stands where it was put, and still somebody's own rule may be first.
async fn capture_is_verified_by_a_connection_that_comes_to_the_proxy<B: Tested>() {
    let world = World::<B>::new();
    world.default_routes();
    let back_ends = world.back_ends(BackEndChoice::Only(B::NAME)).await;
    let apply = async |fence| back_ends.apply(&world.pod, &CAPTURING(), fence).await;
    let verify = async || back_ends.verify(&world.pod, &CAPTURING()).await;
    apply(&fence_of(&world)).await.unwrap();
    let nobody_listens = verify().await.unwrap_err();
    assert!(
        matches!(nobody_listens, VerifyError::Connection { .. }),
        "{nobody_listens}"
    );
    let listening = Family::BOTH.map(|family| world.proxy_listens(family, 15001));
    verify().await.unwrap();
    for (listening, to) in listening
        .iter()
        .zip(["192.0.2.1:15008", "[2001:db8::1]:15008"])
    {
        assert_eq!(original_dst(&listening.accept()).to_string(), to);
    }
    B::divert(&world);
    let diverted = verify().await.unwrap_err();
    assert!(
        matches!(diverted, VerifyError::Connection { .. }),
        "{diverted}"
    );
    back_ends.remove(&world.pod).await.unwrap();
    drop(back_ends);
}

/// The comments stay, the rule does another thing.
#[tokio::test]
#[ignore = "netns"]
async fn a_rule_that_was_rewritten_is_noticed() {
    let world = World::<Nftables>::new();
    let backend = &world.backend;
    for (chain, rule) in [
        (
            "clean_marks",
            "accept comment \"a mark that came in proves nothing\"",
        ),
        ("fence_in", "tcp dport 15008 drop comment \"tunnels\""),
    ] {
        backend
            .apply(&world.pod, &CAPTURING(), &fence_of(&world))
            .await
            .unwrap();
        backend.verify(&world.pod, &CAPTURING()).await.unwrap();
        world.rewrite(chain, rule);
        let error = backend.verify(&world.pod, &CAPTURING()).await.unwrap_err();
        assert!(
            matches!(error, VerifyError::Chain { chain: named, .. } if named == chain),
            "{error}"
        );
    }
}

#[tokio::test]
#[ignore = "netns"]
async fn a_pod_stays_with_the_back_end_that_captured_it() {
    let world = World::<Nftables>::new();
    let (netns, fence) = (&world.pod, fence_of(&world));
    let open = async |choice| world.back_ends(choice).await;
    let is_nftables = async || world.backend.has_table(netns).await.unwrap();
    let before = world.everything();
    open(BackEndChoice::Only(BackEnd::Nftables))
        .await
        .apply(netns, &CAPTURING(), &fence)
        .await
        .unwrap();
    let both = open(BackEndChoice::Only(BackEnd::Ebpf)).await;
    let _listening =
        [15001, 15006].map(|port| Family::BOTH.map(|of| world.proxy_listens(of, port)));
    both.apply(netns, &CAPTURING(), &fence).await.unwrap();
    both.verify(netns, &CAPTURING()).await.unwrap();
    assert!(is_nftables().await);
    both.remove(netns).await.unwrap();
    both.apply(netns, &CAPTURING(), &fence).await.unwrap();
    assert!(!is_nftables().await);
    drop(both);
    let both = open(BackEndChoice::Only(BackEnd::Nftables)).await;
    assert!(both.owns(netns).await.unwrap());
    both.verify(netns, &CAPTURING()).await.unwrap();
    assert!(!is_nftables().await);
    both.remove(netns).await.unwrap();
    assert_eq!(world.everything(), before);
    Ebpf::close(world.cgroup());
}

#[tokio::test]
#[ignore = "netns"]
async fn a_node_without_a_needed_feature_falls_back_and_says_which_and_why() {
    let world = World::<Nftables>::new();
    // No file system of any kind can be had here.
    let nowhere = Path::new("/proc/podveil");
    let open = |choice| BackEnds::open(choice, nowhere, world.cgroup().clone());
    let ebpf = BackEndChoice::Only(BackEnd::Ebpf);
    assert!(matches!(open(ebpf).await, Err(BackEndError::None(_))));
    let auto = open(BackEndChoice::Auto).await.unwrap();
    assert_eq!(auto.chosen().back_end, BackEnd::Nftables);
    let [missing] = auto.chosen().unusable.as_slice() else {
        panic!("{:?}", auto.chosen());
    };
    assert_eq!(
        (missing.back_end, missing.feature),
        (BackEnd::Ebpf, Feature::BpfFileSystem)
    );
    auto.apply(&world.pod, &CAPTURING(), &fence_of(&world))
        .await
        .unwrap();
    assert!(world.backend.has_table(&world.pod).await.unwrap());
}

/// In a user namespace of its own the kernel denies bpf(2), and nothing that nftables needs.
#[tokio::test]
#[ignore = "netns"]
async fn where_bpf_is_denied_nftables_captures_and_nothing_is_left_of_the_attempt() {
    const FOLDER: &str = "PODVEIL_TEST_DENIED";
    if let Some(folder) = std::env::var_os(FOLDER) {
        let folder = Path::new(&folder);
        let cgroup = world::cgroup_of(std::os::unix::process::parent_id());
        for _ in 0..2 {
            let auto = BackEnds::open(BackEndChoice::Auto, folder, cgroup.clone());
            let chosen = auto.await.unwrap().chosen().clone();
            assert_eq!(chosen.back_end, BackEnd::Nftables);
            let [missing] = chosen.unusable.as_slice() else {
                panic!("{chosen:?}");
            };
            assert_eq!(missing.feature, Feature::BpfMaps);
            assert!(missing.reason.contains("not permitted"), "{missing}");
        }
        return;
    }
    let world = World::<Ebpf>::new();
    let folder = world.pins().join("denied");
    let name = "where_bpf_is_denied_nftables_captures_and_nothing_is_left_of_the_attempt";
    let child = std::process::Command::new("unshare")
        .args(["--user", "--map-root-user", "--net", "--"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--ignored", "--nocapture"])
        .env(FOLDER, &folder)
        .output()
        .unwrap();
    let said = [child.stdout, child.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(child.status.success(), "{said}");
    assert!(said.contains("1 passed"), "{said}");
    assert!(!folder.exists());
}

/// As in a container.
#[tokio::test]
#[ignore = "netns"]
async fn ebpf_captures_where_proc_sys_is_read_only() {
    let rule = "ebpf::answers_to_a_kept_client_address_come_back";
    let read_only = "mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys";
    let child = std::process::Command::new("unshare")
        .args(["--mount", "sh", "-c"])
        .arg(format!(
            "{read_only} && exec \"$0\" --exact {rule} --ignored"
        ))
        .arg(std::env::current_exe().unwrap())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stdout);
    assert!(
        child.status.success() && said.contains("1 passed"),
        "{said}"
    );
}

async fn namespaces_come_and_go<B: Tested>() {
    let at_the_next_start = |world: &mut World<B>| world.restart();
    come_and_go::<B>(2, 8, at_the_next_start).await;
    come_and_go::<B>(2, 8, while_it_runs).await;
}

fn while_it_runs<B: Tested>(world: &mut World<B>) {
    world.backend.forget_gone().unwrap();
}

/// Each is captured; in one round they are let go, in the next they vanish under the rules. What is kept outside of them
/// is forgotten.
async fn come_and_go<B: Tested>(rounds: usize, namespaces: usize, forget: impl Fn(&mut World<B>)) {
    let mut world = World::<B>::new();
    let kept = world.kept();
    let before = world.descriptors();
    let fence = fence_of(&world);
    for round in 0..rounds {
        let namespaces: Vec<_> = (0..namespaces).map(|_| world::new_netns()).collect();
        for netns in &namespaces {
            let older = world.backend.apply(netns, &CAPTURING(), &fence).await;
            assert_eq!(older.unwrap(), BTreeSet::new());
        }
        for netns in &namespaces {
            assert!(world.backend.owns(netns).await.unwrap());
            if round % 2 == 0 {
                world.backend.remove(netns).await.unwrap();
                assert!(!world.backend.stands(netns).await.unwrap());
            }
        }
    }
    // The kernel takes a namespace apart in its own time.
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        forget(&mut world);
        if world.kept() == kept {
            break;
        }
        assert!(Instant::now() < deadline, "{:?}", world.kept());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(world.descriptors(), before);
}

/// A node's life of pods: memory of this process included, nothing is left of them.
#[tokio::test]
#[ignore = "all"]
async fn ten_thousand_namespaces_come_and_go_with_ebpf() {
    come_and_go::<Ebpf>(2, 100, while_it_runs).await;
    let before = resident_bytes();
    come_and_go::<Ebpf>(100, 100, while_it_runs).await;
    let after = resident_bytes();
    assert!(after < before + (8 << 20), "{before} bytes, then {after}");
}

fn resident_bytes() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    let resident = pages.split(' ').nth(1).unwrap();
    4096 * resident.parse::<u64>().unwrap()
}

/// As many as a full node has at once, and more: captured, verified and let go again, within these bounds.
mod a_thousand_namespaces {
    use super::{Ebpf, Flavour, Iptables, Nftables, a_thousand, world};
    use std::time::Duration;

    #[tokio::test]
    #[ignore = "all"]
    async fn come_and_go_with_ebpf_in_ten_seconds() {
        a_thousand::<Ebpf>(Duration::from_secs(10)).await;
    }

    #[tokio::test]
    #[ignore = "all"]
    async fn come_and_go_with_nftables_in_ten_seconds() {
        a_thousand::<Nftables>(Duration::from_secs(10)).await;
    }

    #[tokio::test]
    #[ignore = "all"]
    async fn come_and_go_with_iptables_in_a_minute() {
        world::FLAVOUR.set(Flavour::Nft);
        a_thousand::<Iptables>(Duration::from_secs(60)).await;
    }
}

async fn a_thousand<B: Tested>(bound: Duration) {
    const AT_ONCE: usize = 8;
    let world = World::<B>::new();
    let fence = fence_of(&world);
    let kept = world.kept();
    let namespaces: Vec<_> = (0..1000).map(|_| world::new_netns()).collect();
    let before = world.descriptors();
    let chunks: Vec<_> = namespaces.chunks(namespaces.len() / AT_ONCE).collect();
    let began = Instant::now();
    join_all(chunks.iter().map(async |chunk| {
        for netns in *chunk {
            let applied = world.backend.apply(netns, &CAPTURING(), &fence).await;
            assert_eq!(applied.unwrap(), BTreeSet::new());
            world.backend.verify(netns, &CAPTURING()).await.unwrap();
        }
    }))
    .await;
    let captured = began.elapsed();
    let began = Instant::now();
    join_all(chunks.iter().map(async |chunk| {
        for netns in *chunk {
            world.backend.remove(netns).await.unwrap();
        }
    }))
    .await;
    let released = began.elapsed();
    println!(
        "{}: captured in {captured:?}, released in {released:?}",
        B::NAME
    );
    for netns in &namespaces {
        assert!(!world.backend.stands(netns).await.unwrap());
    }
    assert_eq!((world.kept(), world.descriptors()), (kept, before));
    assert!(captured < bound && released < bound);
}
