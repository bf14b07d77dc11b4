// SPDX-License-Identifier: Apache-2.0
use podveil_identity::KubernetesName;
use std::path::PathBuf;
use std::time::Duration;

/// What the hosting program tells the module; its defaults and their reasons are in the program's configuration.
#[derive(Clone, Debug)]
pub struct RedirectConfig {
    pub node: KubernetesName,
    /// The controller, `host:port`.
    pub xds_address: String,
    /// Name of the cgroup that both node processes join.
    pub cgroup: String,
    /// A pod's network namespace is the file of its uid in here.
    pub netns_dir: PathBuf,
    pub zds_socket: PathBuf,
    pub listeners_socket: PathBuf,
    /// How long new connections wait in the accept queues of a proxy that is gone before they are reset.
    pub hold_bound: Duration,
    /// Length of each accept queue.
    pub backlog: u32,
    /// Connections that a released pod still has through the proxy are given this long.
    pub release_bound: Duration,
}
