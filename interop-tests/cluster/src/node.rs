// SPDX-License-Identifier: Apache-2.0
use crate::machine::{Machine, words};
use crate::tools::{self, Tool};
use crate::{Program, image, server::text};
use anyhow::Context;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use podveil_sim::eventually;
use serde_json::{Value, json};
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

const START: Duration = Duration::from_secs(30);
const SOCKET: &str = "/run/containerd/containerd.sock";
const CLUSTER_DNS: [&str; 2] = ["10.96.0.10", "fd00:10:96::a"];
pub(crate) const POD_RANGES: &str = "10.244.0.0/16,fd00:10:244::/48";

/// A node of the cluster with its programs.
#[derive(Debug)]
pub struct Node {
    /// Field order is drop order: the machine last.
    pub kubelet: Option<Program>,
    pub kube_proxy: Option<Program>,
    /// Replaced while others look at the node: tests of a running cluster have only a shared reference to it.
    pub containerd: Mutex<Option<Program>>,
    pub machine: Machine,
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
    index: u8,
    cgroup: String,
    folder: PathBuf,
}

impl Node {
    /// `index` is 1 or 2. The machine stands, and its network; no program runs yet.
    pub(crate) fn new(machine: Machine, folder: &Path, cluster: u8, index: u8) -> Self {
        Self {
            kubelet: None,
            kube_proxy: None,
            containerd: Mutex::new(None),
            v4: Ipv4Addr::new(172, 29, cluster, 10 + index),
            v6: format!("fd00:29:{cluster}::1{index}")
                .parse()
                .expect("numbers make an address"),
            index,
            cgroup: format!("bed{cluster}-{}", machine.name),
            folder: folder.to_owned(),
            machine,
        }
    }

