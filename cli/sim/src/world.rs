// SPDX-License-Identifier: Apache-2.0
use crate::{
    Binaries, ClusterFile, ControlPlane, NodePrograms, NodeSettings, PodNet, Process, Sandbox,
    Topology, run,
};
use anyhow::{Context, bail};
use std::time::{Duration, Instant};

/// How often a state that is waited for is looked at.
const LOOK: Duration = Duration::from_millis(10);

/// Waits until `look` succeeds.
///
/// # Errors
/// The last error of `look`, if it still fails after `bound`.
pub fn eventually<T>(
    bound: Duration,
    what: &str,
    mut look: impl FnMut() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + bound;
    loop {
        match look() {
            Ok(found) => return Ok(found),
            Err(error) if Instant::now() > deadline => {
                return Err(error).with_context(|| format!("waited {bound:?} until {what}"));
            }
            Err(_) => std::thread::sleep(LOOK),
        }
    }
}

/// A pod of the world, with its application.
#[derive(Debug)]
pub struct Pod {
    pub name: String,
    pub kubernetes_namespace: String,
    pub net: PodNet,
    /// Serves [`crate::app`] on port 8080; `None` where a test brings its own.
    pub app: Option<Process>,
}

/// A whole simulated cluster with the real programs.
///
/// Field order is drop order: programs end before their namespaces are removed.
#[derive(Debug)]
pub struct World {
    pub nodes: Vec<NodePrograms>,
    pub control_plane: Option<ControlPlane>,
    pub pods: Vec<Pod>,
    pub cluster: ClusterFile,
    pub topology: Topology,
    pub binaries: Binaries,
    pub settings: NodeSettings,
    pub sandbox: Sandbox,
}

/// The port of the application in each pod.
pub const APP_PORT: u16 = 8080;

impl World {
    /// Nodes and wire, an empty cluster, nothing started.
    ///
    /// # Errors
    /// If a tool, a privilege or a binary is missing.
    pub fn new(binaries: Binaries, settings: NodeSettings) -> anyhow::Result<Self> {
        let missing = crate::missing_tools();
        if !missing.is_empty() {
            bail!("{}", missing.join("; "));
        }
        let sandbox = Sandbox::new(Some(&binaries.path("podveilctl")))?;
        let topology = Topology::new(&sandbox)?;
        let cluster = ClusterFile::new(sandbox.folder().join("cluster.yaml"));
        Ok(Self {
            nodes: Vec::new(),
            control_plane: None,
            pods: Vec::new(),
            cluster,
            topology,
            binaries,
            settings,
            sandbox,
        })
    }

    /// Adds a pod with the application to node 1 or 2. Its namespace must be in the cluster file or be added too.
    ///
    /// # Errors
    /// If its namespace or application cannot be made.
    pub fn add_pod(
        &mut self,
        node: usize,
        namespace: &str,
        name: &str,
        account: &str,
    ) -> anyhow::Result<()> {
        let number = u8::try_from(10 + self.pods.len())?;
        let node = self
            .topology
            .nodes
            .get(node - 1)
            .context("nodes are 1 and 2")?;
        let net = node.add_pod(&self.sandbox, &format!("{namespace}-{name}"), number)?;
        let binary = self
            .binaries
            .path("podveilctl")
            .to_string_lossy()
            .into_owned();
        let app = Process::start(
            &self.sandbox,
            &net.namespace,
            &format!("app-{name}"),
            &[&binary, "serve", &APP_PORT.to_string()],
        )?;
        self.cluster
            .add_workload(node, &net, namespace, name, account);
        self.pods.push(Pod {
            name: name.into(),
            kubernetes_namespace: namespace.into(),
            net,
            app: Some(app),
        });
        Ok(())
    }

    /// Writes the cluster file and starts CA, controller and both nodes.
    ///
    /// # Errors
    /// If one does not come up.
    pub fn start(&mut self) -> anyhow::Result<()> {
        self.cluster.write()?;
        self.start_control_plane()?;
        for node in &self.topology.nodes {
            self.nodes.push(NodePrograms::start(
                &self.sandbox,
                &self.binaries,
                node,
                &self.settings,
            )?);
        }
        Ok(())
    }

    /// Starts CA and controller, also again after they were stopped.
    ///
    /// # Errors
    /// If one does not come up.
    pub fn start_control_plane(&mut self) -> anyhow::Result<()> {
        self.control_plane = Some(ControlPlane::start(
            &self.sandbox,
            &self.binaries,
            &self.topology,
            &self.cluster,
        )?);
        Ok(())
    }

    /// # Panics
    /// If there is no pod of this name: a mistake in the caller.
    pub fn pod(&self, name: &str) -> &Pod {
        self.pods
            .iter()
            .find(|pod| pod.name == name)
            .expect("a pod of the world by its name")
    }

