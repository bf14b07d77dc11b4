// SPDX-License-Identifier: Apache-2.0
//! Which sockets are the kubelet's.

use podveil_netns::pod_cgroup::pod_uid;
use podveil_netns::process;
use std::fs;
use std::sync::{Mutex, PoisonError};

/// What the program with the kubelet in it is called: alone, or together with the rest of a small distribution.
const NAMES: [&str; 4] = ["kubelet", "k3s-agent", "k3s-server", "kubelite"];

/// The node's kubelets: one, but for nodes that share a machine.
#[derive(Debug, Default)]
pub struct Kubelets {
    known: Mutex<Vec<Known>>,
}

/// A process by number and start time.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Known {
    pid: i32,
    start_ticks: u64,
}

impl Kubelets {
    /// Does a kubelet have a descriptor of the socket with this number? No, where that cannot be told.
    pub fn hold(&self, socket: u64) -> bool {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(Known::is_there);
        if known.is_empty() {
            *known = find();
            tracing::info!(kubelets = ?*known, "looked for the kubelet");
        }
        (known.iter()).any(|kubelet| {
            process::sockets(kubelet.pid).is_ok_and(|sockets| sockets.contains_key(&socket))
        })
    }
}

impl Known {
    fn is_there(&self) -> bool {
        process::start_time(self.pid).is_ok_and(|start| start == self.start_ticks)
    }
}

/// Every process of the right name outside of pods: what runs in one may call itself anything.
fn find() -> Vec<Known> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let pids = entries.flatten();
    pids.filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        let kubelet = NAMES.contains(&name.trim_end()) && pod_uid(&cgroup).is_none();
        let start_ticks = process::start_time(pid).ok()?;
        kubelet.then_some(Known { pid, start_ticks })
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::fstat;
    use std::net::TcpListener;

    #[test]
    fn only_the_kubelets_own_sockets_are_its() {
        let pid = std::process::id() as i32;
        let start_ticks = process::start_time(pid).unwrap();
        let kubelets = Kubelets {
            known: vec![Known { pid, start_ticks }].into(),
        };
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let inode = fstat(&socket).unwrap().st_ino;
        assert!(kubelets.hold(inode));
        drop(socket);
        assert!(!kubelets.hold(inode));
        assert!(!kubelets.hold(0));
    }

    #[test]
    fn a_kubelet_that_has_ended_is_forgotten() {
        let pid = std::process::id() as i32;
        let start_ticks = process::start_time(pid).unwrap();
        assert!(Known { pid, start_ticks }.is_there());
        let another = Known {
            pid,
            start_ticks: start_ticks + 1,
        };
        assert!(!another.is_there());
    }
}
