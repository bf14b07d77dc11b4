// SPDX-License-Identifier: Apache-2.0
//! The eight things that the demo shows, in order.

use super::forgery;
use super::traffic::{Download, Requests, is_refused};
use crate::ca::{self, CaStatus};
use crate::{rotate, runtime};
use anyhow::{Context, ensure};
use podveil_proto::podveil::ca::v1::RotationKind;
use podveil_sim::{
    APP_PORT, Capture, Captured, Report, World, admin_socket, app::MARKER, eventually, http_get,
    run,
};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

const SETTLE: Duration = Duration::from_secs(20);
const DOWNLOAD_BYTES: u64 = 192 << 20;

pub fn all(world: &mut World, report: &mut Report) -> anyhow::Result<()> {
    report.heading("Enrolment: two nodes, the namespace shop has the label, legacy has not");
    let began = Instant::now();
    let enrolled = world.wait_for_stage("shop", "mandatory", SETTLE);
    let seconds = began.elapsed().as_secs_f64();
    let failed = enrolled.is_err();
    report.line(
        "CA, controller and both nodes are up, all pods of shop are enrolled",
        enrolled.map(|()| format!("after {seconds:.1} s")),
    )?;
    if failed {
        // Nothing below can hold; what is above says why.
        return Ok(());
    }
    curls(world, report)?;
    wire(world, report)?;
    identities(world, report)?;
    modes(world, report)?;
    forgery::step(world, report)?;
    rotation(world, report)?;
    labels(world, report)?;
    outage(world, report)
}

fn get(world: &World, from: &str, to: IpAddr) -> anyhow::Result<String> {
    let body = http_get(&world.pod(from).net, to, APP_PORT, "/")?;
    ensure!(body.contains(MARKER), "a strange answer: {body}");
    Ok(body)
}

fn curls(world: &World, report: &mut Report) -> anyhow::Result<()> {
    report.heading("1. curl from pod to pod");
    for (what, to) in [
        ("across nodes", "web-far"),
        ("on the same node", "web-near"),
    ] {
        for address in world.pod(to).net.addresses {
            let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
            let client = world
                .pod("client")
                .net
                .addresses
                .into_iter()
                .find(|own| own.is_ipv4() == address.is_ipv4());
            let answer = get(world, "client", address).and_then(|body| {
                let client = client.context("the client has no address of this family")?;
                ensure!(
                    body.contains(&format!("peer={client}")),
                    "the application saw another client: {body}"
                );
                Ok(format!(
                    "{address} answers, and sees the client's own address"
                ))
            });
            report.line(&format!("{what}, {family}"), answer)?;
        }
    }
    Ok(())
}

