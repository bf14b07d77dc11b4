// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask bench capture`: what the way into the proxy costs, by every back end and by none.
//!
//! A server stands for the proxy: it listens on the capture ports in the pod's namespace and answers there. The client of a
//! captured pod dials an address elsewhere and is brought to them; that of a twin, which is not captured, dials them itself.
//! Both take turns in slices of a moment, since a machine is not equally fast for long: a share is of one's slices to the
//! other's between them.

mod traffic;

use super::median;
use anyhow::Context;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use podveil_apply::{Backend, Ebpf, Flavour, Iptables, Nftables};
use podveil_netns::NetNs;
use podveil_netns::cgroup::{self, CgroupPath};
use podveil_plan::{Capture, Phase};
use podveil_sim::{Sandbox, run as command};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use std::{fs, process};
use traffic::{Kind, Server};

const OUTBOUND: u16 = 15001;
const INBOUND: u16 = 15006;
/// Where a captured client believes to go.
const ELSEWHERE: u16 = 9000;
const POD: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const TWIN: Ipv4Addr = Ipv4Addr::new(10, 9, 1, 1);

#[derive(clap::Args)]
#[group(skip)]
pub struct Arguments {
    /// Rounds; each figure is the median over them.
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Milliseconds of each measurement in each round.
    #[arg(long, default_value_t = 500)]
    milliseconds: u64,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Way {
    Ebpf,
    Nftables,
    Iptables,
}

impl Way {
    const ALL: [Self; 3] = [Self::Ebpf, Self::Nftables, Self::Iptables];

    fn name(self) -> &'static str {
        match self {
            Self::Ebpf => "ebpf",
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
        }
    }
}

/// Outbound or not, on one processor or on all.
const CASES: [(bool, bool); 4] = [(true, true), (true, false), (false, true), (false, false)];

/// Turns that a pod and its twin take within a measurement.
const SLICES: u32 = 5;

/// One measurement.
struct Sample {
    case: usize,
    kind: Kind,
    way: Way,
    captured: f64,
    /// The twin's.
    none: f64,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let bed = Bed::new()?;
    let slice = Duration::from_millis(arguments.milliseconds) / SLICES;
    let all = sched_getaffinity(Pid::from_raw(0))?;
    let mut one = CpuSet::new();
    one.set(0)?;
    let mut samples: Vec<Sample> = Vec::new();
    for round in 0..arguments.rounds {
        eprintln!("round {} of {}", round + 1, arguments.rounds);
        let mut ways = Way::ALL;
        ways.rotate_left(round % Way::ALL.len());
        for way in ways {
            let captured = Captured::apply(&bed, way, &runtime)
                .with_context(|| format!("capture by {}", way.name()))?;
            let (pod, twin) = (bed.serve(&bed.pod)?, bed.serve(&bed.twin)?);
            for (case, (outbound, alone)) in CASES.into_iter().enumerate() {
                on(if alone { &one } else { &all })?;
                for kind in Kind::ALL {
                    let which = usize::from(!outbound);
                    let turns = [
                        (&twin[which], bed.path(&bed.twin, outbound)),
                        (&pod[which], bed.path(&bed.pod, outbound)),
                    ];
                    let mut sums = [0.0; 2];
                    for _ in 0..SLICES {
                        for ((server, (from, to)), sum) in turns.iter().zip(&mut sums) {
                            server.be_ready_for(kind);
                            *sum += traffic::measure(from, *to, kind, slice)
                                .with_context(|| format!("{} {kind:?}", way.name()))?;
                        }
                    }
                    let [none, captured] = sums.map(|sum| sum / f64::from(SLICES));
                    samples.push(Sample {
                        case,
                        kind,
                        way,
                        captured,
                        none,
                    });
                }
            }
            on(&all)?;
            drop((pod, twin));
            captured.remove(&bed, &runtime)?;
        }
    }
    print(&samples);
    Ok(())
}

fn print(samples: &[Sample]) {
    print!("| median of rounds (share of none beside it) | none |");
    Way::ALL.iter().for_each(|way| print!(" {} |", way.name()));
    println!("\n|---|---:|{}", "---:|".repeat(Way::ALL.len()));
    for (case, (outbound, alone)) in CASES.into_iter().enumerate() {
        let direction = if outbound { "outbound" } else { "inbound" };
        let processors = if alone { "one core" } else { "all cores" };
        for kind in Kind::ALL {
            print!("| {direction}, {processors}: {} |", kind.unit().0);
            let row = || (samples.iter()).filter(|one| (one.case, one.kind) == (case, kind));
            let none = median(row().map(|one| one.none).collect());
            print!(" {:.0} |", none.unwrap_or(f64::NAN));
            for way in Way::ALL {
                let of = |value: fn(&Sample) -> f64| {
                    let samples = row().filter(|one| one.way == way).map(value);
                    median(samples.collect()).unwrap_or(f64::NAN)
                };
                let figure = of(|one| one.captured);
                let share = of(|one| one.captured / one.none);
                print!(" {figure:.0} ({share:.2}) |");
            }
            println!();
        }
    }
}

/// Every thread of this process, the servers' too: new ones follow those that start them.
fn on(processors: &CpuSet) -> anyhow::Result<()> {
    for task in fs::read_dir("/proc/self/task")? {
        let task = task?.file_name().to_string_lossy().parse()?;
        match sched_setaffinity(Pid::from_raw(task), processors) {
            // It has ended.
            Err(nix::errno::Errno::ESRCH) => {}
            result => result?,
        }
    }
    Ok(())
}

