// SPDX-License-Identifier: Apache-2.0
use crate::CniConfig;
use podveil_apply::BackEndChoice;
use podveil_identity::KubernetesName;
use podveil_netns::cgroup::Membership;
use std::path::PathBuf;
use std::time::Duration;

/// What the hosting program tells the module; its defaults and their reasons are in the program's configuration.
#[derive(Clone, Debug)]
pub struct RedirectConfig {
    pub node: KubernetesName,
    /// The controller, `host:port`.
    pub xds_address: String,
    /// All replicas of the controller by one name, `host:port`.
    pub reports_address: String,
    /// The cgroup that both node processes are in.
    pub cgroup: Membership,
    pub find: Find,
    pub cni: CniConfig,
    pub back_end: BackEndChoice,
    /// Where eBPF's maps and links are pinned: on a bpf file system, or where one can be mounted.
    pub bpf_dir: PathBuf,
    pub zds_socket: PathBuf,
    pub listeners_socket: PathBuf,
    /// How long new connections wait in the accept queues of a proxy that is gone before they are reset.
    pub hold_bound: Duration,
    /// Length of each accept queue.
    pub backlog: u32,
    /// Connections that a released pod still has through the proxy are given this long.
    pub release_bound: Duration,
    /// Asked to stop, it goes on for so long while the proxy is connected.
    pub drain_bound: Duration,
}

impl RedirectConfig {
    /// Whoever has it serves the node.
    pub(crate) fn lease(&self) -> PathBuf {
        self.zds_socket.with_file_name("lease")
    }
}

/// How pods' network namespaces are found.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Find {
    /// A pod's is the file of its uid in here.
    Directory(PathBuf),
    /// A pod's is that of its oldest process in `/proc`; of the one that the container runtime names, if its socket is
    /// given.
    Processes { cri_socket: Option<PathBuf> },
}
