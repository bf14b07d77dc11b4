// SPDX-License-Identifier: Apache-2.0
use crate::keys::Keys;
use crate::tools::{self, Tool};
use crate::{Program, kubeconfig};
use anyhow::{Context, ensure};
use podveil_sim::{eventually, run};
use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Far longer than it takes: a machine that builds beside it may be slow.
const START: Duration = Duration::from_secs(60);
const ADMIN_TOKEN: &str = "admin";
const CONTROLLERS_TOKEN: &str = "controllers";

/// Which of Kubernetes' own controllers run beside the API server.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Controllers {
    /// None: a namespace has no default ServiceAccount, and one that is deleted stays `Terminating`.
    #[default]
    None,
    /// Those that end namespaces and owned objects, make ServiceAccounts, and make slices of services and pods.
    Objects,
}

/// etcd and a kube-apiserver on free ports of loopback: RBAC, ServiceAccount tokens bound to pods and nodes, admission
/// as by default. Everything ends and is removed when this is dropped.
#[derive(Debug)]
pub struct ApiServer {
    url: String,
    kubeconfig: PathBuf,
    command: Vec<String>,
    etcd_command: Vec<String>,
    controllers: Option<Program>,
    server: Option<Program>,
    etcd: Option<Program>,
    /// Last: the programs have ended before their folder is removed.
    folder: Folder,
}

impl ApiServer {
    /// Ready when it returns; the programs are built first if the cache has none.
    ///
    /// # Errors
    /// If a program cannot be had or does not become ready.
    pub fn start() -> anyhow::Result<Self> {
        Self::start_with(Controllers::None)
    }

    /// # Errors
    /// Like [`ApiServer::start`].
    pub fn start_with(controllers: Controllers) -> anyhow::Result<Self> {
        let folder = Folder::new()?;
        let keys = Keys::new(&folder.0)?;
        keys.server(
            "server",
            &[
                "127.0.0.1".to_owned(),
                "localhost".to_owned(),
                "kubernetes.default.svc".to_owned(),
            ],
        )?;
        let [etcd_port, peer_port, port] = free_ports()?;
        fs::write(
            folder.0.join("tokens.csv"),
            format!(
                "{ADMIN_TOKEN},admin,admin,\"system:masters\"\n\
                 {CONTROLLERS_TOKEN},system:kube-controller-manager,controllers\n"
            ),
        )?;
        let url = format!("https://127.0.0.1:{port}");
        let etcd_url = format!("http://127.0.0.1:{etcd_port}");
        let etcd_command = etcd_command(&folder.0, &etcd_url, peer_port)?;
        let command = server_command(&keys, &etcd_url, port)?;
        let kubeconfig = folder.0.join("admin.kubeconfig");
        kubeconfig::write(&kubeconfig, &url, &keys.file("ca.crt"), ADMIN_TOKEN)?;
        let mut api = Self {
            url,
            kubeconfig,
            command,
            etcd_command,
            controllers: None,
            server: None,
            etcd: None,
            folder,
        };
        api.resume()?;
        if controllers == Controllers::Objects {
            let kubeconfig = api.kubeconfig_for("controllers", CONTROLLERS_TOKEN)?;
            let command = controllers_command(&keys, &kubeconfig)?;
            api.controllers = Some(Program::start(&api.folder.0, "controllers", &command)?);
        }
        Ok(api)
    }

    /// A kubeconfig for a member of `system:masters`.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// A kubeconfig for whoever holds this token: one of a ServiceAccount, from the API's TokenRequest.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn kubeconfig_for(&self, name: &str, token: &str) -> anyhow::Result<PathBuf> {
        let path = self.folder.0.join(format!("{name}.kubeconfig"));
        kubeconfig::write(&path, &self.url, &self.folder.0.join("ca.crt"), token)?;
        Ok(path)
    }

    /// `https://127.0.0.1:<port>`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Certificates, kubeconfigs and logs, for as long as this lives.
    pub fn folder(&self) -> &Path {
        &self.folder.0
    }

    /// The kube-apiserver, to be stopped and continued by a test; `None` while it is killed.
    pub fn server(&mut self) -> Option<&mut Program> {
        self.server.as_mut()
    }

    /// Kills the kube-apiserver without warning. What it has stored stays.
    pub fn kill(&mut self) {
        self.server = None;
    }

    /// Starts whatever of etcd and the kube-apiserver does not run, on the same ports; ready when it returns.
    ///
    /// # Errors
    /// If it does not become ready.
    pub fn resume(&mut self) -> anyhow::Result<()> {
        if self.etcd.is_none() {
            self.etcd = Some(Program::start(&self.folder.0, "etcd", &self.etcd_command)?);
        }
        if self.server.is_none() {
            self.server = Some(Program::start(
                &self.folder.0,
                "kube-apiserver",
                &self.command,
            )?);
        }
        eventually(START, "the API server is ready", || {
            for program in [&mut self.etcd, &mut self.server].into_iter().flatten() {
                program.check_running()?;
            }
            let answer = get(&self.folder.0, &format!("{}/readyz", self.url))?;
            ensure!(answer == "ok", "it answered {answer:?}");
            Ok(())
        })
    }
}