/// A pod, its twin, somebody else, and the links between them.
struct Bed {
    pod: NetNs,
    twin: NetNs,
    peer: NetNs,
    cgroup: CgroupPath,
    pins: PathBuf,
    /// Last: it removes what the others name.
    _sandbox: Sandbox,
}

impl Bed {
    fn new() -> anyhow::Result<Self> {
        let sandbox = Sandbox::new(None)?;
        let (peer_name, peer) = sandbox.add_netns("peer")?;
        let mut pods = Vec::new();
        for (name, ip) in [("pod", POD), ("twin", TWIN)] {
            let (namespace, netns) = sandbox.add_netns(name)?;
            command(
                "ip",
                [
                    "-n", &namespace, "link", "add", "eth0", "type", "veth", "peer", "name", name,
                    "netns", &peer_name,
                ],
            )?;
            set_up(&namespace, &["lo", "eth0"], &format!("{ip}/24"))?;
            set_up(&peer_name, &["lo", name], &format!("{}/24", gateway(ip)))?;
            pods.push(netns);
        }
        let [pod, twin] = <[NetNs; 2]>::try_from(pods).expect("two were made");
        let cgroup = cgroup::locate(&sandbox.cgroup("proxy")?)?;
        fs::create_dir(cgroup.absolute())?;
        Ok(Self {
            pod,
            twin,
            peer,
            cgroup,
            pins: sandbox.mount_point("pins")?,
            _sandbox: sandbox,
        })
    }

    /// Whose sockets are the proxy's is decided by where they are made.
    fn serve(&self, pod: &NetNs) -> anyhow::Result<[Server; 2]> {
        let enter = |folder: PathBuf| {
            fs::write(folder.join("cgroup.procs"), process::id().to_string())
                .with_context(|| format!("entering cgroup {}", folder.display()))
        };
        let folder = self.cgroup.absolute();
        let root = folder
            .parent()
            .context("a folder has one above")?
            .to_owned();
        enter(folder)?;
        let servers = [OUTBOUND, INBOUND].map(|port| Server::start(pod, port));
        enter(root)?;
        let [outbound, inbound] = servers;
        Ok([outbound?, inbound?])
    }

    /// Who dials, and whom.
    fn path(&self, pod: &NetNs, outbound: bool) -> (&NetNs, SocketAddr) {
        let (from, to) = match (outbound, pod.id() == self.twin.id()) {
            (true, true) => (&self.twin, (Ipv4Addr::LOCALHOST, OUTBOUND)),
            (true, false) => (&self.pod, (gateway(POD), ELSEWHERE)),
            (false, true) => (&self.peer, (TWIN, INBOUND)),
            (false, false) => (&self.peer, (POD, ELSEWHERE)),
        };
        (from, to.into())
    }
}

fn set_up(namespace: &str, links: &[&str; 2], address: &str) -> anyhow::Result<()> {
    let [_, link] = links;
    command("ip", ["-n", namespace, "addr", "add", address, "dev", link])?;
    for link in links {
        command("ip", ["-n", namespace, "link", "set", link, "up"])?;
    }
    Ok(())
}

/// The peer's address on the link of this pod.
fn gateway(pod: Ipv4Addr) -> Ipv4Addr {
    let [a, b, c, _] = pod.octets();
    Ipv4Addr::new(a, b, c, 254)
}

/// Capture of the bed's pod.
enum Captured {
    Ebpf(Box<Ebpf>),
    Nftables(Nftables),
    Iptables(Iptables),
}

impl Captured {
    fn apply(bed: &Bed, way: Way, runtime: &tokio::runtime::Runtime) -> anyhow::Result<Self> {
        async fn apply<B: Backend>(backend: B, bed: &Bed) -> anyhow::Result<B> {
            let capture = Capture {
                phase: Phase::Capturing,
                exclude_outbound_ports: [].into(),
                exclude_inbound_ports: [].into(),
                plain_inbound_ports: [].into(),
                refuses_plain: false,
            };
            backend.apply(&bed.pod, &capture, &Arc::default()).await?;
            backend.verify(&bed.pod, &capture).await?;
            Ok(backend)
        }
        let cgroup = bed.cgroup.clone();
        runtime.block_on(async {
            Ok(match way {
                Way::Ebpf => {
                    Self::Ebpf(Box::new(apply(Ebpf::open(&bed.pins, cgroup)?, bed).await?))
                }
                Way::Nftables => Self::Nftables(apply(Nftables::new(cgroup), bed).await?),
                Way::Iptables => {
                    Self::Iptables(apply(Iptables::new(cgroup, Flavour::Nft), bed).await?)
                }
            })
        })
    }

    fn remove(self, bed: &Bed, runtime: &tokio::runtime::Runtime) -> anyhow::Result<()> {
        runtime.block_on(async {
            match self {
                Self::Ebpf(backend) => {
                    backend.remove(&bed.pod).await?;
                    drop(backend);
                    Ebpf::purge(&bed.pins)?;
                }
                Self::Nftables(backend) => backend.remove(&bed.pod).await?,
                Self::Iptables(backend) => backend.remove(&bed.pod).await?,
            }
            Ok(())
        })
    }
}
