// SPDX-License-Identifier: Apache-2.0
use crate::{CONTROL_PLANE_ADDRESS, ClusterFile, NodeNet, Process, Sandbox, Topology};
use anyhow::{Context, bail, ensure};
use serde_json::json;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const START_BOUND: Duration = Duration::from_secs(20);

/// The programs under test, all in one folder.
#[derive(Clone, Debug)]
pub struct Binaries {
    folder: PathBuf,
}

impl Binaries {
    const NAMES: [&str; 4] = [
        "podveil-ca",
        "podveil-controller",
        "podveil-node",
        "podveilctl",
    ];

    /// # Errors
    /// If one of them is not in `folder`, with its name.
    pub fn in_folder(folder: impl Into<PathBuf>) -> anyhow::Result<Self> {
        let folder = folder.into();
        for name in Self::NAMES {
            ensure!(
                folder.join(name).is_file(),
                "{name} is not in {}: run `cargo build`",
                folder.display()
            );
        }
        Ok(Self { folder })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    pub fn text(&self, name: &str) -> String {
        self.path(name).to_string_lossy().into_owned()
    }
}

/// The CA and the controller, in their namespace. Each can be stopped and started again.
#[derive(Debug)]
pub struct ControlPlane {
    pub ca: Process,
    pub controller: Process,
}

impl ControlPlane {
    /// Starts both. The cluster file must have been written.
    ///
    /// # Errors
    /// If one does not come up, with the end of its log.
    pub fn start(
        sandbox: &Sandbox,
        binaries: &Binaries,
        topology: &Topology,
        cluster: &ClusterFile,
    ) -> anyhow::Result<Self> {
        let ca = Self::start_ca(sandbox, binaries, topology, cluster)?;
        let controller = Self::start_controller(sandbox, binaries, topology, cluster)?;
        Ok(Self { ca, controller })
    }

    /// # Errors
    /// If it does not come up, with the end of its log.
    pub fn start_ca(
        sandbox: &Sandbox,
        binaries: &Binaries,
        topology: &Topology,
        cluster: &ClusterFile,
    ) -> anyhow::Result<Process> {
        let folder = sandbox.folder();
        let tokens = folder.join("tokens");
        fs::create_dir_all(&tokens)?;
        fs::set_permissions(&tokens, fs::Permissions::from_mode(0o700))?;
        for name in ["controller", "node.n1", "node.n2"] {
            let token = tokens.join(name);
            if !token.exists() {
                fs::write(
                    &token,
                    format!(
                        "{name}-{}",
                        fs::read_to_string("/proc/sys/kernel/random/uuid")?.trim()
                    ),
                )?;
            }
        }
        let config = json!({
            "trust_domain": cluster.trust_domain,
            "listen": format!("{CONTROL_PLANE_ADDRESS}:15012"),
            "data_dir": folder.join("ca"),
            "tokens_dir": tokens,
            "source": cluster.path(),
            "admin_socket": admin_socket(sandbox),
            "metrics_address": "127.0.0.1:15220",
            "readiness_address": "127.0.0.1:15221",
        });
        let config = write_config(folder, "ca", &config)?;
        let command = [&binaries.text("podveil-ca"), "--config", &config];
        let mut process = Process::start(sandbox, &topology.control_plane.0, "ca", &command)?;
        wait(&mut process, "it has written its bundle", || {
            folder.join("ca/bundle.pem").is_file()
        })?;
        Ok(process)
    }

