// SPDX-License-Identifier: Apache-2.0
//! A cluster with Podveil, enrolled pods on both nodes, and short words for what is done to it.

use anyhow::{Context, ensure};
use nix::sys::signal::Signal;
use podveil_cluster::podveil::{Checkout, Podveil, checkout_of_test, pod};
use podveil_cluster::{Cluster, journey};
use podveil_interop_tests::tcp;
use podveil_netns::NetNs;
use podveil_sim::{Capture, eventually, pattern};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub const SETTLE: Duration = Duration::from_secs(90);
/// Of the test's own servers in pods.
pub const PORT: u16 = 9000;
pub const CA: &str = "podveil-ca";
pub const CONTROLLER: &str = "podveil-controller";
pub const NODE: &str = "podveil-node";
/// The module's own argument.
pub const PROXY: &str = "/etc/podveil/node-proxy.yaml";
pub const REDIRECT: &str = "/etc/podveil/node-redirect.yaml";

const BYTES: u64 = 10_000;
/// The beginning of everything that the test sends.
const MARKER_BYTES: usize = 32;
/// Of all pods.
const RANGES: [&str; 2] = ["10.244.", "fd00:10:244:"];

pub struct Bed {
    pub client: Side,
    pub far: Side,
    /// On the node of `far`.
    other: Side,
    listeners: Option<Listeners>,
    checkout: Checkout,
    pub cluster: Cluster,
}

/// A pod, as the test enters it.
pub struct Side {
    pub netns: Arc<NetNs>,
    addresses: Vec<IpAddr>,
}

struct Listeners {
    client: TcpListener,
    far: TcpListener,
}

/// Both ends of one connection.
pub struct Pair(TcpStream, TcpStream);

/// What a node's proxy counted of its configuration's streams since it started.
#[derive(Clone, Copy, Debug, Default)]
pub struct Xds {
    pub address_bytes: u64,
    pub terminations: u64,
}

