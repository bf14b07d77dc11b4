// SPDX-License-Identifier: Apache-2.0
//! When parts are away: the API server, the controllers, the CA, the node program, and all of it at once.

mod bed;
mod minutes;
mod prober;

use anyhow::{Context, ensure};
use bed::{Bed, CA, CONTROLLER, NODE, PROXY, REDIRECT, SETTLE};
use nix::sys::signal::Signal;
use podveil_cluster::podveil::pod;
use podveil_interop_tests::tcp;
use podveil_sim::eventually;
use prober::Prober;
use std::time::{Duration, Instant};

/// Long enough for streams to be given up and tried for several times.
const AWAY: Duration = Duration::from_secs(20);
/// Between the end of the node program and the first new connection that is carried.
const BACK: Duration = Duration::from_secs(2);
/// A first restart under the load of a whole test run; what an idle machine needs is printed.
const BUSY: u32 = 10;
/// In [`AWAY`], by one program: pauses double from 10 ms to 5 s, so that some 15 are to be expected.
const MOST_ATTEMPTS: u64 = 25;

/// All on one cluster; each step finds it whole and leaves it whole.
#[test]
#[ignore = "cluster"]
fn what_is_away_takes_no_connection_with_it_and_comes_back() -> anyhow::Result<()> {
    let mut bed = Bed::new()?;
    let mut failed = Vec::new();
    for (promise, step) in [
        (
            "without controllers and CA, slow and then killed, known pods connect",
            without_controllers_and_ca as fn(&mut Bed) -> anyhow::Result<String>,
        ),
        (
            "a node that is cut off from the whole control plane connects",
            cut_off,
        ),
        (
            "while no controller answers, a new pod waits and says why where its namespace is or may be enrolled; another \
             starts, and is refused",
            pods_that_come_meanwhile,
        ),
        (
            "without the API server, slow and then killed, known pods connect",
            without_the_api_server,
        ),
        (
            "a killed proxy takes only its own connections with it, by reset",
            a_killed_proxy,
        ),
        (
            "a killed redirect module takes nothing with it",
            a_killed_redirect_module,
        ),
        (
            "proxy and redirect killed together come back together",
            both_modules_killed,
        ),
    ] {
        let began = Instant::now();
        match bed.watched(step) {
            Ok(seen) => println!(
                "holds after {:.1} s: {promise}: {seen}",
                began.elapsed().as_secs_f64()
            ),
            Err(error) => {
                println!("does NOT hold: {promise}: {error:#}\n{}", bed.diagnosis());
                failed.push(format!("{promise}: {error:#}"));
                // The next step needs a whole cluster.
                if let Err(error) = bed.wait_until_whole() {
                    println!("it does not come back by itself: {error:#}");
                    break;
                }
            }
        }
    }
    ensure!(
        failed.is_empty(),
        "{} do not hold: {failed:?}",
        failed.len()
    );
    Ok(())
}

fn without_controllers_and_ca(bed: &mut Bed) -> anyhow::Result<String> {
    let old = bed.pair()?;
    let before = bed.xds()?;
    for program in [CONTROLLER, CA] {
        let stopped = bed.signal_all(program, Signal::SIGSTOP)?;
        ensure!(stopped == 2, "{stopped} replicas of {program}");
    }
    let attempts = bed.connections_work_for(AWAY)?;
    for program in [CONTROLLER, CA] {
        bed.signal_all(program, Signal::SIGKILL)?;
    }
    let killed = Instant::now();
    bed.connections_work()?;
    bed.wait_until_whole()?;
    let back = killed.elapsed();
    old.lives()?;
    let since = bed.xds_since(&before)?;
    let tried = since.terminations;
    ensure!(
        tried <= MOST_ATTEMPTS,
        "{tried} attempts to reach a controller"
    );
    // Only the replicas themselves have changed.
    let bytes = since.address_bytes;
    ensure!(
        bytes <= before.address_bytes / 2,
        "{bytes} bytes of addresses were sent again, {} at first",
        before.address_bytes
    );
    Ok(format!(
        "{attempts} connections meanwhile, whole {:.1} s after the kill, {tried} streams ended or tried for, \
         {bytes} bytes of addresses sent again",
        back.as_secs_f64(),
    ))
}