    /// The controller's own view.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn status(&self) -> anyhow::Result<serde_json::Value> {
        page(&self.topology.control_plane.0, 15300, "/status")
    }

    /// A page of the `proxy` module of a node (1 or 2): `/status`, or `/config_dump`, which has all that it holds.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn proxy_page(&self, node: usize, path: &str) -> anyhow::Result<serde_json::Value> {
        let node = self.topology.nodes.get(node - 1);
        page(&node.context("nodes are 1 and 2")?.namespace, 15000, path)
    }

    /// What the `redirect` module of a node (1 or 2) says.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn redirect_status(&self, node: usize) -> anyhow::Result<serde_json::Value> {
        let node = self.topology.nodes.get(node - 1);
        page(
            &node.context("nodes are 1 and 2")?.namespace,
            15400,
            "/status",
        )
    }

    /// What the node of a pod says about its capture.
    ///
    /// # Errors
    /// If no node knows it.
    pub fn captured(&self, pod: &str) -> anyhow::Result<serde_json::Value> {
        let uid = &self.pod(pod).net.namespace;
        for node in 1..=self.topology.nodes.len() {
            let status = self.redirect_status(node)?;
            let pods = status["pods"].as_array();
            if let Some(found) = pods.and_then(|pods| pods.iter().find(|one| one["uid"] == **uid)) {
                return Ok(found.clone());
            }
        }
        bail!("no node knows {pod}")
    }

    /// The enrolment stage of a pod, as the controller tells it.
    ///
    /// # Errors
    /// If the controller does not answer or does not know it.
    pub fn stage(&self, pod: &str) -> anyhow::Result<String> {
        let status = self.status()?;
        let uid = &self.pod(pod).net.namespace;
        let found = status["workloads"]
            .as_array()
            .and_then(|all| all.iter().find(|one| one["uid"] == **uid));
        let stage = found.and_then(|workload| workload["stage"].as_str());
        stage
            .map(str::to_owned)
            .with_context(|| format!("the controller's status has no stage of {pod}: {status}"))
    }

    /// Waits until all pods of a namespace are at this stage.
    ///
    /// # Errors
    /// If they are not within `bound`; the programs' own failures come first.
    pub fn wait_for_stage(
        &mut self,
        namespace: &str,
        stage: &str,
        bound: Duration,
    ) -> anyhow::Result<()> {
        let names: Vec<String> = self
            .pods
            .iter()
            .filter(|pod| pod.kubernetes_namespace == namespace)
            .map(|pod| pod.name.clone())
            .collect();
        let deadline = Instant::now() + bound;
        loop {
            let mut at: Vec<String> = Vec::new();
            for name in &names {
                match self.stage(name) {
                    Ok(found) if found == stage => {}
                    Ok(found) => at.push(format!("{name} is {found}")),
                    Err(error) => at.push(format!("{name}: {error:#}")),
                }
            }
            if at.is_empty() {
                return Ok(());
            }
            self.check_running()?;
            if Instant::now() > deadline {
                bail!(
                    "waited {bound:?} until {namespace} is {stage}: {}\n{}",
                    at.join(", "),
                    self.status()?
                );
            }
            std::thread::sleep(LOOK);
        }
    }

    /// # Errors
    /// If a program has ended by itself, with the end of its log.
    pub fn check_running(&mut self) -> anyhow::Result<()> {
        for process in self.processes() {
            process.check_running()?;
        }
        Ok(())
    }

    fn processes(&mut self) -> impl Iterator<Item = &mut Process> {
        let control = self
            .control_plane
            .iter_mut()
            .flat_map(|control| [&mut control.ca, &mut control.controller]);
        control.chain(
            self.nodes
                .iter_mut()
                .flat_map(|node| [&mut node.redirect, &mut node.proxy]),
        )
    }

    /// What of ours is in a pod's namespace: nftables tables and routing rules.
    ///
    /// # Errors
    /// If the namespace cannot be looked into.
    pub fn rules_left(&self, pod: &str) -> anyhow::Result<String> {
        let namespace = &self.pod(pod).net.namespace;
        let netns = format!("--net=/run/netns/{namespace}");
        let mut left = run("nsenter", [&netns, "nft", "list", "ruleset"])?;
        for family in ["-4", "-6"] {
            let rules = run("ip", ["-n", namespace, family, "rule", "list"])?;
            left.extend(
                rules
                    .lines()
                    .filter(|rule| rule.contains("fwmark"))
                    .flat_map(|rule| ["\n", family, " ", rule]),
            );
        }
        Ok(left.trim().to_owned())
    }
}

/// A page at this port of a namespace's own address.
fn page(namespace: &str, port: u16, path: &str) -> anyhow::Result<serde_json::Value> {
    let netns = format!("--net=/run/netns/{namespace}");
    let url = format!("http://127.0.0.1:{port}{path}");
    let text = run(
        "nsenter",
        [
            &netns,
            "curl",
            "--silent",
            "--fail",
            "--max-time",
            "5",
            &url,
        ],
    )?;
    serde_json::from_str(&text).with_context(|| format!("{path} is not JSON"))
}
