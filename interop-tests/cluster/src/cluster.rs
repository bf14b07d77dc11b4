// SPDX-License-Identifier: Apache-2.0
use crate::folder::Folder;
use crate::keys::Keys;
use crate::machine::Machine;
use crate::node::{Node, POD_RANGES};
use crate::server::{self, ADMIN_TOKEN, CONTROLLERS_TOKEN, Ports, text};
use crate::tools::{self, Tool};
use crate::{Program, image, kubeconfig};
use anyhow::{Context, ensure};
use podveil_sim::{eventually, run};
use serde_json::Value;
use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::PoisonError;
use std::time::Duration;

/// Far longer than it takes, for a machine that builds beside it.
const START: Duration = Duration::from_secs(120);
const PORTS: Ports = Ports {
    etcd: 2379,
    peer: 2380,
    server: 6443,
};
/// Programs of the system that a cluster needs, with the Debian package that brings each.
const PROGRAMS: [(&str, &str); 5] = [
    ("runc", "runc"),
    ("nft", "nftables"),
    ("conntrack", "conntrack"),
    ("mmdebstrap", "mmdebstrap"),
    ("unshare", "util-linux"),
];

/// Two nodes and a control plane, dual stack, with kube-proxy and CoreDNS. Nothing is left of it when it is dropped, nor
/// when its process is killed.
///
/// Field order is drop order: the machines end before the janitor looks for what they leave.
#[derive(Debug)]
pub struct Cluster {
    pub scheduler: Option<Program>,
    pub controllers: Option<Program>,
    pub server: Option<Program>,
    pub etcd: Option<Program>,
    pub nodes: [Node; 2],
    pub control: Machine,
    keys: Keys,
    address: Ipv4Addr,
    _janitor: Janitor,
    folder: Folder,
}

impl Cluster {
    /// `podveilctl`: the program that serves as the application of test pods ([`crate::APP_IMAGE`]). Returns when both
    /// nodes are ready and names are answered.
    ///
    /// # Errors
    /// If a program is missing, or something does not become ready in time.
    pub fn up(podveilctl: &Path) -> anyhow::Result<Self> {
        let missing = missing_programs();
        ensure!(
            missing.is_empty(),
            "a cluster cannot run here: {}",
            missing.join("; ")
        );
        tools::ensure()?;
        let folder = Folder::new("cluster")?;
        let janitor = Janitor::start(&folder)?;
        let images = image::make(folder.path(), podveilctl)?;
        let machine = |name| Machine::start(folder.path(), name);
        let control = machine("control")?;
        let nodes = [
            Node::new(machine("node-1")?, folder.path(), folder.number, 1),
            Node::new(machine("node-2")?, folder.path(), folder.number, 2),
        ];
        connect(&folder, &control, &nodes)?;
        let address = Ipv4Addr::new(172, 29, folder.number, 1);
        let keys = keys(&folder, address)?;
        let mut cluster = Self {
            scheduler: None,
            controllers: None,
            server: None,
            etcd: None,
            nodes,
            control,
            keys,
            address,
            _janitor: janitor,
            folder,
        };
        cluster.start_server()?;
        // The runtimes take the images in while the API server starts.
        std::thread::scope(|scope| {
            let runtimes = cluster
                .nodes
                .each_mut()
                .map(|node| scope.spawn(|| node.start_runtime(&images)));
            for runtime in runtimes {
                runtime
                    .join()
                    .map_err(|_| anyhow::anyhow!("a thread panicked"))??;
            }
            anyhow::Ok(())
        })?;
        cluster.wait_for_server()?;
        cluster.start_control_plane()?;
        for number in 0..cluster.nodes.len() {
            let object = cluster.nodes[number].object();
            cluster.apply(&object.to_string())?;
            cluster.nodes[number].start_kubernetes()?;
        }
        cluster.apply(include_str!("../manifests/base.yaml"))?;
        cluster.wait_for_nodes()?;
        cluster.kubectl(&[
            "--namespace=kube-system",
            "rollout",
            "status",
            "deployment/coredns",
            "--timeout=120s",
        ])?;
        Ok(cluster)
    }