fn get(folder: &Path, url: &str) -> anyhow::Result<String> {
    let authority = folder.join("ca.crt");
    run(
        "curl",
        [
            "--silent",
            "--show-error",
            "--noproxy",
            "*",
            "--max-time",
            "5",
            "--cacert",
            &authority.to_string_lossy(),
            "--header",
            &format!("authorization: Bearer {ADMIN_TOKEN}"),
            url,
        ],
    )
}

fn etcd_command(folder: &Path, url: &str, peer_port: u16) -> anyhow::Result<Vec<String>> {
    let peer = format!("http://127.0.0.1:{peer_port}");
    Ok(vec![
        text(&tools::path(Tool::Etcd)?),
        format!("--data-dir={}", folder.join("etcd").display()),
        format!("--listen-client-urls={url}"),
        format!("--advertise-client-urls={url}"),
        format!("--listen-peer-urls={peer}"),
        format!("--initial-advertise-peer-urls={peer}"),
        format!("--initial-cluster=default={peer}"),
        // What a test stores need not survive the machine.
        "--unsafe-no-fsync".to_owned(),
        "--log-level=warn".to_owned(),
    ])
}

fn server_command(keys: &Keys, etcd: &str, port: u16) -> anyhow::Result<Vec<String>> {
    let file = |name: &str| text(&keys.file(name));
    Ok(vec![
        text(&tools::path(Tool::KubeApiserver)?),
        format!("--etcd-servers={etcd}"),
        "--bind-address=127.0.0.1".to_owned(),
        "--advertise-address=127.0.0.1".to_owned(),
        // Loopback is no address of an Endpoints object.
        "--endpoint-reconciler-type=none".to_owned(),
        format!("--secure-port={port}"),
        format!("--tls-cert-file={}", file("server.crt")),
        format!("--tls-private-key-file={}", file("server.key")),
        format!("--client-ca-file={}", file("ca.crt")),
        "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
        format!("--service-account-key-file={}", file("sa.pub")),
        format!("--service-account-signing-key-file={}", file("sa.key")),
        format!("--token-auth-file={}", file("tokens.csv")),
        "--authorization-mode=Node,RBAC".to_owned(),
        "--allow-privileged=true".to_owned(),
        "--service-cluster-ip-range=10.96.0.0/16,fd00:10:96::/112".to_owned(),
        "--profiling=false".to_owned(),
    ])
}

fn controllers_command(keys: &Keys, kubeconfig: &Path) -> anyhow::Result<Vec<String>> {
    Ok(vec![
        text(&tools::path(Tool::KubeControllerManager)?),
        format!("--kubeconfig={}", kubeconfig.display()),
        "--leader-elect=false".to_owned(),
        "--secure-port=0".to_owned(),
        "--use-service-account-credentials=true".to_owned(),
        format!("--root-ca-file={}", text(&keys.file("ca.crt"))),
        "--controllers=namespace-controller,garbage-collector-controller,serviceaccount-controller,\
         root-ca-certificate-publisher-controller,endpointslice-controller,endpointslice-mirroring-controller"
            .to_owned(),
    ])
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// Ports that nobody listens on now. Another process may take one before it is used; a server that cannot bind says so.
fn free_ports<const N: usize>() -> anyhow::Result<[u16; N]> {
    // All held at once, so that they differ.
    let listeners: Vec<TcpListener> = (0..N)
        .map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))
        .collect::<Result<_, _>>()?;
    let mut ports = [0; N];
    for (port, listener) in ports.iter_mut().zip(&listeners) {
        *port = listener.local_addr()?.port();
    }
    Ok(ports)
}

/// A folder of this process, removed when dropped; those of processes that were killed are removed by the next one.
#[derive(Debug)]
struct Folder(PathBuf);

const PREFIX: &str = "podveil-api-";

impl Folder {
    fn new() -> anyhow::Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let parent = std::env::temp_dir();
        for entry in fs::read_dir(&parent)?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let owner = name
                .strip_prefix(PREFIX)
                .and_then(|rest| rest.split_once('-'));
            if let Some((owner, _)) = owner
                && !Path::new("/proc").join(owner).exists()
                && let Err(error) = fs::remove_dir_all(entry.path())
            {
                tracing::debug!(name, %error, "another process removes it too");
            }
        }
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let folder = parent.join(format!("{PREFIX}{}-{number}", std::process::id()));
        fs::create_dir(&folder).with_context(|| format!("making {}", folder.display()))?;
        Ok(Self(folder))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::warn!(folder = %self.0.display(), %error, "a folder is left");
        }
    }
}
