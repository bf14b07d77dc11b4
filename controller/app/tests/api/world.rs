// SPDX-License-Identifier: Apache-2.0
//! An API server with the chart's objects, two replicas of the controller, and two nodes.

use crate::authorities::Authorities;
use crate::node::Node;
use crate::objects::Objects;
use anyhow::{Context, ensure};
use podveil_cluster::tools::{self, Tool};
use podveil_cluster::{ApiServer, Controllers};
use podveil_controller::{Config, Controller};
use podveil_identity::ProgramIdentity;
use podveil_kube::kube::config::{KubeConfigOptions, Kubeconfig};
use podveil_kube::kube::{self, Client};
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

pub const NAMESPACE: &str = "podveil-system";
/// The machine may be busy with a build.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub struct World {
    pub api: ApiServer,
    pub objects: Objects,
    pub authorities: Authorities,
    pub replicas: Vec<Replica>,
    pub nodes: Vec<Node>,
    _folder: tempfile::TempDir,
}

pub struct Replica {
    pub name: String,
    pub controller: Controller,
    stop: CancellationToken,
}

impl World {
    pub async fn start() -> anyhow::Result<Self> {
        let api =
            tokio::task::spawn_blocking(|| ApiServer::start_with(Controllers::Objects)).await??;
        let folder = tempfile::tempdir()?;
        let objects = Objects(client(api.kubeconfig()).await?);
        objects
            .post(
                "/api/v1/namespaces",
                json!({"metadata": {"name": NAMESPACE}}),
            )
            .await?;
        install(&api)?;
        for (number, name) in [(1, "n1"), (2, "n2")] {
            let zone = format!("zone-{number}");
            let ranges = json!([
                format!("10.244.{number}.0/24"),
                format!("fd00:10:244:{number}::/64")
            ]);
            let node = json!({
                "metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": zone}},
                "spec": {"podCIDR": ranges[0], "podCIDRs": ranges},
            });
            objects.post("/api/v1/nodes", node).await?;
            let address = json!([{"type": "InternalIP", "address": format!("172.30.0.{number}")}]);
            let path = format!("/api/v1/nodes/{name}/status");
            objects
                .patch(&path, json!({"status": {"addresses": address}}))
                .await?;
        }
        let mut world = Self {
            api,
            objects,
            authorities: Authorities::new(),
            replicas: Vec::new(),
            nodes: Vec::new(),
            _folder: folder,
        };
        for name in ["controller-a", "controller-b"] {
            let replica = world.replica(name).await?;
            world.replicas.push(replica);
        }
        let addresses: Vec<_> = world
            .replicas
            .iter()
            .map(|replica| replica.controller.address)
            .collect();
        // Each takes its configuration from another replica, and reports to both.
        for (name, from) in ["n1", "n2"].iter().zip(&addresses) {
            let node = Node::start(&world.authorities, name, *from, &addresses);
            world.nodes.push(node);
        }
        // Good news from before the first holder of the Lease are not told: it is there, and writes.
        let typo = json!({"io.cilium/mtls-enabled": "ja"});
        world.objects.namespace("first", typo).await?;
        world.event("", "first", "BadSetting", "ja").await?;
        Ok(world)
    }

    /// As it runs in a pod of this name: with the rights of its ServiceAccount.
    pub async fn replica(&self, name: &str) -> anyhow::Result<Replica> {
        let path =
            format!("/api/v1/namespaces/{NAMESPACE}/serviceaccounts/podveil-controller/token");
        let token = self
            .objects
            .post(
                &path,
                json!({"spec": {"audiences": [], "expirationSeconds": 7200}}),
            )
            .await?;
        let token = token.pointer("/status/token").and_then(Value::as_str);
        let kubeconfig = self.api.kubeconfig_for(name, token.context("no token")?)?;
        let config: Config = serde_json::from_value(json!({
            "listen": "127.0.0.1:0",
            "source": "kubernetes",
            "namespace": NAMESPACE,
            "replica": name,
            "ca_address": "127.0.0.1:1",
            "state_dir": self._folder.path().join(name),
            "admin_address": "127.0.0.1:0",
            "metrics_address": "127.0.0.1:0",
            "readiness_address": "127.0.0.1:0",
        }))?;
        let id = ProgramIdentity::Controller.spiffe_id(&self.authorities.trust_domain);
        let credentials = self.authorities.credentials(&id);
        let stop = CancellationToken::new();
        let client = client(&kubeconfig).await?;
        let controller =
            Controller::start_with(&config, credentials, Some(client), stop.clone()).await?;
        Ok(Replica {
            name: name.to_owned(),
            controller,
            stop,
        })
    }

    /// Events about this object; a namespace is in none itself.
    pub async fn events(&self, namespace: &str, object: &str) -> anyhow::Result<Vec<Event>> {
        let all = self.all_events(namespace).await?;
        Ok(all.into_iter().filter(|one| one.object == object).collect())
    }

    pub async fn all_events(&self, namespace: &str) -> anyhow::Result<Vec<Event>> {
        let list = self.objects.get("/apis/events.k8s.io/v1/events").await?;
        let text = |one: &Value, path: &str| {
            let text = one.pointer(path).and_then(Value::as_str);
            text.unwrap_or_default().to_owned()
        };
        let items = list.pointer("/items").and_then(Value::as_array);
        Ok(items
            .into_iter()
            .flatten()
            .filter(|one| text(one, "/reportingController") == "podveil.io/controller")
            .filter(|one| text(one, "/regarding/namespace") == namespace)
            .map(|one| Event {
                object: text(one, "/regarding/name"),
                reason: text(one, "/reason"),
                note: text(one, "/note"),
                by: text(one, "/reportingInstance"),
            })
            .collect())
    }

    /// Waits for an event about an object, of this reason and with this in its note.
    pub async fn event(
        &self,
        namespace: &str,
        object: &str,
        reason: &str,
        note: &str,
    ) -> anyhow::Result<()> {
        let what = format!("{reason} on {object}: {note}");
        holds(&what, async || {
            let events = self.events(namespace, object).await?;
            Ok(events
                .iter()
                .any(|one| one.reason == reason && one.note.contains(note)))
        })
        .await
    }

    pub async fn status(&self, replica: usize) -> anyhow::Result<Value> {
        let address = self.replicas[replica].controller.admin_address;
        let url = format!("http://{address}/status");
        let (status, _) = curl(&["--silent", "--show-error", &url]).await?;
        Ok(serde_json::from_str(&status)?)
    }

    /// Of a workload, as `/status` of this replica says.
    pub async fn workload(&self, replica: usize, uid: &str) -> anyhow::Result<Option<Value>> {
        let status = self.status(replica).await?;
        let workloads = status["workloads"].as_array().context("no workloads")?;
        Ok(workloads.iter().find(|one| one["uid"] == uid).cloned())
    }
}