    /// A kubeconfig for a member of `system:masters`; the server is reached from this host as it is.
    pub fn kubeconfig(&self) -> PathBuf {
        self.keys.file("admin.kubeconfig")
    }

    /// A kubeconfig for whoever holds this token.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn kubeconfig_for(&self, name: &str, token: &str) -> anyhow::Result<PathBuf> {
        let path = self.keys.file(&format!("{name}.kubeconfig"));
        kubeconfig::write(&path, &self.url(), &self.keys.file("ca.crt"), token)?;
        Ok(path)
    }

    pub fn url(&self) -> String {
        format!("https://{}:{}", self.address, PORTS.server)
    }

    /// Certificates, kubeconfigs, images and logs, for as long as this lives.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Tells clusters of one machine apart: part of this one's addresses, 172.29.`number`.0/24.
    pub fn number(&self) -> u8 {
        self.folder.number
    }

    /// The name of the cgroup folder that Podveil's programs share on each node, as the chart takes it: no other cluster's.
    pub fn cgroup(&self) -> String {
        format!("bed{}-podveil-$(NODE_NAME)", self.folder.number)
    }

    /// # Errors
    /// With what kubectl wrote to standard error, if it fails.
    pub fn kubectl(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let command = self.kubectl_command()?;
        let own = command[1..].iter().map(String::as_str);
        run(&command[0], own.chain(arguments.iter().copied()))
    }

    /// How to call kubectl for this cluster: the words to begin with.
    ///
    /// # Errors
    /// If it is not built and cannot be.
    pub fn kubectl_command(&self) -> anyhow::Result<Vec<String>> {
        Ok(vec![
            text(&tools::path(Tool::Kubectl)?),
            format!("--kubeconfig={}", self.kubeconfig().display()),
        ])
    }

    /// Calls `work` with an address of loopback that leads to the pod's port, as `kubectl port-forward` does.
    ///
    /// # Errors
    /// If it does not stand in time, or `work` fails.
    pub fn port_forward<T>(
        &self,
        namespace: &str,
        pod: &str,
        port: u16,
        work: impl FnOnce(&str) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let mut command = self.kubectl_command()?;
        command.extend([
            format!("--namespace={namespace}"),
            "port-forward".to_owned(),
            format!("pod/{pod}"),
            format!(":{port}"),
        ]);
        let log = self.folder.path().join("port-forward.log");
        fs::write(&log, "")?;
        let mut forward = Program::start(self.folder.path(), "port-forward", &command)?;
        let address = eventually(START, "a port is forwarded", || {
            forward.check_running()?;
            let said = fs::read_to_string(&log)?;
            let address = said
                .split_whitespace()
                .find(|word| word.starts_with("127.0.0.1:"))
                .with_context(|| format!("it said {said:?}"))?;
            Ok(address.to_owned())
        })?;
        work(&address)
    }

    /// # Errors
    /// With what helm wrote to standard error, if it fails.
    pub fn helm(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let kubeconfig = format!("--kubeconfig={}", self.kubeconfig().display());
        run(
            &text(&tools::path(Tool::Helm)?),
            [&[kubeconfig.as_str()], arguments].concat(),
        )
    }

    /// Applies objects, in YAML or JSON.
    ///
    /// # Errors
    /// If the API server does not take them.
    pub fn apply(&self, objects: &str) -> anyhow::Result<()> {
        let file = self.folder.path().join("apply.yaml");
        fs::write(&file, objects)?;
        self.kubectl(&["apply", "--filename", &text(&file)])
            .map(drop)
    }

    /// An object, or a list of them, as JSON.
    ///
    /// # Errors
    /// If there is none.
    pub fn get(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let answer = self.kubectl(&[&["get", "--output=json"], arguments].concat())?;
        serde_json::from_str(&answer).context("reading an object")
    }

    /// # Errors
    /// If a pod of the namespace is not ready in time.
    pub fn wait_for_pods(&self, namespace: &str) -> anyhow::Result<()> {
        let namespace = format!("--namespace={namespace}");
        self.kubectl(&[
            "wait",
            "--for=condition=Ready",
            "pod",
            "--all",
            "--timeout=60s",
            &namespace,
        ])
        .map(drop)
    }

    /// Runs a command in a pod, by the API server and the kubelet.
    ///
    /// # Errors
    /// If it fails.
    pub fn exec(&self, namespace: &str, pod: &str, command: &[&str]) -> anyhow::Result<String> {
        let namespace = format!("--namespace={namespace}");
        self.kubectl(&[&[&namespace, "exec", pod, "--"], command].concat())
    }

    /// Takes an image into both nodes.
    ///
    /// # Errors
    /// If it is no image.
    pub fn import_image(&self, archive: &Path) -> anyhow::Result<()> {
        self.nodes
            .iter()
            .try_for_each(|node| node.import_image(archive))
    }

    /// Starts etcd and the API server where they do not run, also again after a test has killed them.
    ///
    /// # Errors
    /// If they cannot be started.
    pub fn start_server(&mut self) -> anyhow::Result<()> {
        let folder = self.folder.path();
        if self.etcd.is_none() {
            let command = server::etcd(folder, PORTS)?;
            self.etcd = Some(self.control.start_program("etcd", &[], &command)?);
        }
        if self.server.is_none() {
            let mut command = server::kube_apiserver(&self.keys, PORTS, self.address)?;
            let file = |name: &str| text(&self.keys.file(name));
            command.extend([
                "--enable-admission-plugins=NodeRestriction".to_owned(),
                "--kubelet-preferred-address-types=InternalIP".to_owned(),
                format!(
                    "--kubelet-client-certificate={}",
                    file("kubelet-client.crt")
                ),
                format!("--kubelet-client-key={}", file("kubelet-client.key")),
            ]);
            self.server = Some(
                self.control
                    .start_program("kube-apiserver", &[], &command)?,
            );
        }
        Ok(())
    }

    /// # Errors
    /// If it is not ready in time.
    pub fn wait_for_server(&mut self) -> anyhow::Result<()> {
        let url = format!("{}/readyz", self.url());
        eventually(START, "the API server is ready", || {
            for program in [&mut self.etcd, &mut self.server].into_iter().flatten() {
                program.check_running()?;
            }
            let answer = server::get(&self.keys.file("ca.crt"), &url)?;
            ensure!(answer == "ok", "it answered {answer:?}");
            Ok(())
        })
    }

    pub(crate) fn start_control_plane(&mut self) -> anyhow::Result<()> {
        let mut command =
            server::kube_controller_manager(&self.keys, &self.keys.file("controllers.kubeconfig"))?;
        command.extend([
            format!("--cluster-cidr={POD_RANGES}"),
            "--allocate-node-cidrs=false".to_owned(),
            format!(
                "--service-account-private-key-file={}",
                text(&self.keys.file("sa.key"))
            ),
            "--node-monitor-grace-period=20s".to_owned(),
        ]);
        self.controllers = Some(self.control.start_program("controllers", &[], &command)?);
        let command = vec![
            text(&tools::path(Tool::KubeScheduler)?),
            format!(
                "--kubeconfig={}",
                text(&self.keys.file("scheduler.kubeconfig"))
            ),
            "--leader-elect=false".to_owned(),
            "--secure-port=0".to_owned(),
        ];
        self.scheduler = Some(self.control.start_program("scheduler", &[], &command)?);
        Ok(())
    }

    /// # Errors
    /// If a node is not ready in time, with what its kubelet says.
    pub fn wait_for_nodes(&mut self) -> anyhow::Result<()> {
        eventually(START, "both nodes are ready", || {
            for node in &mut self.nodes {
                let containerd = node.containerd.get_mut();
                for program in [
                    &mut node.kubelet,
                    &mut node.kube_proxy,
                    containerd.unwrap_or_else(PoisonError::into_inner),
                ]
                .into_iter()
                .flatten()
                {
                    program.check_running()?;
                }
            }
            let ready = self.kubectl(&[
                "get",
                "nodes",
                "--output=jsonpath={range .items[*]}{.status.conditions[?(@.type==\"Ready\")].status} {end}",
            ])?;
            ensure!(ready.trim() == "True True", "ready: {ready:?}");
            Ok(())
        })
    }
}

