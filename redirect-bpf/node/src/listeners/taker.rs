// SPDX-License-Identifier: Apache-2.0
use podveil_netns::process;
use std::fmt;
use std::fs;

/// What the proxies of other meshes call themselves, and where they are.
const MESHES: [(&str, &str); 7] = [
    ("consul-dataplan", "Consul's sidecar"),
    ("envoy", "a sidecar such as Istio's container istio-proxy"),
    ("kuma-dp", "Kuma's sidecar"),
    ("linkerd-proxy", "Linkerd's sidecar linkerd-proxy"),
    ("linkerd2-proxy", "Linkerd's sidecar linkerd-proxy"),
    ("pilot-agent", "Istio's sidecar, container istio-proxy"),
    ("ztunnel", "the ztunnel of Istio or Cilium on this node"),
];

/// Who listens where capture must.
#[derive(Debug, Eq, PartialEq)]
pub struct Taker {
    pub pid: i32,
    pub name: String,
}

impl Taker {
    /// A process that has a descriptor of the socket with this number. Looks through the whole node: the proxy of another
    /// mesh may be outside of the pod.
    pub fn of(socket: u64) -> Option<Self> {
        let pids = fs::read_dir("/proc").ok()?.flatten();
        pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .find(|pid| process::sockets(*pid).is_ok_and(|sockets| sockets.contains_key(&socket)))
            .map(|pid| Self {
                pid,
                name: process::name(pid).unwrap_or_else(|_| "?".to_owned()),
            })
    }

    /// The other mesh that it belongs to, as far as its name tells.
    pub fn mesh(&self) -> Option<&'static str> {
        let known = MESHES.iter().find(|(name, _)| *name == self.name);
        known.map(|(_, mesh)| *mesh)
    }
}

impl fmt::Display for Taker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Whatever a pod's process calls itself.
        let name = self.name.escape_debug();
        write!(f, "{name} (process {})", self.pid)?;
        match self.mesh() {
            Some(mesh) => write!(f, ", {mesh}"),
            None => Ok(()),
        }
    }
}
