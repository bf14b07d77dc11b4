// SPDX-License-Identifier: Apache-2.0
//! An API server with the chart's objects in it, CAs that use it, and programs that use those.

use anyhow::{Context, ensure};
use podveil_ca::{Config, RunningCa};
use podveil_ca_client::{Module, ProgramConfig, ProgramCredentials};
use podveil_cluster::ApiServer;
use podveil_cluster::tools::{self, Tool};
use podveil_identity::{ProgramIdentity, TrustDomain};
use podveil_kube::k8s_openapi::api::core::v1::{ConfigMap, Secret};
use podveil_kube::kube::config::{KubeConfigOptions, Kubeconfig};
use podveil_kube::kube::{self, Api, Client};
use podveil_proto::podveil::ca::v1::StatusResponse;
use podveil_proto::podveil::ca::v1::admin_client::AdminClient;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint, Uri};

pub const NAMESPACE: &str = "podveil-system";
/// The machine may be busy with a build.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub struct World {
    pub api: ApiServer,
    /// A member of `system:masters`.
    pub admin: Client,
    pub folder: tempfile::TempDir,
    /// What the chart installs.
    objects: String,
}

/// One replica. It stops as a pod does that is told to end, or all at once when dropped.
pub struct Ca {
    pub name: String,
    running: Option<RunningCa>,
    pub stop: CancellationToken,
    pub folder: PathBuf,
}