impl Bed {
    pub fn new() -> anyhow::Result<Self> {
        let checkout = checkout_of_test()?;
        let cluster = Cluster::up(&checkout.podveilctl)?;
        let podveil = Podveil::install(&cluster, &checkout, &journey::VALUES)?;
        cluster.apply(&format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{ name: shop }}\n---\n\
             apiVersion: v1\nkind: Namespace\nmetadata: {{ name: other }}\n---\n{}{}{}",
            pod("shop", "client", "node-1"),
            pod("shop", "far", "node-2"),
            pod("shop", "other", "node-2"),
        ))?;
        cluster.wait_for_pods("shop")?;
        podveil.label("shop", true)?;
        podveil.wait_for_stage("shop", "mandatory", SETTLE)?;
        let side = |name| side(&cluster, "shop", name);
        let (client, far, other) = (side("client")?, side("far")?, side("other")?);
        let listeners = Some(Listeners::new(&client, &far)?);
        let bed = Self {
            client,
            far,
            other,
            listeners,
            checkout,
            cluster,
        };
        bed.connections_work()?;
        Ok(bed)
    }

    /// The step, with an eye on the links of both nodes: nothing of what the test sends between pods may be read there.
    pub fn watched(
        &mut self,
        step: impl FnOnce(&mut Self) -> anyhow::Result<String>,
    ) -> anyhow::Result<String> {
        let mut marker = [0; MARKER_BYTES];
        pattern::fill(0, &mut marker);
        let is_pod = |ip: IpAddr| {
            let text = ip.to_string();
            RANGES.iter().any(|range| text.starts_with(range))
        };
        let mut captures = Vec::new();
        for node in &self.cluster.nodes {
            let netns = NetNs::open(node.machine.netns())?;
            captures.push(Capture::start(&netns, &marker, move |from, to| {
                is_pod(from) && is_pod(to)
            })?);
        }
        let seen = step(self);
        for capture in captures {
            let captured = capture.finish()?;
            ensure!(
                captured.marker_frames == 0,
                "something went in plain: {captured:?}"
            );
            ensure!(
                captured.server_ports.contains(&15008),
                "the capture sees no tunnel: {captured:?}"
            );
        }
        seen
    }

    pub fn pod(&self, name: &str) -> anyhow::Result<Side> {
        self.pod_of("shop", name)
    }

    pub fn pod_of(&self, namespace: &str, name: &str) -> anyhow::Result<Side> {
        side(&self.cluster, namespace, name)
    }

    /// From node 1 to node 2.
    pub fn pair(&self) -> anyhow::Result<Pair> {
        let (here, there) = tcp::pair(
            &self.client.netns,
            &self.listeners()?.far,
            self.far.v4(PORT),
        )?;
        let pair = Pair(here, there);
        pair.lives()?;
        Ok(pair)
    }

    /// Both ends on node 2.
    pub fn local_pair_of_node_2(&self) -> anyhow::Result<Pair> {
        let (here, there) =
            tcp::pair(&self.other.netns, &self.listeners()?.far, self.far.v4(PORT))?;
        let pair = Pair(here, there);
        pair.lives()?;
        Ok(pair)
    }

    /// A new connection each way between the nodes, by both families, carries bytes; how many there were.
    pub fn connections_work(&self) -> anyhow::Result<u32> {
        let listeners = self.listeners()?;
        let mut made = 0;
        for (from, listener, to) in [
            (&self.client, &listeners.far, &self.far),
            (&self.far, &listeners.client, &self.client),
        ] {
            for address in &to.addresses {
                let to = SocketAddr::new(*address, PORT);
                let (here, there) = tcp::pair(&from.netns, listener, to)
                    .with_context(|| format!("a new connection to {to}"))?;
                Pair(here, there).lives()?;
                made += 1;
            }
        }
        Ok(made)
    }

    /// The same again and again, for so long. None may fail.
    pub fn connections_work_for(&self, duration: Duration) -> anyhow::Result<u32> {
        let end = Instant::now() + duration;
        let mut made = 0;
        while Instant::now() < end {
            made += self
                .connections_work()
                .with_context(|| format!("after {made} that worked"))?;
        }
        Ok(made)
    }

    /// Signals this program on both nodes; how many there were.
    pub fn signal_all(&self, program: &str, signal: Signal) -> anyhow::Result<usize> {
        self.cluster
            .nodes
            .iter()
            .map(|node| node.machine.signal(program, &[], signal))
            .sum()
    }

    pub fn kill_module(&self, node: usize, module: &str) -> anyhow::Result<Instant> {
        let machine = &self.cluster.nodes[node].machine;
        let killed = machine.signal(NODE, &[module], Signal::SIGKILL)?;
        ensure!(killed == 1, "{killed} processes of {module}");
        Ok(Instant::now())
    }

    /// Every program is ready, every node's programs have all their links, every pod of `shop` is mandatory.
    pub fn wait_until_whole(&self) -> anyhow::Result<()> {
        eventually(SETTLE, "every node has all its links", || {
            for node in 0..self.cluster.nodes.len() {
                for line in self.metrics(node)?.lines() {
                    ensure!(
                        !line.starts_with("podveil_control_plane_connected{")
                            || line.ends_with(" 1"),
                        "node {}: {line}",
                        node + 1
                    );
                }
            }
            Ok(())
        })?;
        self.wait_for_programs(SETTLE)?;
        let podveil = Podveil::installed(&self.cluster, &self.checkout);
        podveil.wait_for_stage("shop", "mandatory", SETTLE)
    }

    /// Every replica of CA and controller runs.
    pub fn wait_for_programs(&self, bound: Duration) -> anyhow::Result<()> {
        let timeout = format!("--timeout={}s", bound.as_secs());
        for program in ["deployment/podveil-ca", "deployment/podveil-controller"] {
            let namespace = "--namespace=podveil-system";
            let command = [namespace, "rollout", "status", program, &timeout];
            self.cluster.kubectl(&command)?;
        }
        Ok(())
    }

    /// Of node 1's proxy.
    pub fn xds(&self) -> anyhow::Result<Xds> {
        let mut xds = Xds::default();
        for line in self.metrics(0)?.lines() {
            let value = line
                .rsplit(' ')
                .next()
                .and_then(|text| text.parse::<u64>().ok());
            let Some(value) = value else { continue };
            if line.starts_with("istio_xds_message_bytes_total") && line.contains("Address") {
                xds.address_bytes += value;
            } else if line.starts_with("istio_xds_connection_terminations_total") {
                xds.terminations += value;
            }
        }
        Ok(xds)
    }

    /// What has come to it since `before`.
    pub fn xds_since(&self, before: &Xds) -> anyhow::Result<Xds> {
        let now = self.xds()?;
        Ok(Xds {
            address_bytes: now.address_bytes - before.address_bytes,
            terminations: now.terminations - before.terminations,
        })
    }

    fn metrics(&self, node: usize) -> anyhow::Result<String> {
        let url = "http://127.0.0.1:15020/metrics";
        let curl = ["curl", "-sS", "--fail", "--noproxy", "*", "--max-time", "5"];
        self.cluster.nodes[node]
            .machine
            .run(&[&curl[..], &[url]].concat())
    }

    /// Finds the pods anew: they may have other namespaces and addresses. Connections between them must work.
    pub fn look_again(&mut self) -> anyhow::Result<()> {
        self.listeners = None;
        self.client = self.pod("client")?;
        self.far = self.pod("far")?;
        self.other = self.pod("other")?;
        self.listeners = Some(Listeners::new(&self.client, &self.far)?);
        self.connections_work().map(drop)
    }

    pub fn diagnosis(&self) -> String {
        Podveil::installed(&self.cluster, &self.checkout).diagnosis()
    }

    fn listeners(&self) -> anyhow::Result<&Listeners> {
        self.listeners.as_ref().context("nobody listens")
    }
}

fn side(cluster: &Cluster, namespace: &str, name: &str) -> anyhow::Result<Side> {
    let object = cluster.get(&["--namespace", namespace, "pod", name])?;
    let addresses = object["status"]["podIPs"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|entry| entry["ip"].as_str())
        .map(|address| address.parse().context("a pod's address"))
        .collect::<anyhow::Result<Vec<IpAddr>>>()?;
    let first = *addresses.first().context("it has no address")?;
    let node = cluster
        .nodes
        .iter()
        .find(|node| object["spec"]["nodeName"] == node.name())
        .context("it is on no node")?;
    Ok(Side {
        netns: Arc::new(node.pod_netns(first)?),
        addresses,
    })
}

impl Side {
    pub fn v4(&self, port: u16) -> SocketAddr {
        let v4 = self.addresses.iter().find(|address| address.is_ipv4());
        SocketAddr::new(*v4.unwrap_or(&self.addresses[0]), port)
    }
}

impl Listeners {
    fn new(client: &Side, far: &Side) -> anyhow::Result<Self> {
        Ok(Self {
            client: tcp::listen(&client.netns, PORT)?,
            far: tcp::listen(&far.netns, PORT)?,
        })
    }
}

impl Pair {
    pub fn lives(&self) -> anyhow::Result<()> {
        for (from, to) in [(&self.0, &self.1), (&self.1, &self.0)] {
            tcp::send(from, BYTES)?;
            tcp::receive(to, BYTES)?;
        }
        Ok(())
    }

    pub fn is_reset(&self) -> anyhow::Result<()> {
        tcp::expect_reset(&self.0)?;
        tcp::expect_reset(&self.1)
    }
}
