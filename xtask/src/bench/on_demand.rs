// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask bench on-demand`: two simulated nodes in a large cluster, one of which holds no more of it than its pods talk
//! to. All other nodes are entries of the cluster file; their pods are enrolled and nobody answers there. A pod on each of
//! the two dials the same services, so that both proxies have done the same.

use super::{Path, load, median, release};
use anyhow::{Context, ensure};
use podveil_sim::{
    Binaries, Named, NodePrograms, NodeSettings, Service, ServicePort, WorkloadEntry, World,
    eventually, in_netns,
};
use serde_json::{Map, json};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

const SETTLE: Duration = Duration::from_secs(120);
/// The allocators' own rules give memory back within ten seconds.
const REST: Duration = Duration::from_secs(12);
const PORT: u16 = 9000;
/// Services with one endpoint that answers, on the other of the two nodes.
const ANSWERED: usize = 200;

#[derive(clap::Args)]
pub struct Arguments {
    /// Nodes of the cluster.
    #[arg(long, default_value_t = 1000)]
    nodes: usize,
    /// Services of 20 pods each.
    #[arg(long, default_value_t = 800)]
    services: usize,
    /// Pods of one more service.
    #[arg(long, default_value_t = 4000)]
    large: usize,
    /// Services that the two pods talk to.
    #[arg(long, default_value_t = 50)]
    talks_to: usize,
    /// The folder of programs that are built already, in place of a release build.
    #[arg(long)]
    binaries: Option<PathBuf>,
}

const ENDPOINTS: usize = 20;

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let binaries = match &arguments.binaries {
        Some(folder) => Binaries::in_folder(folder)?,
        None => release()?,
    };
    let world = world(binaries, arguments)?;
    println!("| measured | holds everything | on demand |\n|---|---:|---:|");
    std::thread::sleep(REST);
    print_memory(&world, "its pod has dialled nobody")?;
    let talks_to = arguments.talks_to.min(arguments.services);
    // Those of 20 pods first; the large one comes behind all others.
    dial(&world, 0..talks_to)?;
    std::thread::sleep(REST);
    print_memory(
        &world,
        &format!("it has dialled {talks_to} services of {ENDPOINTS} pods"),
    )?;
    first_answers(&world)?;
    dial(&world, arguments.services..arguments.services + 1)?;
    std::thread::sleep(REST);
    print_memory(
        &world,
        &format!("it has also dialled one of {}", arguments.large),
    )
}

fn world(binaries: Binaries, arguments: &Arguments) -> anyhow::Result<World> {
    let mut world = World::new(binaries, NodeSettings::default())?;
    world.cluster.add_namespace("shop", true);
    world.add_pod(1, "shop", "part", "client")?;
    world.add_pod(2, "shop", "all", "client")?;
    let cluster = &mut world.cluster;
    let others = (3..=arguments.nodes).map(|node| Named {
        name: format!("n{node}"),
    });
    cluster.nodes.extend(others);
    let mut pod = 0;
    for service in 0..=arguments.services {
        let count = match service {
            large if large == arguments.services => arguments.large,
            _ => ENDPOINTS,
        };
        let names: Vec<String> = (pod..pod + count).map(|pod| format!("app-{pod}")).collect();
        for name in &names {
            let node = 3 + pod % arguments.nodes.saturating_sub(2).max(1);
            cluster.workloads.push(WorkloadEntry {
                name: name.clone(),
                namespace: "shop".into(),
                uid: format!("0b5d7a1e-9f0c-4f52-8a77-{pod:012x}"),
                node: format!("n{node}"),
                service_account: format!("app-{service}"),
                addresses: vec![nth(Ipv4Addr::new(10, 244, 64, 0), pod)],
                annotations: Default::default(),
                labels: [("app".to_owned(), format!("app-{service}"))].into(),
                phase: "Running",
            });
            pod += 1;
        }
        cluster.services.push(one(
            &format!("app-{service}"),
            service_address(service),
            names,
        ));
    }
    for number in 0..ANSWERED {
        for (endpoint, offset) in [("all", 0), ("part", ANSWERED)] {
            let address = answered_address(number + offset);
            let name = format!("{endpoint}-{number}");
            cluster
                .services
                .push(one(&name, address, vec![endpoint.to_owned()]));
        }
    }
    cluster.write()?;
    enrolled_long_ago(&world)?;
    world.start_control_plane()?;
    let on_demand = NodeSettings {
        proxy: Map::from_iter([("on_demand".to_owned(), json!(true))]),
        ..NodeSettings::default()
    };
    let nodes = world.topology.nodes.iter();
    for (node, settings) in nodes.zip([on_demand, NodeSettings::default()]) {
        let programs = NodePrograms::start(&world.sandbox, &world.binaries, node, &settings)?;
        world.nodes.push(programs);
    }
    // Of the two that have nodes; the others have been for long.
    eventually(SETTLE, "the two pods are mandatory", || {
        for pod in ["part", "all"] {
            let stage = world.stage(pod)?;
            ensure!(stage == "mandatory", "{pod} is {stage}");
        }
        Ok(())
    })?;
    Ok(world)
}

