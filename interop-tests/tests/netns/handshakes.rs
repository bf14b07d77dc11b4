// SPDX-License-Identifier: Apache-2.0
use anyhow::ensure;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use podveil_interop_tests::{Mesh, shop, tcp};
use podveil_sim::{NodeSettings, run};
use serde_json::json;
use std::time::{Duration, Instant};

const PORT: u16 = 9000;

/// Short bounds, so that each stage shows its own.
fn impatient() -> NodeSettings {
    let mut settings = NodeSettings::default();
    for key in [
        "hold_bound",
        "connect_timeout",
        "tls_timeout",
        "http2_timeout",
        "connect_response_timeout",
    ] {
        settings.proxy.insert(key.into(), json!("1s"));
    }
    settings
}

fn mesh() -> anyhow::Result<Mesh> {
    Mesh::start(
        impatient(),
        &[
            (1, "shop", "client", "client"),
            (2, "shop", "far", "web"),
            (2, "legacy", "plain", "plain"),
        ],
    )
}

/// The bounds above, twice (a retry), and a busy machine.
const BOUND: Duration = Duration::from_secs(10);

fn expect_reset_in_time(mesh: &Mesh) -> anyhow::Result<()> {
    let began = Instant::now();
    tcp::expect_connection_reset(mesh.netns("client"), mesh.address("far", PORT))?;
    ensure!(
        began.elapsed() < BOUND,
        "the reset came after {:?}",
        began.elapsed()
    );
    Ok(())
}

/// Node 2's proxy does nothing meanwhile; afterwards it does again, whatever came of the work.
fn while_stopped(mesh: &Mesh, work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let proxy = Pid::from_raw(mesh.nodes[1].proxy.pid().try_into()?);
    kill(proxy, Signal::SIGSTOP)?;
    let worked = work();
    kill(proxy, Signal::SIGCONT)?;
    worked
}

#[test]
#[ignore = "netns"]
fn a_peer_that_does_not_answer_tcp_is_given_up_by_reset() -> anyhow::Result<()> {
    let mesh = mesh()?;
    let netns = format!("--net=/run/netns/{}", mesh.topology.nodes[1].namespace);
    run("nsenter", [&netns, "nft", "add table inet silence"])?;
    run(
        "nsenter",
        [
            &netns,
            "nft",
            "add chain inet silence forward { type filter hook forward priority 0 ; }",
        ],
    )?;
    run(
        "nsenter",
        [
            &netns,
            "nft",
            "add rule inet silence forward tcp dport 15008 drop",
        ],
    )?;
    expect_reset_in_time(&mesh)
}

#[test]
#[ignore = "netns"]
fn a_peer_that_does_not_answer_tls_is_given_up_by_reset() -> anyhow::Result<()> {
    let mesh = mesh()?;
    while_stopped(&mesh, || expect_reset_in_time(&mesh))
}

#[test]
#[ignore = "netns"]
fn a_service_with_a_silent_endpoint_fails_no_connection() -> anyhow::Result<()> {
    let mut mesh = shop()?;
    let address = "10.96.0.80".parse()?;
    mesh.add_web(&[address], PORT)?;
    let near = tcp::listen(mesh.netns("near"), PORT)?;
    while_stopped(&mesh, || {
        // So many that both endpoints have been the first choice, but for one time in a million.
        let clients: Vec<_> = (0..20)
            .map(|_| tcp::connect(mesh.netns("client"), (address, 80).into()))
            .collect::<Result<_, _>>()?;
        for _ in &clients {
            tcp::send(&tcp::accept(&near)?, 1)?;
        }
        clients
            .iter()
            .try_for_each(|client| tcp::receive(client, 1))
    })
}

#[test]
#[ignore = "netns"]
fn a_silent_client_of_15008_is_cut_off() -> anyhow::Result<()> {
    let mesh = mesh()?;
    let silent = tcp::connect(mesh.netns("plain"), mesh.address("far", 15008))?;
    let began = Instant::now();
    let mut byte = [0];
    let read = std::io::Read::read(&mut &silent, &mut byte);
    ensure!(!matches!(read, Ok(count) if count > 0), "it was answered");
    ensure!(
        began.elapsed() < BOUND,
        "it was cut off after {:?} only ({read:?})",
        began.elapsed()
    );
    Ok(())
}
