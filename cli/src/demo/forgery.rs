// SPDX-License-Identifier: Apache-2.0
//! Two lies that must not work: a plain connection from an enrolled pod's address, and a tunnel with another pod's
//! identity.

use super::steps::access_log;
use super::traffic::is_refused;
use anyhow::{Context, bail};
use podveil_ca_client::{
    Credentials, Module, ProgramConfig, ProgramCredentials, Svid, TrustBundle,
    WorkloadCertificates, WorkloadLimits, transport,
};
use podveil_flow::DropReason;
use podveil_hbone::{ConnectRequest, Settings, StreamError, Tunnel};
use podveil_identity::{ProgramIdentity, TrustDomain, WorkloadIdentity};
use podveil_model::HBONE_PORT;
use podveil_netns::NetNs;
use podveil_sim::{APP_PORT, CONTROL_PLANE_ADDRESS, Report, World, eventually, in_netns, run};
use podveil_tls::Configs;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

const PATIENCE: Duration = Duration::from_secs(10);

pub fn step(world: &World, report: &mut Report) -> anyhow::Result<()> {
    report.heading("5. Forged sources");
    report.line(
        "a plaintext connection that claims an enrolled pod's address is refused",
        claim_address(world),
    )?;
    report.line(
        "a CONNECT with the certificate of another pod is refused",
        claim_identity(world),
    )
}

/// The plain pod takes over the client's address, and its node's routes too: more than a pod could ever do.
fn claim_address(world: &World) -> anyhow::Result<String> {
    let (liar, victim, target) = (
        world.pod("plain"),
        world.pod("client"),
        world.pod("web-far"),
    );
    let (node, address) = (&world.topology.nodes[1].namespace, victim.net.v4());
    run(
        "ip",
        [
            "-n",
            &liar.net.namespace,
            "addr",
            "add",
            &format!("{address}/32"),
            "dev",
            "eth0",
        ],
    )?;
    run(
        "ip",
        [
            "-n",
            node,
            "route",
            "add",
            &format!("{address}/32"),
            "dev",
            &liar.net.link,
        ],
    )?;
    let default = format!("default via 10.244.2.1 dev eth0 src {address}");
    let honest = "default via 10.244.2.1 dev eth0";
    run(
        "ip",
        ["-n", &liar.net.namespace]
            .into_iter()
            .chain(["route", "replace"])
            .chain(default.split(' ')),
    )?;
    let refused = is_refused(&liar.net.netns, target.net.v4(), APP_PORT);
    run(
        "ip",
        ["-n", &liar.net.namespace]
            .into_iter()
            .chain(["route", "replace"])
            .chain(honest.split(' ')),
    )?;
    run(
        "ip",
        [
            "-n",
            node,
            "route",
            "del",
            &format!("{address}/32"),
            "dev",
            &liar.net.link,
        ],
    )?;
    run(
        "ip",
        [
            "-n",
            &liar.net.namespace,
            "addr",
            "del",
            &format!("{address}/32"),
            "dev",
            "eth0",
        ],
    )?;
    refused
}

/// Node n2 may have the certificate of `web`; from the plain pod's address it must be worth nothing.
fn claim_identity(world: &World) -> anyhow::Result<String> {
    let stolen: WorkloadIdentity = "spiffe://cluster.local/ns/shop/sa/web".parse()?;
    let victim: WorkloadIdentity = "spiffe://cluster.local/ns/shop/sa/client".parse()?;
    let folder = world.sandbox.folder().to_owned();
    let (svid, bundle) = block_in(&world.topology.nodes[1].netns, steal(folder, stolen))?;
    let target = world.pod("client").net.v4();
    let answer = block_in(
        &world.pod("plain").net.netns,
        connect(Configs::new(svid, bundle), victim, target),
    )?;
    // Refused by whatever means; what counts is that the proxy names the reason.
    eventually(
        PATIENCE,
        "the destination's access log names the reason",
        || {
            let reason = DropReason::PeerAddressMismatch.label();
            let line = access_log(world, "n1", |line| line["reason"] == reason)?;
            Ok(format!(
                "{answer}; logged: {}",
                line["error"].as_str().unwrap_or(reason)
            ))
        },
    )
}

/// Runs a future on a thread inside the namespace, so that its sockets belong there.
fn block_in<T: Send + 'static>(
    netns: &NetNs,
    work: impl Future<Output = anyhow::Result<T>> + Send + 'static,
) -> anyhow::Result<T> {
    let netns = netns.try_clone()?;
    let thread = std::thread::spawn(move || {
        in_netns(&netns, || {
            crate::runtime()?.block_on(async {
                tokio::time::timeout(PATIENCE, work)
                    .await
                    .context("it took too long")?
            })
        })
    });
    match thread.join() {
        Ok(result) => result,
        Err(_) => bail!("the forger panicked"),
    }
}

async fn steal(
    folder: std::path::PathBuf,
    identity: WorkloadIdentity,
) -> anyhow::Result<(Arc<Svid>, Arc<TrustBundle>)> {
    let stop = CancellationToken::new();
    let _ends = stop.clone().drop_guard();
    let ca_address = format!("{CONTROL_PLANE_ADDRESS}:15012");
    let credentials = ProgramCredentials::start(
        ProgramConfig {
            trust_domain: TrustDomain::new("cluster.local")?,
            identity: ProgramIdentity::Node("n2".parse()?),
            ca_address: ca_address.clone(),
            token_path: folder.join("tokens/node.n2"),
            bootstrap_bundle: folder.join("ca/bundle.pem"),
            state_dir: folder.join("forger"),
            module: Module::Proxy,
        },
        stop.clone(),
    );
    let current: Arc<Credentials> = credentials.ready().await;
    let channel = transport::channel(&ca_address, &credentials, ProgramIdentity::Ca);
    let certificates =
        WorkloadCertificates::new(channel, credentials, WorkloadLimits::default(), stop);
    let _held = certificates.hold(&identity);
    let svid = certificates.svid(&identity).await?;
    Ok((svid, current.bundle.clone()))
}

/// How the CONNECT was refused.
async fn connect(
    configs: Configs,
    victim: WorkloadIdentity,
    target: IpAddr,
) -> anyhow::Result<String> {
    let stream = TcpStream::connect((target, HBONE_PORT))
        .await
        .context("connecting to 15008")?;
    let (stream, _peer) = podveil_tls::connect(stream, configs.client(&[victim])).await?;
    let (tunnel, driver) = match Tunnel::open(stream, &Settings::default()).await {
        Ok(opened) => opened,
        Err(error) => return Ok(error.to_string()),
    };
    let driving = tokio::spawn(driver);
    let slot = match tunnel.reserve().await {
        Ok(slot) => slot,
        Err(error) => return Ok(error.to_string()),
    };
    let request = ConnectRequest {
        authority: SocketAddr::new(target, APP_PORT),
        baggage: None,
        forwarded: None,
        traceparent: None,
    };
    let answer = tunnel.connect(slot, request).await;
    driving.abort();
    match answer {
        Err(StreamError::Refused { status }) => Ok(format!("answered {status}")),
        Err(error) => Ok(error.to_string()),
        Ok(_) => bail!("the CONNECT was accepted"),
    }
}