impl World {
    pub async fn new() -> anyhow::Result<Self> {
        let api = tokio::task::spawn_blocking(ApiServer::start).await??;
        let admin = client(api.kubeconfig()).await?;
        let chart = concat!(env!("CARGO_MANIFEST_DIR"), "/../../charts/podveil");
        let arguments = ["template", "podveil", chart, "-n", NAMESPACE, "--no-hooks"];
        let objects = run(&tools::path(Tool::Helm)?, &arguments, "")?;
        let world = Self {
            api,
            admin,
            folder: tempfile::tempdir()?,
            objects,
        };
        world.kubectl(&["create", "namespace", NAMESPACE], "")?;
        for node in ["n1", "n2"] {
            world
                .apply(&json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node}}))?;
        }
        Ok(world)
    }

    /// Podveil as it is just after its installation: its own objects are new, and nothing else runs.
    pub fn install(&self) -> anyhow::Result<()> {
        let gone = "pods,secrets,configmaps,leases,serviceaccounts";
        let delete = ["delete", gone, "--all", "-A", "--force", "--grace-period=0"];
        self.kubectl(&delete, "")?;
        self.kubectl(&["apply", "-f", "-"], &self.objects).map(drop)
    }

    pub fn kubectl(&self, arguments: &[&str], input: &str) -> anyhow::Result<String> {
        let kubeconfig = format!("--kubeconfig={}", self.api.kubeconfig().display());
        let arguments = [&[kubeconfig.as_str()], arguments].concat();
        run(&tools::path(Tool::Kubectl)?, &arguments, input)
    }

    pub fn apply(&self, object: &Value) -> anyhow::Result<()> {
        self.kubectl(&["apply", "-f", "-"], &object.to_string())
            .map(drop)
    }

    /// A namespace with a ServiceAccount; enrolled or not.
    pub fn namespace(&self, name: &str, account: &str, labels: Value) -> anyhow::Result<()> {
        self.apply(&json!({
            "apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": name, "labels": labels},
        }))?;
        self.apply(&json!({
            "apiVersion": "v1", "kind": "ServiceAccount",
            "metadata": {"name": account, "namespace": name},
        }))
    }

    /// A running pod on a node, as a kubelet would report it.
    pub fn pod(
        &self,
        namespace: &str,
        name: &str,
        account: &str,
        node: &str,
    ) -> anyhow::Result<()> {
        self.apply(&json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {
                "nodeName": node,
                "serviceAccountName": account,
                "hostNetwork": namespace == NAMESPACE,
                "automountServiceAccountToken": false,
                "terminationGracePeriodSeconds": 0,
                "containers": [{"name": "app", "image": "none"}],
            },
        }))?;
        self.phase(namespace, name, "Running")
    }

    pub fn phase(&self, namespace: &str, name: &str, phase: &str) -> anyhow::Result<()> {
        let patch = json!({"status": {"phase": phase, "podIP": "10.1.0.1", "podIPs": [{"ip": "10.1.0.1"}]}});
        let patch = format!("--patch={patch}");
        let arguments = [
            "patch",
            "pod",
            name,
            "-n",
            namespace,
            "--subresource=status",
            &patch,
        ];
        self.kubectl(&arguments, "").map(drop)
    }

    pub fn delete(&self, namespace: &str, kind: &str, name: &str) -> anyhow::Result<()> {
        // There is no kubelet that would end it.
        let arguments = [
            "delete",
            kind,
            name,
            "-n",
            namespace,
            "--grace-period=0",
            "--force",
        ];
        self.kubectl(&arguments, "").map(drop)
    }

    /// A token as the kubelet asks for one: for an audience, bound to a pod where `pod` names one.
    pub fn token(
        &self,
        namespace: &str,
        account: &str,
        pod: Option<&str>,
        audience: &str,
        seconds: u32,
    ) -> anyhow::Result<String> {
        let (audience, duration) = (
            format!("--audience={audience}"),
            format!("--duration={seconds}s"),
        );
        let mut arguments = vec![
            "create", "token", account, "-n", namespace, &audience, &duration,
        ];
        let (name, uid);
        if let Some(pod) = pod {
            let path = "-o=jsonpath={.metadata.uid}";
            let read = self.kubectl(&["get", "pod", pod, "-n", namespace, path], "")?;
            name = format!("--bound-object-name={pod}");
            uid = format!("--bound-object-uid={read}");
            arguments.extend(["--bound-object-kind=Pod", &name, &uid]);
        }
        Ok(self.kubectl(&arguments, "")?.trim().to_owned())
    }

    /// Who a ServiceAccount is to the API server.
    pub async fn client_of(&self, account: &str) -> anyhow::Result<Client> {
        let token = self.kubectl(
            &["create", "token", account, "-n", NAMESPACE, "--duration=2h"],
            "",
        )?;
        client(&self.api.kubeconfig_for(account, token.trim())?).await
    }

    /// A replica of the CA with the rights of its ServiceAccount, as it runs in a pod of this name. `change` may change
    /// its configuration.
    pub async fn ca_with(&self, name: &str, change: &[(&str, Value)]) -> anyhow::Result<Ca> {
        let folder = tempfile::tempdir_in(self.folder.path())?.keep();
        let mut config = json!({
            "listen": "127.0.0.1:0",
            "source": "kubernetes",
            "namespace": NAMESPACE,
            "replica": name,
            "admin_socket": folder.join("run/admin.sock"),
            "metrics_address": "127.0.0.1:0",
            "readiness_address": "127.0.0.1:0",
            "rotation": {"timeout": "20s", "absent_after": "2s"},
        });
        for (key, value) in change {
            config[*key] = value.clone();
        }
        let config: Config = serde_json::from_value(config)?;
        let client = self.client_of("podveil-ca").await?;
        let stop = CancellationToken::new();
        let starting = RunningCa::start_with(config, Some(client), stop.clone());
        let running = tokio::time::timeout(PATIENCE, starting)
            .await
            .context("the CA did not start")??;
        Ok(Ca {
            name: name.to_owned(),
            running: Some(running),
            stop,
            folder,
        })
    }

    pub async fn ca(&self, name: &str) -> anyhow::Result<Ca> {
        self.pod(NAMESPACE, name, "podveil-ca", "n1")?;
        self.ca_with(name, &[]).await
    }

    /// The roots as they are published.
    pub async fn roots(&self) -> anyhow::Result<Option<String>> {
        let maps: Api<ConfigMap> = Api::namespaced(self.admin.clone(), NAMESPACE);
        let data = maps
            .get_opt("podveil-roots")
            .await?
            .and_then(|map| map.data);
        Ok(data.and_then(|mut data| data.remove("bundle.pem")))
    }

    pub async fn secret(&self) -> anyhow::Result<BTreeMap<String, Vec<u8>>> {
        let secrets: Api<Secret> = Api::namespaced(self.admin.clone(), NAMESPACE);
        let data = secrets.get("podveil-ca").await?.data.unwrap_or_default();
        Ok(data
            .into_iter()
            .map(|(key, value)| (key, value.0))
            .collect())
    }

    pub async fn journal(&self) -> anyhow::Result<Value> {
        let secret = self.secret().await?;
        let journal = secret.get("journal.json").context("no journal.json")?;
        Ok(serde_json::from_slice(journal)?)
    }

    /// The roots, once there are any.
    pub async fn published(&self) -> anyhow::Result<String> {
        eventually("roots are published", async || {
            Ok(self.roots().await?.filter(|roots| !roots.is_empty()))
        })
        .await
    }

    /// A program as it runs, with a projected token in its file and the published roots.
    pub async fn program(
        &self,
        ca: SocketAddr,
        identity: ProgramIdentity,
        token: &str,
        stop: &CancellationToken,
    ) -> anyhow::Result<ProgramCredentials> {
        self.program_trusting(&self.published().await?, ca, identity, token, stop)
    }

    pub fn program_trusting(
        &self,
        roots: &str,
        ca: SocketAddr,
        identity: ProgramIdentity,
        token: &str,
        stop: &CancellationToken,
    ) -> anyhow::Result<ProgramCredentials> {
        let folder = tempfile::tempdir_in(self.folder.path())?.keep();
        std::fs::write(folder.join("bundle.pem"), roots)?;
        std::fs::write(folder.join("token"), token)?;
        let module = match identity {
            ProgramIdentity::Node(_) => Module::Proxy,
            _ => Module::Controller,
        };
        let config = ProgramConfig {
            trust_domain: TrustDomain::new("cluster.local")?,
            identity,
            ca_address: ca.to_string(),
            token_path: folder.join("token"),
            bootstrap_bundle: folder.join("bundle.pem"),
            state_dir: folder.join("state"),
            module,
        };
        Ok(ProgramCredentials::start(config, stop.clone()))
    }
}