    pub fn name(&self) -> &str {
        &self.machine.name
    }

    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }

    /// The Node object as it stands before its kubelet comes: with its ranges of pod addresses.
    pub(crate) fn object(&self) -> Value {
        let [v4, v6] = self.pod_ranges();
        json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": self.name()},
            "spec": {"podCIDR": v4, "podCIDRs": [v4, v6]},
        })
    }

    fn pod_ranges(&self) -> [String; 2] {
        [
            format!("10.244.{}.0/22", 4 * self.index),
            format!("fd00:10:244:{}::/64", self.index),
        ]
    }

    /// Starts containerd with pod networking and takes the images in.
    pub(crate) fn start_runtime(&self, images: &[PathBuf]) -> anyhow::Result<()> {
        for plugin in [
            Tool::CniHostLocal,
            Tool::CniLoopback,
            Tool::CniPortmap,
            Tool::CniPtp,
        ] {
            let plugin = text(&tools::path(plugin)?);
            self.machine.run(&["cp", &plugin, "/opt/cni/bin/"])?;
        }
        let network = self.write("cni", &self.cni().to_string())?;
        self.machine
            .run(&["cp", &network, "/etc/cni/net.d/10-podveil.conflist"])?;
        self.write("containerd", &containerd_config())?;
        self.start_containerd()?;
        images
            .iter()
            .try_for_each(|archive| self.import_image(archive))
    }

    /// Kills containerd without warning and starts it again; ready when it returns.
    ///
    /// # Errors
    /// If it does not run before, or does not become ready.
    pub fn restart_containerd(&self) -> anyhow::Result<()> {
        let old = self.runtime().as_ref().map(Program::pid);
        let group = old.context("containerd does not run")?.try_into()?;
        // By the call itself: the program `kill` of Debian 12 takes a group -1234 for -1, which is everybody.
        killpg(Pid::from_raw(group), Signal::SIGKILL)?;
        self.start_containerd()
    }

    /// Starts containerd after its end; ready when it returns.
    ///
    /// # Errors
    /// If it does not become ready.
    pub fn start_containerd(&self) -> anyhow::Result<()> {
        let containerd = tools::path(Tool::Containerd)?;
        let shim = tools::path(Tool::ContainerdShim)?;
        let own = shim.parent().map(text).unwrap_or_default();
        let config = format!("--config={}", self.file("containerd"));
        let mut containerd = self.machine.start_program(
            "containerd",
            &[search_path(&format!("{own}:"))],
            &words(&["", &text(&containerd), &config]),
        )?;
        let ctr = text(&tools::path(Tool::Ctr)?);
        eventually(START, "containerd answers", || {
            containerd.check_running()?;
            self.machine.run(&[&ctr, "--connect-timeout=1s", "version"])
        })?;
        *self.runtime() = Some(containerd);
        Ok(())
    }

    fn runtime(&self) -> MutexGuard<'_, Option<Program>> {
        self.containerd
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a docker or OCI archive into containerd, for pods.
    ///
    /// # Errors
    /// If it is no such archive.
    pub fn import_image(&self, archive: &Path) -> anyhow::Result<()> {
        let ctr = text(&tools::path(Tool::Ctr)?);
        self.machine
            .run(&[
                &ctr,
                "--namespace=k8s.io",
                "images",
                "import",
                "--local",
                &text(archive),
            ])
            .map(drop)
    }

    /// Gives an image that is there a second name.
    ///
    /// # Errors
    /// If there is no such image.
    pub fn tag_image(&self, name: &str, other: &str) -> anyhow::Result<()> {
        let ctr = text(&tools::path(Tool::Ctr)?);
        self.machine
            .run(&[
                &ctr,
                "--namespace=k8s.io",
                "images",
                "tag",
                "--force",
                name,
                other,
            ])
            .map(drop)
    }

    /// Gives the kubelet a pod from a file, or takes it away again (`None`).
    ///
    /// # Errors
    /// If the file cannot be written or removed.
    pub fn set_static_pod(&self, name: &str, manifest: Option<&str>) -> anyhow::Result<()> {
        let file = self.manifests().join(format!("{name}.yaml"));
        match manifest {
            // In one step, since the kubelet watches.
            Some(manifest) => {
                let unfinished = self.folder.join(format!("{}-{name}.yaml", self.name()));
                fs::write(&unfinished, manifest)?;
                fs::rename(unfinished, file)?;
            }
            None => fs::remove_file(file)?,
        }
        Ok(())
    }

    /// Where the kubelet finds pods that the API server does not know of.
    fn manifests(&self) -> PathBuf {
        self.folder.join(format!("{}-manifests", self.name()))
    }

    pub(crate) fn start_kubernetes(&mut self) -> anyhow::Result<()> {
        self.make_cgroups()?;
        fs::create_dir_all(self.manifests())?;
        self.write("kubelet", &self.kubelet_config().to_string())?;
        self.start_kubelet()?;
        self.start_kube_proxy()
    }

    pub(crate) fn start_kube_proxy(&mut self) -> anyhow::Result<()> {
        let kubeconfig = self.folder.join("kube-proxy.kubeconfig");
        self.kube_proxy = Some(self.machine.start_program(
            "kube-proxy",
            &[search_path("")],
            &[
                text(&tools::path(Tool::KubeProxy)?),
                format!("--kubeconfig={}", kubeconfig.display()),
                format!("--hostname-override={}", self.name()),
                "--proxy-mode=nftables".to_owned(),
                format!("--cluster-cidr={POD_RANGES}"),
                // The table of connections is the kernel's, which is not this node's alone.
                "--conntrack-max-per-core=0".to_owned(),
            ],
        )?);
        Ok(())
    }

    /// Starts the kubelet, also again after a test has killed it.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start_kubelet(&mut self) -> anyhow::Result<()> {
        let name = self.name().to_owned();
        let kubeconfig = self.folder.join(format!("{name}.kubeconfig"));
        self.kubelet = Some(self.machine.start_program(
            "kubelet",
            &[search_path("")],
            &[
                text(&tools::path(Tool::Kubelet)?),
                format!("--kubeconfig={}", kubeconfig.display()),
                format!("--config={}", self.file("kubelet")),
                format!("--hostname-override={name}"),
                format!("--node-ip={},{}", self.v4, self.v6),
                "--root-dir=/var/lib/kubelet".to_owned(),
                "--cert-dir=/var/lib/kubelet/pki".to_owned(),
            ],
        )?);
        Ok(())
    }

    fn file(&self, name: &str) -> String {
        text(&self.folder.join(format!("{}-{name}.conf", self.name())))
    }

    fn write(&self, name: &str, content: &str) -> anyhow::Result<String> {
        let path = self.file(name);
        fs::write(&path, content)?;
        Ok(path)
    }

    /// Two kubelets with one root of cgroups would take each other's pods for orphans and kill them.
    fn make_cgroups(&self) -> anyhow::Result<()> {
        let root = Path::new("/sys/fs/cgroup");
        // Version 2 alone, or a folder of hierarchies.
        let hierarchies: Vec<PathBuf> = if root.join("cgroup.controllers").exists() {
            vec![root.to_owned()]
        } else {
            fs::read_dir(root)?
                .flatten()
                .map(|entry| entry.path())
                .filter(|path| path.join("cgroup.procs").exists() && !path.is_symlink())
                .collect()
        };
        for hierarchy in hierarchies {
            let folder = hierarchy.join(&self.cgroup);
            fs::create_dir_all(&folder)?;
            // A new folder of this hierarchy holds nothing until it is told which processors it has.
            for file in ["cpuset.cpus", "cpuset.mems"] {
                if hierarchy.join(file).exists() && !hierarchy.join("cgroup.controllers").exists() {
                    fs::write(folder.join(file), fs::read(hierarchy.join(file))?)?;
                }
            }
        }
        Ok(())
    }

    /// The configuration that its CNI agent writes, as it were.
    pub fn cni(&self) -> Value {
        let [v4, v6] = self.pod_ranges();
        json!({
            "cniVersion": "1.1.0",
            "name": "podveil",
            "plugins": [
                {
                    "type": "ptp",
                    "ipMasq": false,
                    "ipam": {
                        "type": "host-local",
                        "dataDir": "/run/cni-addresses",
                        "ranges": [[{"subnet": v4}], [{"subnet": v6}]],
                        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
                    },
                },
                {"type": "portmap", "capabilities": {"portMappings": true}, "backend": "nftables"},
            ],
        })
    }

    fn kubelet_config(&self) -> Value {
        json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {
                "anonymous": {"enabled": false},
                "webhook": {"enabled": true},
                "x509": {"clientCAFile": self.folder.join("ca.crt")},
            },
            "authorization": {"mode": "Webhook"},
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": format!("/{}", self.cgroup),
            "failCgroupV1": false,
            "clusterDNS": [CLUSTER_DNS[0]],
            "clusterDomain": "cluster.local",
            "containerRuntimeEndpoint": format!("unix://{SOCKET}"),
            // Room for the machine's own work: these nodes are guests of it.
            "enforceNodeAllocatable": [],
            "evictionHard": {"memory.available": "0%"},
            "failSwapOn": false,
            "localStorageCapacityIsolation": false,
            "imageGCHighThresholdPercent": 100,
            "maxPods": 500,
            "staticPodPath": self.manifests(),
            "resolvConf": "/etc/resolv.conf",
            "volumePluginDir": "/var/lib/kubelet/volume-plugins",
            "nodeStatusUpdateFrequency": "5s",
            "registryPullQPS": 0,
            "eventRecordQPS": 50,
            "kubeAPIQPS": 100,
            "kubeAPIBurst": 200,
        })
    }
}

fn containerd_config() -> String {
    format!(
        r#"version = 3
root = "/var/lib/containerd"
state = "/run/containerd"

[grpc]
  address = "{SOCKET}"

[plugins.'io.containerd.cri.v1.images']
  snapshotter = "overlayfs"
  [plugins.'io.containerd.cri.v1.images'.pinned_images]
    sandbox = "{pause}"

[plugins.'io.containerd.cri.v1.runtime']
  # A machine that may not lower it could start nothing else.
  restrict_oom_score_adj = true
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = ["/opt/cni/bin"]
    conf_dir = "/etc/cni/net.d"
"#,
        pause = image::PAUSE_IMAGE
    )
}

/// `PATH` for a program of a node: `first`, then ours, then where Debian keeps what only root calls.
fn search_path(first: &str) -> String {
    let path = std::env::var("PATH").unwrap_or_default();
    format!("PATH={first}{path}:/usr/sbin:/sbin")
}