/// What the controller would have saved of pods that have been enrolled for long.
fn enrolled_long_ago(world: &World) -> anyhow::Result<()> {
    let entries = world
        .cluster
        .workloads
        .iter()
        .filter(|one| one.name.starts_with("app-"));
    let workloads: Map<_, _> = entries
        .map(|one| {
            let saved = json!({ "stage": "mandatory", "strict": false, "resource_version": 1 });
            (one.uid.clone(), saved)
        })
        .collect();
    let folder = world.sandbox.folder().join("controller");
    std::fs::create_dir_all(&folder)?;
    let file = json!({ "version": 1, "workloads": workloads });
    std::fs::write(folder.join("enrolment.json"), serde_json::to_vec(&file)?)?;
    Ok(())
}

fn one(name: &str, address: IpAddr, endpoints: Vec<String>) -> Service {
    Service {
        name: name.to_owned(),
        namespace: "shop".into(),
        addresses: vec![address],
        ports: vec![ServicePort {
            port: 80,
            target_port: PORT,
        }],
        endpoints,
    }
}

fn nth(first: Ipv4Addr, number: usize) -> IpAddr {
    let number = u32::try_from(number).unwrap_or(u32::MAX);
    Ipv4Addr::from_bits(first.to_bits().saturating_add(number)).into()
}

fn service_address(service: usize) -> IpAddr {
    nth(Ipv4Addr::new(10, 96, 1, 0), service)
}

fn answered_address(number: usize) -> IpAddr {
    nth(Ipv4Addr::new(10, 96, 200, 0), number)
}

/// Both pods dial these services. Nobody answers: what is looked for is what the proxies hold of them.
fn dial(world: &World, services: Range<usize>) -> anyhow::Result<()> {
    let expected = lookups(world)? + services.len();
    let mut held = Vec::new();
    for address in services.map(service_address) {
        for pod in ["part", "all"] {
            let to = SocketAddr::new(address, 80);
            held.push(in_netns(&world.pod(pod).net.netns, || {
                TcpStream::connect_timeout(&to, SETTLE).context("connecting to the proxy")
            })?);
        }
    }
    eventually(SETTLE, "the node holds what its pod dialled", || {
        let lookups = lookups(world)?;
        ensure!(
            lookups >= expected,
            "{lookups} of {expected} lookups are held"
        );
        Ok(())
    })
}

fn lookups(world: &World) -> anyhow::Result<usize> {
    let status = world.proxy_page(1, "/status")?;
    let lookups = status["podveil"]["onDemand"]["lookups"].as_u64();
    Ok(usize::try_from(
        lookups.context("node 1 holds everything")?,
    )?)
}

fn print_memory(world: &World, when: &str) -> anyhow::Result<()> {
    let [part, all] = &world.nodes[..] else {
        anyhow::bail!("there are two nodes");
    };
    for (module, part, all) in [
        ("proxy", &part.proxy, &all.proxy),
        ("redirect", &part.redirect, &all.redirect),
    ] {
        let resident = |pid| -> anyhow::Result<f64> {
            Ok(super::cost::resident_bytes(&[pid])? as f64 / f64::from(1 << 20))
        };
        println!(
            "| `{module}` when {when}, MiB | {:.1} | {:.1} |",
            resident(all.pid())?,
            resident(part.pid())?
        );
    }
    Ok(())
}

/// How long the first connection to a service takes to its first answer, when the tunnel to its endpoint is there already.
fn first_answers(world: &World) -> anyhow::Result<()> {
    let _servers = ["part", "all"]
        .map(|pod| load::serve(&world.pod(pod).net.netns, PORT))
        .into_iter()
        .collect::<Result<Vec<_>, _>>()?;
    let mut figures = Vec::new();
    for (client, offset) in [("all", ANSWERED), ("part", 0)] {
        let mut samples = Vec::new();
        for number in 0..ANSWERED {
            let path = Path {
                name: "first",
                client: world.pod(client).net.netns.try_clone()?,
                to: SocketAddr::new(answered_address(number + offset), 80),
            };
            let took = load::first_answer(&path)?.as_secs_f64() * 1e3;
            // The first one makes the tunnel.
            if number > 0 {
                samples.push(took);
            }
        }
        figures.push(median(samples).context("there are samples")?);
    }
    println!(
        "| first connection to a service, to its first answer, p50 of {ANSWERED}, ms | {:.2} | {:.2} |",
        figures[0], figures[1]
    );
    Ok(())
}
