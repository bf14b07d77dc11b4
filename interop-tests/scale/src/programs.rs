// SPDX-License-Identifier: Apache-2.0
//! The real programs, on loopback.

use crate::objects;
use anyhow::{Context, ensure};
use podveil_cluster::Program;
use podveil_model::Epoch;
use serde_json::{Value, json};
use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::time::Instant;

const PATIENCE: Duration = Duration::from_secs(30);

/// Where everybody is and what they need to know of each other.
#[derive(Debug)]
pub(crate) struct Programs {
    binaries: PathBuf,
    pub folder: PathBuf,
    pub ca: String,
    pub controller: String,
    readiness: String,
    pub node_metrics: String,
}

impl Programs {
    /// `binaries`: the folder of the programs.
    pub(crate) fn new(binaries: &Path, folder: &Path) -> anyhow::Result<Self> {
        for name in ["podveil-ca", "podveil-controller", "podveil-node"] {
            ensure!(
                binaries.join(name).is_file(),
                "{name} is not in {}",
                binaries.display()
            );
        }
        let [ca, controller, readiness, node_metrics] = free_addresses()?;
        Ok(Self {
            binaries: binaries.to_owned(),
            folder: folder.to_owned(),
            ca,
            controller,
            readiness,
            node_metrics,
        })
    }

    pub(crate) fn token(&self, program: &str) -> PathBuf {
        self.folder.join("tokens").join(program)
    }

    pub(crate) fn bundle(&self) -> PathBuf {
        self.folder.join("ca/bundle.pem")
    }

    /// It knows these nodes by tokens of their own.
    pub(crate) async fn start_ca(&self, nodes: usize) -> anyhow::Result<Program> {
        let tokens = self.folder.join("tokens");
        fs::create_dir(&tokens)?;
        fs::set_permissions(&tokens, fs::Permissions::from_mode(0o700))?;
        let names = || (0..nodes).map(objects::node_name);
        let programs = names().map(|node| format!("node.{node}"));
        for name in programs.chain(["controller".to_owned()]) {
            fs::write(self.token(&name), format!("a-token-for-{name}-alone"))?;
        }
        let cluster = self.folder.join("cluster.yaml");
        let known: Vec<Value> = names().map(|name| json!({ "name": name })).collect();
        let state = json!({ "trustDomain": "cluster.local", "nodes": known });
        fs::write(&cluster, serde_json::to_vec(&state)?)?;
        let config = json!({
            "listen": self.ca,
            "data_dir": self.folder.join("ca"),
            "tokens_dir": tokens,
            "source": cluster,
            "admin_socket": self.folder.join("ca-admin/admin.sock"),
            "metrics_address": "127.0.0.1:0",
            "readiness_address": "127.0.0.1:0",
            // All nodes come at once, which they do not in a cluster.
            "limits": { "first_contacts_per_second": 10_000 },
        });
        let mut ca = self.start("podveil-ca", "ca", &config, &[])?;
        let deadline = Instant::now() + PATIENCE;
        while !self.bundle().is_file() {
            ca.check_running()?;
            ensure!(Instant::now() < deadline, "the CA has written no bundle");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(ca)
    }

    /// A controller on what it left in its state folder.
    pub(crate) fn start_controller(&self, kubeconfig: &Path) -> anyhow::Result<Program> {
        let config = json!({
            "listen": self.controller,
            "source": "kubernetes",
            "replica": "scale",
            "ca_address": self.ca,
            "token": self.token("controller"),
            "bootstrap_bundle": self.bundle(),
            "state_dir": self.folder.join("controller"),
            "admin_address": "127.0.0.1:0",
            "metrics_address": "127.0.0.1:0",
            "readiness_address": self.readiness,
        });
        let kubeconfig = format!("KUBECONFIG={}", kubeconfig.display());
        self.start("podveil-controller", "controller", &config, &[kubeconfig])
    }

    /// Saves for the controller that all of these pods have long been enrolled.
    pub(crate) fn save_enrolment<'a>(
        &self,
        pods: impl Iterator<Item = (&'a str, Epoch)>,
    ) -> anyhow::Result<()> {
        let folder = self.folder.join("controller");
        fs::create_dir_all(&folder)?;
        let workload = |(uid, epoch): (&str, Epoch)| {
            let saved = json!({
                "stage": "mandatory", "strict": false, "resource_version": epoch.resource_version,
            });
            (uid.to_owned(), saved)
        };
        let file = json!({
            "version": 0,
            "workloads": pods.map(workload).collect::<serde_json::Map<_, _>>(),
        });
        fs::write(folder.join("enrolment.json"), serde_json::to_vec(&file)?)?;
        Ok(())
    }

    /// The `proxy` module of the first node, which has no pod to serve.
    pub(crate) fn start_node(&self, cgroup: &str) -> anyhow::Result<Program> {
        let node = objects::node_name(0);
        let config = json!({
            "node": node,
            "modules": ["proxy"],
            "xds_address": self.controller,
            "ca_address": self.ca,
            "token": self.token(&format!("node.{node}")),
            "bootstrap_bundle": self.bundle(),
            "state_dir": self.folder.join("node"),
            "cgroup": cgroup,
            "zds_socket": self.folder.join("zds.sock"),
            "listeners_socket": self.folder.join("listeners.sock"),
            "admin_address": "127.0.0.1:0",
            "metrics_address": self.node_metrics,
            "readiness_address": "127.0.0.1:0",
        });
        self.start("podveil-node", "node", &config, &[])
    }

    pub(crate) async fn controller_is_ready(&self) -> bool {
        http_get(&self.readiness, "/healthz/ready")
            .await
            .is_ok_and(|answer| answer.starts_with("HTTP/1.1 200"))
    }

    fn start(
        &self,
        program: &str,
        name: &str,
        config: &Value,
        environment: &[String],
    ) -> anyhow::Result<Program> {
        let path = self.folder.join(format!("{name}.yaml"));
        fs::write(&path, serde_json::to_vec_pretty(config)?)?;
        let mut command = vec!["env".to_owned()];
        command.extend_from_slice(environment);
        let text = |path: &Path| path.to_string_lossy().into_owned();
        command.extend([
            text(&self.binaries.join(program)),
            "--config".to_owned(),
            text(&path),
        ]);
        Program::start(&self.folder, name, &command).with_context(|| format!("starting {program}"))
    }
}

/// The whole answer, head and body.
pub(crate) async fn http_get(address: &str, path: &str) -> anyhow::Result<String> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(address).await?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

/// Addresses at which nobody listens now, all different.
fn free_addresses<const N: usize>() -> anyhow::Result<[String; N]> {
    let listeners: Vec<TcpListener> = (0..N)
        .map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))
        .collect::<Result<_, _>>()?;
    let addresses: Vec<String> = listeners
        .iter()
        .map(|listener| Ok(listener.local_addr()?.to_string()))
        .collect::<anyhow::Result<_>>()?;
    addresses
        .try_into()
        .map_err(|_| anyhow::anyhow!("as many as listeners"))
}
