// SPDX-License-Identifier: Apache-2.0
use anyhow::Context;
use podveil_netns::NetNs;
use podveil_sim::{Binaries, NodePrograms, NodeSettings, Service, ServicePort, World};
use std::net::{IpAddr, SocketAddr};
use std::ops::{Deref, DerefMut};
use std::path::PathBuf;
use std::time::Duration;

/// Longer than any state of a healthy cluster takes, on a busy machine too.
pub const SETTLE: Duration = Duration::from_secs(20);

/// A running cluster: what [`World`] offers, and short words for tests.
#[derive(Debug)]
pub struct Mesh(World);

/// Two enrolled pods on node 1, two on node 2, and one that is not enrolled: enough for most tests.
///
/// # Errors
/// If the cluster does not come up: a test that could not set up fails.
pub fn shop() -> anyhow::Result<Mesh> {
    Mesh::start(
        NodeSettings::default(),
        &[
            (1, "shop", "client", "client"),
            (1, "shop", "near", "web"),
            (2, "shop", "far", "web"),
            (2, "shop", "other", "client"),
            (2, "legacy", "plain", "plain"),
        ],
    )
}

impl Mesh {
    /// Starts a cluster with these pods (node, namespace, name, service account). The namespace `legacy` is not enrolled,
    /// every other one is; returns when all are mandatory.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn start(
        settings: NodeSettings,
        pods: &[(usize, &str, &str, &str)],
    ) -> anyhow::Result<Self> {
        Self::start_each([settings.clone(), settings], pods)
    }

    /// The same with other settings for each node.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn start_each(
        settings: [NodeSettings; 2],
        pods: &[(usize, &str, &str, &str)],
    ) -> anyhow::Result<Self> {
        let mut world = World::new(Binaries::in_folder(binaries()?)?, settings[0].clone())?;
        let mut namespaces: Vec<&str> = Vec::new();
        for (node, namespace, name, account) in pods {
            if !namespaces.contains(namespace) {
                namespaces.push(namespace);
                world
                    .cluster
                    .add_namespace(namespace, *namespace != "legacy");
            }
            world.add_pod(*node, namespace, name, account)?;
        }
        world.cluster.write()?;
        world.start_control_plane()?;
        for (node, settings) in world.topology.nodes.iter().zip(&settings) {
            let programs = NodePrograms::start(&world.sandbox, &world.binaries, node, settings)?;
            world.nodes.push(programs);
        }
        for namespace in namespaces.into_iter().filter(|name| *name != "legacy") {
            world.wait_for_stage(namespace, "mandatory", SETTLE)?;
        }
        Ok(Self(world))
    }

    pub fn netns(&self, pod: &str) -> &NetNs {
        &self.0.pod(pod).net.netns
    }

    pub fn v4(&self, pod: &str) -> IpAddr {
        self.0.pod(pod).net.v4()
    }

    pub fn v6(&self, pod: &str) -> IpAddr {
        self.0.pod(pod).net.v6()
    }

    pub fn address(&self, pod: &str, port: u16) -> SocketAddr {
        SocketAddr::new(self.v4(pod), port)
    }

    /// Every way from one pod to another: the same node and across, IPv4 and IPv6.
    pub fn ways(&self, port: u16) -> Vec<SocketAddr> {
        ["near", "far"]
            .into_iter()
            .flat_map(|pod| self.0.pod(pod).net.addresses)
            .map(|address| SocketAddr::new(address, port))
            .collect()
    }
}

impl Mesh {
    /// Adds the service `web` of the pods `near` and `far`: port 80 of these addresses is `target_port` of theirs.
    ///
    /// # Errors
    /// If the cluster file cannot be written.
    pub fn add_web(&mut self, addresses: &[IpAddr], target_port: u16) -> anyhow::Result<()> {
        self.cluster.services.push(Service {
            name: "web".into(),
            namespace: "shop".into(),
            addresses: addresses.to_vec(),
            ports: vec![ServicePort {
                port: 80,
                target_port,
            }],
            endpoints: vec!["near".into(), "far".into()],
        });
        self.cluster.write()
    }
}

impl Deref for Mesh {
    type Target = World;

    fn deref(&self) -> &World {
        &self.0
    }
}

impl DerefMut for Mesh {
    fn deref_mut(&mut self) -> &mut World {
        &mut self.0
    }
}

/// The folder of the programs that cargo built with this test: `target/<profile>`, above `deps`.
fn binaries() -> anyhow::Result<PathBuf> {
    let test = std::env::current_exe()?;
    let folder = test
        .parent()
        .and_then(|deps| deps.parent())
        .context("this test lies in no target folder")?;
    Ok(folder.to_owned())
}
