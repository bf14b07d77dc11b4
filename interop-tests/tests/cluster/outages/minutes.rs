// SPDX-License-Identifier: Apache-2.0
//! The same for minutes: API server, controllers and CA, alone and together, killed as often as they come back, standing
//! still, and cut off from every node.

use super::bed::{Bed, CA, CONTROLLER};
use anyhow::{Context, ensure};
use nix::sys::signal::Signal;
use std::time::{Duration, Instant};

/// Above the 40 s after which Kubernetes gives a node up, and above every pause between attempts of ours.
const AWAY: Duration = Duration::from_secs(120);
/// How often what has been started again is killed again.
const AGAIN: Duration = Duration::from_secs(2);
/// A kubelet waits for up to five minutes before it starts again what has ended that often.
const BACK_OFF: Duration = Duration::from_secs(330);
/// In [`AWAY`], by one program: pauses grow to 5 s; those of a part that comes back in between begin anew.
const MOST_ATTEMPTS: u64 = 150;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Harm {
    CutOff,
    Killed,
    Slow,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Part {
    ApiServer,
    Ca,
    Controller,
}

impl Part {
    fn port(self) -> u16 {
        match self {
            Self::ApiServer => 6443,
            Self::Ca => 15012,
            Self::Controller => 15010,
        }
    }

    fn kill(self, bed: &mut Bed) -> anyhow::Result<()> {
        match self {
            Self::ApiServer => bed.cluster.kill_server(),
            part => drop(part.signal(bed, Signal::SIGKILL)?),
        }
        Ok(())
    }

    /// How many processes of it there were.
    fn signal(self, bed: &Bed, signal: Signal) -> anyhow::Result<usize> {
        match self {
            Self::ApiServer => bed.cluster.control.signal("kube-apiserver", &[], signal),
            Self::Ca => bed.signal_all(CA, signal),
            Self::Controller => bed.signal_all(CONTROLLER, signal),
        }
    }
}

/// All on one cluster; each step finds it whole and leaves it whole.
#[test]
#[ignore = "all"]
fn parts_that_are_away_for_minutes_take_no_connection_with_them() -> anyhow::Result<()> {
    use Part::{ApiServer, Ca, Controller};
    let mut bed = Bed::new()?;
    let full = bed.xds()?.address_bytes;
    let mut failed = Vec::new();
    for parts in [
        &[ApiServer, Ca, Controller][..],
        &[ApiServer],
        &[Ca],
        &[Controller],
        &[Ca, Controller],
        &[ApiServer, Ca],
        &[ApiServer, Controller],
    ] {
        for harm in [Harm::Slow, Harm::CutOff, Harm::Killed] {
            let what = format!("{parts:?} {harm:?}");
            match bed.watched(|bed| away(bed, parts, harm, full)) {
                Ok(seen) => println!("holds: {what}: {seen}"),
                Err(error) => {
                    println!("does NOT hold: {what}: {error:#}\n{}", bed.diagnosis());
                    failed.push(format!("{what}: {error:#}"));
                    bed.wait_for_programs(BACK_OFF)
                        .and_then(|()| bed.wait_until_whole())
                        .context("it does not come back by itself")?;
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

/// `full`: what the whole state was when it was first sent.
fn away(bed: &mut Bed, parts: &[Part], harm: Harm, full: u64) -> anyhow::Result<String> {
    let old = bed.pair()?;
    let before = bed.xds()?;
    let meanwhile = meanwhile(bed, parts, harm);
    // Whatever was seen: the next step needs a whole cluster.
    heal(bed, parts, harm)?;
    let healed = Instant::now();
    let made = meanwhile?;
    bed.wait_for_programs(BACK_OFF)?;
    bed.wait_until_whole()?;
    let back = healed.elapsed();
    old.lives()?;
    bed.connections_work()?;
    let since = bed.xds_since(&before)?;
    let (tried, bytes) = (since.terminations, since.address_bytes);
    ensure!(
        tried <= MOST_ATTEMPTS,
        "{tried} attempts to reach a controller"
    );
    // Where the API server was away, Kubernetes itself has given the nodes up for a while, and their pods with them; and what is
    // killed again and again is told to be ready and not ready as often.
    if !parts.contains(&Part::ApiServer) && harm != Harm::Killed {
        ensure!(
            bytes <= full / 2,
            "{bytes} bytes of addresses were sent again, {full} at first"
        );
    }
    Ok(format!(
        "{made} connections meanwhile, whole {:.1} s later, {tried} streams ended or tried for, {bytes} bytes of \
         addresses sent again",
        back.as_secs_f64()
    ))
}

fn meanwhile(bed: &mut Bed, parts: &[Part], harm: Harm) -> anyhow::Result<u32> {
    match harm {
        Harm::CutOff => {
            let ports: Vec<u16> = parts.iter().map(|part| part.port()).collect();
            for node in &bed.cluster.nodes {
                node.machine.partition(&ports)?;
            }
            bed.connections_work_for(AWAY)
        }
        Harm::Killed => {
            let end = Instant::now() + AWAY;
            let mut made = 0;
            while Instant::now() < end {
                for part in parts {
                    part.kill(bed)?;
                }
                made += bed.connections_work_for(AGAIN)?;
            }
            Ok(made)
        }
        Harm::Slow => {
            for part in parts {
                let stopped = part.signal(bed, Signal::SIGSTOP)?;
                ensure!(stopped > 0, "{part:?} does not run");
            }
            bed.connections_work_for(AWAY)
        }
    }
}

fn heal(bed: &mut Bed, parts: &[Part], harm: Harm) -> anyhow::Result<()> {
    match harm {
        Harm::CutOff => {
            for node in &bed.cluster.nodes {
                node.machine.heal()?;
            }
        }
        Harm::Killed => {
            if parts.contains(&Part::ApiServer) {
                bed.cluster.start_server()?;
            }
        }
        Harm::Slow => {
            for part in parts {
                // The kubelet has killed what answered no probe; what runs in its place was never stopped.
                part.signal(bed, Signal::SIGCONT)?;
            }
        }
    }
    if parts.contains(&Part::ApiServer) {
        bed.cluster.wait_for_server()?;
    }
    Ok(())
}