    /// # Errors
    /// If it does not start.
    pub fn start_controller(
        sandbox: &Sandbox,
        binaries: &Binaries,
        topology: &Topology,
        cluster: &ClusterFile,
    ) -> anyhow::Result<Process> {
        let folder = sandbox.folder();
        let config = json!({
            "trust_domain": cluster.trust_domain,
            "listen": format!("{CONTROL_PLANE_ADDRESS}:15010"),
            "source": cluster.path(),
            "ca_address": format!("{CONTROL_PLANE_ADDRESS}:15012"),
            "token": folder.join("tokens/controller"),
            "bootstrap_bundle": folder.join("ca/bundle.pem"),
            "state_dir": folder.join("controller"),
            "admin_address": "127.0.0.1:15300",
            "metrics_address": "127.0.0.1:15320",
            "readiness_address": "127.0.0.1:15321",
        });
        let config = write_config(folder, "controller", &config)?;
        let command = [&binaries.text("podveil-controller"), "--config", &config];
        Process::start(sandbox, &topology.control_plane.0, "controller", &command)
    }
}

/// The CA's admin socket, for `podveilctl rotate`.
pub fn admin_socket(sandbox: &Sandbox) -> PathBuf {
    sandbox.folder().join("ca-admin/admin.sock")
}

/// What may differ between the nodes of a test.
#[derive(Clone, Debug, Default)]
pub struct NodeSettings {
    /// Keys of the `proxy` section.
    pub proxy: serde_json::Map<String, serde_json::Value>,
    /// Keys of the `redirect` section.
    pub redirect: serde_json::Map<String, serde_json::Value>,
    /// The programs follow each other, and are asked for readiness by this name.
    pub instance: Option<String>,
}

/// The two processes of a node: `redirect`, which holds capture and listeners, and `proxy`, which carries bytes.
#[derive(Debug)]
pub struct NodePrograms {
    pub redirect: Process,
    pub proxy: Process,
}

impl NodePrograms {
    /// # Errors
    /// If one cannot be started.
    pub fn start(
        sandbox: &Sandbox,
        binaries: &Binaries,
        node: &NodeNet,
        settings: &NodeSettings,
    ) -> anyhow::Result<Self> {
        let redirect = Self::start_module(sandbox, binaries, node, "redirect", settings)?;
        let proxy = Self::start_module(sandbox, binaries, node, "proxy", settings)?;
        Ok(Self { redirect, proxy })
    }

    /// Starts one module, again or for the first time.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start_module(
        sandbox: &Sandbox,
        binaries: &Binaries,
        node: &NodeNet,
        module: &str,
        settings: &NodeSettings,
    ) -> anyhow::Result<Process> {
        let name = format!("{}-{module}", node.name);
        let config = Self::config(sandbox, node, module, settings)?;
        let command = [&binaries.text("podveil-node"), "--config", &config];
        Process::start(sandbox, &node.namespace, &name, &command)
    }

    /// Writes a module's configuration and returns its path.
    ///
    /// # Errors
    /// If the run folder cannot be written.
    pub fn config(
        sandbox: &Sandbox,
        node: &NodeNet,
        module: &str,
        settings: &NodeSettings,
    ) -> anyhow::Result<String> {
        let folder = sandbox.folder();
        // Both modules of a node share its namespace, so only one can have the ports that users know.
        let base = if module == "proxy" { 15000 } else { 15400 };
        let mut redirect = settings.redirect.clone();
        redirect.insert("find".into(), "directory".into());
        redirect.insert("netns_dir".into(), "/run/netns".into());
        let bpf_dir = sandbox.mount_point(&format!("{}-bpf", node.name))?;
        redirect.insert("bpf_dir".into(), json!(bpf_dir));
        let config = json!({
            "node": node.name,
            "trust_domain": "cluster.local",
            "modules": [module],
            "xds_address": format!("{CONTROL_PLANE_ADDRESS}:15010"),
            "ca_address": format!("{CONTROL_PLANE_ADDRESS}:15012"),
            "token": folder.join(format!("tokens/node.{}", node.name)),
            "bootstrap_bundle": folder.join("ca/bundle.pem"),
            "state_dir": folder.join(format!("{}-{module}", node.name)),
            "cgroup": sandbox.cgroup(&node.name)?,
            "zds_socket": folder.join(format!("{}/zds.sock", node.name)),
            "listeners_socket": folder.join(format!("{}-listeners/listeners.sock", node.name)),
            "admin_address": format!("127.0.0.1:{base}"),
            "metrics_address": format!("127.0.0.1:{}", base + 20),
            "readiness_address": format!("127.0.0.1:{}", base + 21),
            "readiness_socket": (settings.instance.as_ref())
                .map(|instance| folder.join(format!("{}-{module}-{instance}.sock", node.name))),
            "take_over": settings.instance.is_some(),
            "log": "json",
            "proxy": settings.proxy,
            "redirect": redirect,
        });
        write_config(folder, &format!("{}-{module}", node.name), &config)
    }
}

fn write_config(folder: &Path, name: &str, config: &serde_json::Value) -> anyhow::Result<String> {
    let path = folder.join(format!("{name}.yaml"));
    fs::write(&path, serde_json::to_string_pretty(config)?)
        .with_context(|| format!("writing {}", path.display()))?;
    Ok(path.to_string_lossy().into_owned())
}

/// Waits for a state of a program.
fn wait(process: &mut Process, what: &str, done: impl Fn() -> bool) -> anyhow::Result<()> {
    let deadline = Instant::now() + START_BOUND;
    while !done() {
        process.check_running()?;
        if Instant::now() > deadline {
            bail!(
                "{}: waited {START_BOUND:?} until {what}; its log is {}",
                process.name(),
                process.log().display()
            );
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