fn connect(folder: &Folder, control: &Machine, nodes: &[Node; 2]) -> anyhow::Result<()> {
    let script = folder.path().join("network.sh");
    fs::write(&script, include_str!("../scripts/network.sh"))?;
    run(
        "sh",
        [
            text(&script),
            control.init.to_string(),
            nodes[0].machine.init.to_string(),
            nodes[1].machine.init.to_string(),
            folder.number.to_string(),
            format!("bed{}", folder.number),
        ],
    )
    .map(drop)
    .context("connecting the machines")
}

/// Certificates, tokens and kubeconfigs of all programs.
fn keys(folder: &Folder, address: Ipv4Addr) -> anyhow::Result<Keys> {
    let keys = Keys::new(folder.path())?;
    let subjects = [
        &address.to_string(),
        "10.96.0.1",
        "fd00:10:96::1",
        "127.0.0.1",
        "localhost",
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
    ];
    keys.server("server", &subjects.map(str::to_owned))?;
    keys.client("kubelet-client", "kube-apiserver", "system:masters")?;
    let users = [
        ("admin", ADMIN_TOKEN, "admin", "system:masters"),
        (
            "controllers",
            CONTROLLERS_TOKEN,
            "system:kube-controller-manager",
            "",
        ),
        ("scheduler", "scheduler", "system:kube-scheduler", ""),
        ("kube-proxy", "kube-proxy", "system:kube-proxy", ""),
        ("node-1", "node-1", "system:node:node-1", "system:nodes"),
        ("node-2", "node-2", "system:node:node-2", "system:nodes"),
    ];
    let mut tokens = String::new();
    for (name, token, user, group) in users {
        tokens.push_str(&format!("{token},{user},{name},\"{group}\"\n"));
        kubeconfig::write(
            &keys.file(&format!("{name}.kubeconfig")),
            &format!("https://{address}:{}", PORTS.server),
            &keys.file("ca.crt"),
            token,
        )?;
    }
    fs::write(keys.file("tokens.csv"), tokens)?;
    Ok(keys)
}