fn cut_off(bed: &mut Bed) -> anyhow::Result<String> {
    let old = bed.pair()?;
    let before = bed.xds()?;
    let node = &bed.cluster.nodes[0].machine;
    node.partition(&[6443, 15010, 15012])?;
    let made = bed.connections_work_for(AWAY);
    bed.cluster.nodes[0].machine.heal()?;
    let healed = Instant::now();
    let made = made?;
    bed.wait_until_whole()?;
    let back = healed.elapsed();
    old.lives()?;
    let since = bed.xds_since(&before)?;
    let tried = since.terminations;
    ensure!(
        tried <= MOST_ATTEMPTS,
        "{tried} attempts to reach a controller"
    );
    // No bound: Kubernetes itself may have changed its mind about every pod of the node, and back again.
    Ok(format!(
        "{made} connections meanwhile, whole {:.1} s later, {tried} streams, {} bytes of addresses sent again",
        back.as_secs_f64(),
        since.address_bytes
    ))
}

fn pods_that_come_meanwhile(bed: &mut Bed) -> anyhow::Result<String> {
    bed.signal_all(CONTROLLER, Signal::SIGSTOP)?;
    let began = Instant::now();
    let outcome = (|| -> anyhow::Result<_> {
        bed.cluster.apply(&format!(
            "{}{}apiVersion: v1\nkind: Namespace\nmetadata: {{ name: made-now }}\n---\n{}",
            pod("shop", "late", "node-2"),
            pod("other", "plain", "node-2"),
            pod("made-now", "late", "node-2"),
        ))?;
        bed.cluster.wait_for_pods("other")?;
        let started = began.elapsed();
        let plain = bed.pod_of("other", "plain")?;
        let _listener = tcp::listen(&plain.netns, bed::PORT)?;
        // Nobody has told of it: it is asked for, and refused when nobody answers.
        tcp::expect_connection_reset(&bed.client.netns, plain.v4(bed::PORT))?;
        for namespace in ["shop", "made-now"] {
            waits_and_says_why(bed, namespace)?;
        }
        Ok(started)
    })();
    bed.signal_all(CONTROLLER, Signal::SIGCONT)?;
    let continued = Instant::now();
    let started = outcome?;
    for namespace in ["shop", "made-now"] {
        bed.cluster.wait_for_pods(namespace)?;
    }
    bed.wait_until_whole()?;
    let back = continued.elapsed();
    let late = bed.pod("late")?;
    let listener = tcp::listen(&late.netns, bed::PORT)?;
    let (here, there) = tcp::pair(&bed.client.netns, &listener, late.v4(bed::PORT))?;
    tcp::send(&here, 1000)?;
    tcp::receive(&there, 1000)?;
    bed.cluster
        .kubectl(&["--namespace=shop", "delete", "pod", "late"])?;
    bed.cluster
        .kubectl(&["--namespace=other", "delete", "pod", "plain"])?;
    bed.cluster
        .kubectl(&["delete", "namespace", "made-now", "--timeout=60s"])?;
    Ok(format!(
        "the other one is ready after {:.1} s; the enrolled one mandatory {:.1} s after the controllers are back",
        started.as_secs_f64(),
        back.as_secs_f64()
    ))
}

/// As its kubelet says of pod `late`.
fn waits_and_says_why(bed: &Bed, namespace: &str) -> anyhow::Result<()> {
    let scope = format!("--namespace={namespace}");
    eventually(SETTLE, "its kubelet says why it does not start", || {
        let failed = "--field-selector=involvedObject.name=late,reason=FailedCreatePodSandBox";
        let events = bed.cluster.get(&[&scope, "events", failed])?["items"].to_string();
        ensure!(
            events.contains("the controller has not told of this pod yet"),
            "{events}"
        );
        Ok(())
    })?;
    let late = bed.cluster.get(&[&scope, "pod", "late"])?;
    let address = &late["status"]["podIP"];
    ensure!(address.is_null(), "it has an address: {address}");
    Ok(())
}

