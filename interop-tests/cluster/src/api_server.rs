// SPDX-License-Identifier: Apache-2.0
use crate::folder::Folder;
use crate::keys::Keys;
use crate::server::{self, ADMIN_TOKEN, CONTROLLERS_TOKEN, Ports};
use crate::{Program, kubeconfig};
use anyhow::ensure;
use podveil_sim::eventually;
use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Far longer than it takes: a machine that builds beside it may be slow.
const START: Duration = Duration::from_secs(60);

const OBJECT_CONTROLLERS: &str = "namespace-controller,garbage-collector-controller,serviceaccount-controller,\
    root-ca-certificate-publisher-controller,endpointslice-controller,endpointslice-mirroring-controller";

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
        let folder = Folder::new("api")?;
        let keys = Keys::new(folder.path())?;
        keys.server(
            "server",
            &[
                "127.0.0.1".to_owned(),
                "localhost".to_owned(),
                "kubernetes.default.svc".to_owned(),
            ],
        )?;
        let [etcd, peer, port] = free_ports()?;
        let ports = Ports {
            etcd,
            peer,
            server: port,
        };
        fs::write(
            folder.path().join("tokens.csv"),
            format!(
                "{ADMIN_TOKEN},admin,admin,\"system:masters\"\n\
                 {CONTROLLERS_TOKEN},system:kube-controller-manager,controllers\n"
            ),
        )?;
        let url = format!("https://127.0.0.1:{port}");
        let etcd_command = server::etcd(folder.path(), ports)?;
        let mut command = server::kube_apiserver(&keys, ports, Ipv4Addr::LOCALHOST)?;
        // Loopback is no address of an Endpoints object.
        command.push("--endpoint-reconciler-type=none".to_owned());
        let kubeconfig = folder.path().join("admin.kubeconfig");
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
            let mut command = server::kube_controller_manager(&keys, &kubeconfig)?;
            command.push(format!("--controllers={OBJECT_CONTROLLERS}"));
            api.controllers = Some(Program::start(api.folder.path(), "controllers", &command)?);
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
        let path = self.folder.path().join(format!("{name}.kubeconfig"));
        kubeconfig::write(&path, &self.url, &self.folder.path().join("ca.crt"), token)?;
        Ok(path)
    }

    /// `https://127.0.0.1:<port>`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Certificates, kubeconfigs and logs, for as long as this lives.
    pub fn folder(&self) -> &Path {
        self.folder.path()
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
            self.etcd = Some(Program::start(
                self.folder.path(),
                "etcd",
                &self.etcd_command,
            )?);
        }
        if self.server.is_none() {
            self.server = Some(Program::start(
                self.folder.path(),
                "kube-apiserver",
                &self.command,
            )?);
        }
        eventually(START, "the API server is ready", || {
            for program in [&mut self.etcd, &mut self.server].into_iter().flatten() {
                program.check_running()?;
            }
            let answer = server::get(
                &self.folder.path().join("ca.crt"),
                &format!("{}/readyz", self.url),
            )?;
            ensure!(answer == "ok", "it answered {answer:?}");
            Ok(())
        })
    }
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