impl Drop for Ca {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Ca {
    pub fn running(&self) -> &RunningCa {
        self.running.as_ref().expect("until it is stopped")
    }

    pub fn address(&self) -> SocketAddr {
        self.running().address
    }

    pub async fn admin(&self) -> anyhow::Result<AdminClient<Channel>> {
        let socket = self.folder.join("run/admin.sock");
        let connect = move |_: Uri| {
            let socket = socket.clone();
            async move {
                tokio::net::UnixStream::connect(socket)
                    .await
                    .map(hyper_util::rt::TokioIo::new)
            }
        };
        let channel = Endpoint::from_static("http://admin")
            .connect_with_connector(tower::service_fn(connect))
            .await?;
        Ok(AdminClient::new(channel))
    }

    pub async fn status(&self) -> anyhow::Result<StatusResponse> {
        let request = podveil_proto::podveil::ca::v1::StatusRequest {};
        Ok(self.admin().await?.status(request).await?.into_inner())
    }

    /// As `/metrics` says.
    pub async fn metrics(&self) -> anyhow::Result<String> {
        get(self.running().metrics_address, "/metrics").await
    }

    pub async fn stop(mut self) -> anyhow::Result<()> {
        self.stop.cancel();
        let running = self.running.take().context("it runs until here")?;
        tokio::time::timeout(PATIENCE, running.ended()).await?
    }
}

pub async fn get(address: SocketAddr, path: &str) -> anyhow::Result<String> {
    let url = format!("http://{address}{path}");
    let get = tokio::process::Command::new("curl")
        .args(["--silent", "--show-error", &url])
        .output()
        .await?;
    Ok(String::from_utf8(get.stdout)?)
}

pub fn node(name: &str) -> anyhow::Result<ProgramIdentity> {
    Ok(ProgramIdentity::Node(name.parse()?))
}

async fn client(kubeconfig: &Path) -> anyhow::Result<Client> {
    let config = Kubeconfig::read_from(kubeconfig)?;
    let options = KubeConfigOptions::default();
    let config = kube::Config::from_custom_kubeconfig(config, &options).await?;
    Ok(Client::try_from(config)?)
}

fn run(program: &Path, arguments: &[&str], input: &str) -> anyhow::Result<String> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {}", program.display()))?;
    let mut stdin = child.stdin.take().context("it is piped")?;
    stdin.write_all(input.as_bytes())?;
    drop(stdin);
    let output = child.wait_with_output()?;
    let message = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{arguments:?}: {message}");
    Ok(String::from_utf8(output.stdout)?)
}

/// Asks until there is an answer.
pub async fn eventually<T>(
    what: &str,
    ask: impl AsyncFn() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let asking = async {
        loop {
            if let Some(answer) = ask().await? {
                return anyhow::Ok(answer);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    match tokio::time::timeout(PATIENCE, asking).await {
        Ok(answer) => answer.with_context(|| what.to_owned()),
        Err(_) => anyhow::bail!("never: {what}"),
    }
}

pub async fn holds(what: &str, ask: impl AsyncFn() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    eventually(what, async || Ok(ask().await?.then_some(()))).await
}