#[derive(Clone, Debug)]
pub struct Event {
    pub object: String,
    pub reason: String,
    pub note: String,
    pub by: String,
}

impl Replica {
    pub async fn stop(self) -> anyhow::Result<()> {
        self.stop.cancel();
        let ended = tokio::time::timeout(PATIENCE, self.controller.ended());
        ended.await.context("it did not stop")
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for replica in &self.replicas {
            replica.stop.cancel();
        }
    }
}

fn install(api: &ApiServer) -> anyhow::Result<()> {
    let chart = concat!(env!("CARGO_MANIFEST_DIR"), "/../../charts/podveil");
    let rendered = Command::new(tools::path(Tool::Helm)?)
        .args(["template", "podveil", chart, "-n", NAMESPACE, "--no-hooks"])
        .output()?;
    ensure!(rendered.status.success(), "{rendered:?}");
    let file = api.folder().join("chart.yaml");
    std::fs::write(&file, rendered.stdout)?;
    let applied = Command::new(tools::path(Tool::Kubectl)?)
        .arg("--kubeconfig")
        .arg(api.kubeconfig())
        .args(["apply", "-f"])
        .arg(&file)
        .output()?;
    ensure!(applied.status.success(), "{applied:?}");
    Ok(())
}

async fn client(kubeconfig: &Path) -> anyhow::Result<Client> {
    let config = Kubeconfig::read_from(kubeconfig)?;
    let options = KubeConfigOptions::default();
    let config = kube::Config::from_custom_kubeconfig(config, &options).await?;
    Ok(Client::try_from(config)?)
}

/// Its output, and whether it succeeded.
pub async fn curl(arguments: &[&str]) -> anyhow::Result<(String, bool)> {
    let done = tokio::process::Command::new("curl")
        .args(arguments)
        .output()
        .await?;
    let mut output = String::from_utf8_lossy(&done.stdout).into_owned();
    output.push_str(&String::from_utf8_lossy(&done.stderr));
    Ok((output, done.status.success()))
}

/// Asks until it is so.
pub async fn holds(what: &str, ask: impl AsyncFn() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let asking = async {
        while !ask().await? {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        anyhow::Ok(())
    };
    match tokio::time::timeout(PATIENCE, asking).await {
        Ok(answer) => answer.with_context(|| what.to_owned()),
        Err(_) => anyhow::bail!("never: {what}"),
    }
}
