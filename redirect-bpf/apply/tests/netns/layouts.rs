// SPDX-License-Identifier: Apache-2.0
//! A program with another layout of the maps takes over from the one before it, in both directions.

use super::{CAPTURING, fence_of};
use crate::world::{self, Family, Listening, World, both_ways, reset};
use podveil_apply::{Backend, Ebpf};
use podveil_bpf::Layout;
use podveil_plan::Capture;
use std::collections::BTreeSet;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How often the layout changes under load.
const CHANGES: usize = 10;
/// New connections between two changes, of each kind.
const BETWEEN: usize = 20;

/// Other threads look on, and borrow the world.
fn block_on<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    runtime.unwrap().block_on(work)
}

fn opened(world: &World<Ebpf>, layout: u32) -> Ebpf {
    Ebpf::open_as(Layout(layout), &world.pins(), world.cgroup().clone()).unwrap()
}

fn layouts(world: &World<Ebpf>) -> Vec<String> {
    let entries = std::fs::read_dir(world.pins()).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with('v')).collect()
}

/// Opens connections until it is told to stop: each must come to the proxy's listener.
fn keep_connecting(
    stop: &AtomicBool,
    count: &AtomicUsize,
    listening: &Listening,
    connect: impl Fn() -> io::Result<TcpStream>,
) {
    while !stop.load(Ordering::Relaxed) {
        let connected = connect().unwrap();
        // This one, or that of another thread, which takes this one.
        drop(listening.accept());
        reset(connected);
        count.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
#[ignore = "netns"]
fn another_layout_takes_over_and_no_connection_notices() {
    let world = World::<Ebpf>::new();
    let before = world.everything();
    // Behind no fence.
    let (_, other) = world.second_interface();
    let peers = [world.peer_ip(Family::V4), world.peer_ip(Family::V6)];
    let pods = [world.pod_ip(Family::V4), world.pod_ip(Family::V6)];
    let fence = fence_of(&world);
    let servers = Family::BOTH.map(|family| world.peer_listens(family, 8080));
    let tunnels = Family::BOTH.map(|family| world.peer_listens(family, 15008));
    let applications = Family::BOTH.map(|family| world.app_listens(family, 8080));
    let mut live = Vec::new();
    for (peer, server) in peers.into_iter().zip(&servers) {
        let older = world.app_connects((peer, 8080)).unwrap();
        live.push((older, server.accept()));
    }
    let capture = Capture {
        refuses_plain: false,
        ..CAPTURING()
    };
    let older = block_on(world.backend.apply(&world.pod, &capture, &fence)).unwrap();
    assert_eq!(older.len(), 2);
    let outbound = Family::BOTH.map(|family| world.proxy_listens(family, 15001));
    let inbound = Family::BOTH.map(|family| world.proxy_listens(family, 15006));
    for at in 0..2 {
        let client = world.app_connects((peers[at], 8080)).unwrap();
        live.push((client, outbound[at].accept()));
        let client = world.peer_connects((pods[at], 8080)).unwrap();
        live.push((client, inbound[at].accept()));
        let hop = world
            .proxy_connects_as(peers[at], (pods[at], 8080))
            .unwrap();
        live.push((hop, applications[at].accept()));
        let tunnel = world.proxy_connects((peers[at], 15008)).unwrap();
        live.push((tunnel, tunnels[at].accept()));
    }
    let carried = |backend: &Ebpf| {
        let mut none = BTreeSet::new();
        block_on(backend.observe(&world.pod, &mut none))
            .unwrap()
            .captured
    };
    assert_eq!(carried(&world.backend), 6);

    let stop = AtomicBool::new(false);
    let counts: [AtomicUsize; 5] = Default::default();
    let last = std::thread::scope(|scope| {
        let (stop, world) = (&stop, &world);
        let mut kinds = counts.iter();
        for (to, listening) in [
            (peers[0], &outbound[0]),
            (peers[1], &outbound[1]),
            (other, &outbound[0]),
        ] {
            let count = kinds.next().unwrap();
            let connect = move || world.app_connects((to, 8080));
            scope.spawn(move || keep_connecting(stop, count, listening, connect));
        }
        for (to, listening) in pods.into_iter().zip(&inbound) {
            let count = kinds.next().unwrap();
            let connect = move || world.peer_connects((to, 8080));
            scope.spawn(move || keep_connecting(stop, count, listening, connect));
        }
        // Ends the others also if it panics.
        let _over = Over(stop);
        let mut last = None;
        for change in 0..CHANGES {
            let layout = 2 - (change % 2) as u32;
            more(&counts);
            let next = opened(world, layout);
            if change % 3 == 0 {
                // Killed, and started again.
                drop(next);
                more(&counts);
            }
            let next = opened(world, layout);
            assert!(block_on(next.owns(&world.pod)).unwrap());
            more(&counts);
            let held = block_on(next.apply(&world.pod, &capture, &fence)).unwrap();
            assert_eq!(held, older);
            more(&counts);
            block_on(next.verify(&world.pod, &capture)).unwrap();
            assert_eq!(layouts(world), [format!("v{layout}")]);
            for (one, two) in &live {
                both_ways(one, two);
            }
            last = Some(next);
        }
        last.unwrap()
    });
    for listening in servers.iter().chain(&applications).chain(&tunnels) {
        assert!(listening.is_idle(), "a connection went past the proxy");
    }
    let total: usize = counts
        .iter()
        .map(|count| count.load(Ordering::Relaxed))
        .sum();
    println!("{total} connections while the layout changed {CHANGES} times");

    // What has been counted before goes on, and ends.
    drop((outbound, inbound));
    live.clear();
    let deadline = Instant::now() + Duration::from_secs(5);
    while carried(&last) != 0 {
        assert!(Instant::now() < deadline, "{} are carried", carried(&last));
        std::thread::yield_now();
    }
    block_on(last.remove(&world.pod)).unwrap();
    world::run(&world.pod, "ip", &["link", "del", "eth1"]);
    assert_eq!(world.everything(), before);
    assert_eq!(world.kept(), Vec::<String>::new());
}

struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn more(counts: &[AtomicUsize]) {
    let now = |count: &AtomicUsize| count.load(Ordering::Relaxed);
    let wanted: Vec<usize> = counts.iter().map(|count| now(count) + BETWEEN).collect();
    let deadline = Instant::now() + Duration::from_secs(20);
    while counts
        .iter()
        .zip(&wanted)
        .any(|(count, wanted)| now(count) < *wanted)
    {
        assert!(
            Instant::now() < deadline,
            "connections do not come to the proxy"
        );
        std::thread::yield_now();
    }
}

#[test]
#[ignore = "netns"]
fn what_another_layout_has_is_removed_as_our_own() {
    let world = World::<Ebpf>::new();
    let before = world.everything();
    let (kept, gone) = (&world.pod, world::new_netns());
    for netns in [kept, &gone] {
        block_on(world.backend.apply(netns, &CAPTURING(), &fence_of(&world))).unwrap();
    }
    let next = opened(&world, 2);
    assert!(block_on(next.stands(kept)).unwrap());
    block_on(next.remove(kept)).unwrap();
    assert_eq!(world.everything(), before);
    // The other one still depends on it, until it ends.
    assert_eq!(layouts(&world).len(), 2);
    drop(gone);
    let deadline = Instant::now() + Duration::from_secs(60);
    while layouts(&world) != ["v2"] {
        assert!(Instant::now() < deadline, "{:?}", layouts(&world));
        next.forget_gone().unwrap();
        std::thread::yield_now();
    }
    assert_eq!(world.kept(), Vec::<String>::new());
    // Nobody was captured by it.
    assert!(!block_on(opened(&world, 3).stands(kept)).unwrap());
    assert_eq!(layouts(&world), ["v3"]);
}

#[test]
#[ignore = "netns"]
fn a_release_begun_in_one_layout_ends_in_the_next() {
    let world = World::<Ebpf>::new();
    let before = world.everything();
    let peer: IpAddr = world.peer_ip(Family::V4);
    let server = world.peer_listens(Family::V4, 8080);
    let outbound = world.proxy_listens(Family::V4, 15001);
    block_on(
        world
            .backend
            .apply(&world.pod, &CAPTURING(), &fence_of(&world)),
    )
    .unwrap();
    let client = world.app_connects((peer, 8080)).unwrap();
    let accepted = outbound.accept();
    let none = Arc::default();
    block_on(world.backend.apply(&world.pod, &Capture::release(), &none)).unwrap();
    let next = opened(&world, 2);
    both_ways(&client, &accepted);
    block_on(next.apply(&world.pod, &Capture::release(), &none)).unwrap();
    block_on(next.verify(&world.pod, &Capture::release())).unwrap();
    both_ways(&client, &accepted);
    let past = world.app_connects((peer, 8080)).unwrap();
    both_ways(&past, &server.accept());
    let again = block_on(next.apply(&world.pod, &CAPTURING(), &fence_of(&world))).unwrap();
    assert_eq!(again.len(), 1);
    let refused = {
        drop(outbound);
        world.app_connects((peer, 8080)).unwrap_err()
    };
    assert_ne!(refused.kind(), ErrorKind::NotConnected);
    assert!(server.is_idle());
    block_on(next.remove(&world.pod)).unwrap();
    assert_eq!(world.everything(), before);
    assert_eq!(layouts(&world), ["v2"]);
}

#[test]
#[ignore = "netns"]
fn what_is_left_half_way_of_another_layout_takes_nothing_of_ours_along() {
    let world = World::<Ebpf>::new();
    let before = world.everything();
    let fence = fence_of(&world);
    let next = opened(&world, 2);
    block_on(next.apply(&world.pod, &CAPTURING(), &fence)).unwrap();
    assert_eq!(layouts(&world), ["v2"]);
    // As if the folder of its links had been emptied, and not yet removed.
    let cookie = world.pod.cookie().unwrap().to_string();
    let emptied = || std::fs::create_dir_all(world.pins().join("v1/pods").join(&cookie)).unwrap();
    emptied();
    drop(next);
    let next = opened(&world, 2);
    block_on(next.verify(&world.pod, &CAPTURING())).unwrap();
    assert_eq!(layouts(&world), ["v2"]);
    emptied();
    next.forget_gone().unwrap();
    block_on(next.verify(&world.pod, &CAPTURING())).unwrap();
    block_on(next.remove(&world.pod)).unwrap();
    assert_eq!(world.everything(), before);
}