/// One line for each program or privilege that is not here.
pub fn missing_programs() -> Vec<String> {
    let mut missing = podveil_sim::missing_tools();
    let path = std::env::var_os("PATH").unwrap_or_default();
    for (program, package) in PROGRAMS {
        if !std::env::split_paths(&path)
            .chain(["/usr/sbin".into(), "/sbin".into()])
            .any(|folder| folder.join(program).is_file())
        {
            missing.push(format!("{program} is missing: apt-get install {package}"));
        }
    }
    missing
}

/// A process that outlives ours and removes what the kernel does not: cgroup folders and files.
#[derive(Debug)]
struct Janitor(Child);

impl Janitor {
    fn start(folder: &Folder) -> anyhow::Result<Self> {
        Command::new("sh")
            .args(["-c", include_str!("../scripts/janitor.sh"), "janitor"])
            .arg(folder.path())
            .arg(format!("bed{}", folder.number))
            .stdin(Stdio::piped())
            // Of a group of its own: Ctrl-C on the terminal is not for it.
            .process_group(0)
            .spawn()
            .map(Self)
            .context("starting the janitor")
    }
}

impl Drop for Janitor {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        match self.0.wait() {
            Ok(status) if status.success() => {}
            other => tracing::error!(?other, "the cluster has left something behind"),
        }
    }
}