fn without_the_api_server(bed: &mut Bed) -> anyhow::Result<String> {
    let old = bed.pair()?;
    let before = bed.xds()?;
    let slow = bed
        .cluster
        .control
        .signal("kube-apiserver", &[], Signal::SIGSTOP)?;
    ensure!(slow == 1, "{slow} API servers");
    let mut made = bed.connections_work_for(AWAY / 2)?;
    bed.cluster.kill_server();
    made += bed.connections_work_for(AWAY / 2)?;
    bed.cluster.start_server()?;
    bed.cluster.wait_for_server()?;
    let back = Instant::now();
    bed.wait_until_whole()?;
    old.lives()?;
    let since = bed.xds_since(&before)?;
    Ok(format!(
        "{made} connections meanwhile, whole {:.1} s after the API server is ready, {} streams ended, {} bytes of \
         addresses sent",
        back.elapsed().as_secs_f64(),
        since.terminations,
        since.address_bytes,
    ))
}

fn a_killed_proxy(bed: &mut Bed) -> anyhow::Result<String> {
    let old = bed.pair()?;
    let others = bed.local_pair_of_node_2()?;
    let prober = Prober::start(bed)?;
    let killed = bed.kill_module(0, PROXY)?;
    old.is_reset()?;
    let outage = prober.until_carried(killed)?;
    ensure!(outage.clean_ends == 0, "a clean end: {outage:?}");
    others.lives()?;
    bed.wait_until_whole()?;
    bed.connections_work()?;
    let full = bed.xds()?.address_bytes;
    within_bound(outage.duration)?;
    Ok(format!("{outage}, {full} bytes are a full state"))
}

fn a_killed_redirect_module(bed: &mut Bed) -> anyhow::Result<String> {
    let old = bed.pair()?;
    bed.kill_module(0, REDIRECT)?;
    let made = bed.connections_work_for(BACK)?;
    bed.wait_until_whole()?;
    old.lives()?;
    bed.connections_work()?;
    Ok(format!("{made} connections meanwhile"))
}

fn both_modules_killed(bed: &mut Bed) -> anyhow::Result<String> {
    let old = bed.pair()?;
    // Node 2: a container that has been restarted before is restarted later.
    let prober = Prober::start(bed)?;
    bed.kill_module(1, REDIRECT)?;
    let killed = bed.kill_module(1, PROXY)?;
    old.is_reset()?;
    let outage = prober.until_carried(killed)?;
    ensure!(outage.clean_ends == 0, "a clean end: {outage:?}");
    bed.wait_until_whole()?;
    bed.connections_work()?;
    within_bound(outage.duration)?;
    Ok(outage.to_string())
}

#[test]
#[ignore = "cluster"]
fn everything_off_and_on_at_once_comes_back_by_itself() -> anyhow::Result<()> {
    let mut bed = Bed::new()?;
    let seen = (bed.watched(off_and_on)).with_context(|| bed.diagnosis())?;
    println!("holds: {seen}");
    Ok(())
}

fn off_and_on(bed: &mut Bed) -> anyhow::Result<String> {
    bed.cluster.power_off()?;
    let began = Instant::now();
    bed.cluster.power_on()?;
    bed.cluster.wait_for_server()?;
    bed.cluster.wait_for_nodes()?;
    let kubernetes = began.elapsed();
    eventually(4 * SETTLE, "everything is back", || bed.look_again())
        .context("after the power was off")?;
    let whole = began.elapsed();
    bed.wait_until_whole()?;
    bed.connections_work()?;
    let running = bed.signal_all(NODE, Signal::SIGCONT)?;
    ensure!(running == 4, "{running} node programs");
    Ok(format!(
        "nodes ready after {:.1} s, pods and tunnels after {:.1} s",
        kubernetes.as_secs_f64(),
        whole.as_secs_f64()
    ))
}

fn within_bound(outage: Duration) -> anyhow::Result<()> {
    ensure!(
        outage <= BACK * BUSY,
        "new connections failed for {outage:?}, {BACK:?} is the promise of an idle machine"
    );
    Ok(())
}