/// Captures all links of node 1 during `work`; only what goes between pods counts.
pub fn captured(
    world: &World,
    work: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<Captured> {
    let pods: Vec<IpAddr> = world
        .pods
        .iter()
        .flat_map(|pod| pod.net.addresses)
        .collect();
    let capture = Capture::start(
        &world.topology.nodes[0].netns,
        MARKER.as_bytes(),
        move |source, destination| pods.contains(&source) && pods.contains(&destination),
    )?;
    let worked = work();
    let captured = capture.finish()?;
    worked?;
    Ok(captured)
}

fn only_tls(captured: &Captured) -> anyhow::Result<String> {
    ensure!(captured.payload_segments > 0, "nothing was captured");
    ensure!(
        captured.marker_frames == 0,
        "the payload's marker was seen in {} frames",
        captured.marker_frames
    );
    ensure!(
        captured.server_ports.iter().eq([&15008]),
        "there was traffic on ports {:?}",
        captured.server_ports
    );
    Ok(format!(
        "{} segments, all on port 15008, the payload's marker in none",
        captured.segments
    ))
}

/// What captures the pods, by all nodes alike; with eBPF there is no NAT in any pod.
fn back_end(world: &World) -> anyhow::Result<String> {
    let mut chosen = Vec::new();
    for node in 1..=world.topology.nodes.len() {
        let status = world.redirect_status(node)?;
        let name = status["backEnd"]["chosen"].as_str();
        chosen.push(name.context("a node names no back end")?.to_owned());
    }
    chosen.dedup();
    for pod in ["client", "web-near", "web-far"] {
        let captured = world.captured(pod)?;
        ensure!(
            captured["backEnd"].as_str() == chosen.first().map(String::as_str),
            "{pod}: {captured}"
        );
        let netns = format!("--net=/run/netns/{}", world.pod(pod).net.namespace);
        let rules = run("nsenter", [&netns, "nft", "list", "ruleset"])?;
        ensure!(
            chosen != ["ebpf"] || rules.trim().is_empty(),
            "{pod} has rules: {rules}"
        );
    }
    Ok(chosen.join(" and "))
}

fn wire(world: &World, report: &mut Report) -> anyhow::Result<()> {
    report.heading("2. What crosses the wire between the nodes");
    report.line("back end", back_end(world))?;
    let seen = captured(world, || {
        for address in world.pod("web-far").net.addresses {
            get(world, "client", address)?;
        }
        Ok(())
    });
    report.line(
        "between enrolled pods only TLS",
        seen.and_then(|captured| only_tls(&captured)),
    )?;
    let seen = captured(world, || {
        get(world, "client", world.pod("plain").net.v4()).map(drop)
    });
    report.line(
        "to a plain pod the marker is found, so the search works",
        seen.and_then(|captured| {
            ensure!(
                captured.marker_frames > 0,
                "the marker was not found: {captured:?}"
            );
            Ok(format!(
                "in {} frames, ports {:?}",
                captured.marker_frames, captured.server_ports
            ))
        }),
    )
}

/// The newest line of a node's access log that `takes` accepts.
pub fn access_log(
    world: &World,
    node: &str,
    takes: impl Fn(&serde_json::Value) -> bool,
) -> anyhow::Result<serde_json::Value> {
    let path = world.sandbox.folder().join(format!("{node}-proxy.log"));
    let text = std::fs::read_to_string(&path)?;
    text.lines()
        .rev()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .find(|line| line["scope"] == "access" && takes(line))
        .with_context(|| format!("no such line in {}", path.display()))
}

fn identities(world: &World, report: &mut Report) -> anyhow::Result<()> {
    report.heading("3. Whom the destination's proxy saw");
    let line = eventually(SETTLE, "the access log has the line", || {
        access_log(world, "n2", |line| {
            line["direction"] == "inbound" && line["src.identity"].is_string()
        })
    });
    let text =
        |line: &serde_json::Value, key: &str| line[key].as_str().unwrap_or("nothing").to_owned();
    report.line(
        "both SPIFFE IDs were proved",
        line.as_ref()
            .map_err(|error| anyhow::anyhow!("{error:#}"))
            .and_then(|line| {
                let (source, destination) =
                    (text(line, "src.identity"), text(line, "dst.identity"));
                ensure!(
                    source == "spiffe://cluster.local/ns/shop/sa/client",
                    "the source was {source}"
                );
                ensure!(
                    destination == "spiffe://cluster.local/ns/shop/sa/web",
                    "the destination was {destination}"
                );
                Ok(format!("{source} to {destination}"))
            }),
    )?;
    report.line(
        "TLS 1.3 with a hybrid post-quantum key exchange",
        line.and_then(|line| {
            let (cipher, exchange) = (text(&line, "tls.cipher"), text(&line, "tls.key_exchange"));
            ensure!(cipher.starts_with("TLS13_"), "the cipher was {cipher}");
            ensure!(
                exchange == "X25519MLKEM768",
                "the key exchange was {exchange}"
            );
            Ok(format!("{cipher}, {exchange}"))
        }),
    )
}

fn modes(world: &mut World, report: &mut Report) -> anyhow::Result<()> {
    report.heading("4. A pod of a namespace without the label");
    let (far, plain) = (world.pod("web-far").net.v4(), world.pod("plain").net.v4());
    report.line(
        "permissive: it reaches an enrolled pod in plain",
        get(world, "plain", far).map(|_| String::new()),
    )?;
    report.line(
        "permissive: an enrolled pod reaches it in plain",
        get(world, "client", plain).map(|_| String::new()),
    )?;
    world.cluster.strict("shop", true).write()?;
    let refused = |world: &World, from: &str, to| {
        eventually(SETTLE, "it is refused", || {
            is_refused(&world.pod(from).net.netns, to, APP_PORT)
        })
    };
    report.line(
        "strict: it is refused by an enrolled pod",
        refused(world, "plain", far),
    )?;
    report.line(
        "strict: an enrolled pod is refused on the way to it",
        refused(world, "client", plain),
    )?;
    report.line(
        "strict: enrolled pods still talk",
        get(world, "client", far).map(|_| String::new()),
    )?;
    world.cluster.strict("shop", false).write()?;
    let again = eventually(SETTLE, "plain works again", || get(world, "plain", far));
    report.line(
        "permissive again: plain works again",
        again.map(|_| String::new()),
    )
}

fn ca_status(world: &World) -> anyhow::Result<CaStatus> {
    let socket = admin_socket(&world.sandbox);
    runtime()?.block_on(async { ca::connect(&socket).await?.status().await })
}

fn rotation(world: &World, report: &mut Report) -> anyhow::Result<()> {
    report.heading("6. A root rotation in the middle of a large download");
    let far = SocketAddr::new(world.pod("web-far").net.v4(), APP_PORT);
    let before = ca_status(world)?;
    let download = Download::start(&world.pod("client").net.netns, far, DOWNLOAD_BYTES);
    let mut steps = Vec::new();
    let rotated = runtime()?.block_on(rotate::rotate(
        &admin_socket(&world.sandbox),
        RotationKind::Root,
        0,
        |event| steps.push(format!("{}/{}", event.acknowledged, event.expected)),
    ));
    let in_the_middle = download
        .as_ref()
        .map(|download| (download.received(), download.is_under_way()))
        .ok();
    report.line(
        "add, switch, issue again, withdraw: each acknowledged by every program",
        rotated.map(|()| format!("acknowledgements {}", steps.join(", "))),
    )?;
    let after = ca_status(world);
    report.line(
        "a new root and new certificates are in use",
        after.and_then(|after| new_root(&before, &after)),
    )?;
    let whole = download.and_then(Download::finish).and_then(|bytes| {
        let (at, under_way) = in_the_middle.context("the download did not start")?;
        ensure!(under_way, "the download ended before the rotation did");
        Ok(format!(
            "{} MiB, each byte checked; the rotation ended after {} MiB of them",
            bytes >> 20,
            at >> 20
        ))
    });
    report.line("not one byte is lost", whole)?;
    let answers = get(world, "client", far.ip());
    report.line(
        "new connections work on the new certificates",
        answers.map(|_| String::new()),
    )
}

fn new_root(before: &CaStatus, after: &CaStatus) -> anyhow::Result<String> {
    let root = |status: &CaStatus| {
        let mut roots = status.authorities.iter().filter(|authority| authority.root);
        let first = roots.next().context("there is no root")?.serial.clone();
        ensure!(roots.next().is_none(), "there is more than one root");
        Ok(first)
    };
    let (old, new) = (root(before)?, root(after)?);
    ensure!(old != new, "the root is still {old}");
    let generation = after.certificate_generation;
    ensure!(
        generation > before.certificate_generation,
        "certificates were not issued again"
    );
    let late: Vec<&str> = after
        .consumers
        .iter()
        .filter(|consumer| {
            consumer.certificate_generation != 0 && consumer.certificate_generation < generation
        })
        .map(|consumer| consumer.spiffe_id.as_str())
        .collect();
    ensure!(
        late.is_empty(),
        "old certificates are in use by {}",
        late.join(", ")
    );
    Ok(format!(
        "root {}... became {}..., certificate generation {generation}",
        short(&old),
        short(&new)
    ))
}

fn short(serial: &str) -> &str {
    serial.get(..8).unwrap_or(serial)
}

fn labels(world: &mut World, report: &mut Report) -> anyhow::Result<()> {
    report.heading("7. The label off and on while clients connect all the time");
    let far = SocketAddr::new(world.pod("web-far").net.v4(), APP_PORT);
    let near = SocketAddr::new(world.pod("web-near").net.v6(), APP_PORT);
    let client = world.pod("client").net.netns.try_clone()?;
    let captured_one = Download::start(&client, far, DOWNLOAD_BYTES);
    let requests = (
        Requests::start(&client, far)?,
        Requests::start(&client, near)?,
    );
    let mut changes = Ok(());
    let mut plain_one = None;
    for on in [false, true, false] {
        world.cluster.enroll("shop", on).write()?;
        changes = world.wait_for_stage("shop", if on { "mandatory" } else { "none" }, SETTLE);
        if changes.is_err() {
            break;
        }
        if !on && plain_one.is_none() {
            plain_one = Some(Download::start(&client, far, DOWNLOAD_BYTES));
        }
    }
    report.line(
        "off, on, off: each change reaches every node",
        changes.map(|()| String::new()),
    )?;
    // Both end, whatever the one has seen: the next steps wait for silence.
    let (far_made, near_made) = (requests.0.finish(), requests.1.finish());
    let made = far_made.and_then(|far| Ok(far + near_made?));
    report.line(
        "no request fails",
        made.map(|count| format!("{count} requests, each on a connection of its own")),
    )?;
    let lived = |download: anyhow::Result<Download>| {
        download.and_then(|download| {
            ensure!(
                download.is_under_way(),
                "the connection ended before the changes did"
            );
            download
                .finish()
                .map(|bytes| format!("{} MiB, each byte checked", bytes >> 20))
        })
    };
    report.line(
        "a captured connection from before lives through all of it",
        lived(captured_one),
    )?;
    let plain_one = plain_one
        .context("the label was never off")
        .and_then(|download| download);
    report.line(
        "a plain connection from before the label lives through all of it",
        lived(plain_one),
    )?;
    let seen = eventually(SETTLE, "pods talk in plain", || {
        let captured = captured(world, || get(world, "client", far.ip()).map(drop))?;
        ensure!(
            captured.marker_frames > 0,
            "the marker is not on the wire: {captured:?}"
        );
        Ok(())
    });
    report.line(
        "at the end the pods talk in plain",
        seen.map(|()| String::new()),
    )?;
    let clean = eventually(SETTLE, "no rule of ours is left", || {
        for pod in ["client", "web-near", "web-far", "plain"] {
            let left = world.rules_left(pod)?;
            ensure!(left.is_empty(), "in {pod}: {left}");
        }
        Ok(())
    });
    report.line(
        "no rule of ours is left in any pod",
        clean.map(|()| String::new()),
    )
}

fn outage(world: &mut World, report: &mut Report) -> anyhow::Result<()> {
    report.heading("8. All of the control plane stopped");
    world.cluster.enroll("shop", true).write()?;
    let enrolled = world.wait_for_stage("shop", "mandatory", SETTLE);
    report.line("enrolled again", enrolled.map(|()| String::new()))?;
    if let Some(control) = &mut world.control_plane {
        control.ca.kill();
        control.controller.kill();
    }
    let seen = captured(world, || {
        for pod in ["web-far", "web-near"] {
            for address in world.pod(pod).net.addresses {
                get(world, "client", address)?;
            }
        }
        Ok(())
    });
    report.line(
        "new connections between known pods work, encrypted",
        seen.and_then(|captured| only_tls(&captured)),
    )
}
