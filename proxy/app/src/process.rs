// SPDX-License-Identifier: Apache-2.0
//! What the process itself must be before it serves anyone.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Descriptors for two sockets a connection and the tunnels of a busy node. The kernel's own bound (`fs.nr_open`) is
/// this by default.
const WANTED_DESCRIPTORS: u64 = 1 << 20;

/// Raises the bound on descriptors as far as this process may. Returns the bound in force.
pub fn raise_descriptor_limit() -> u64 {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return 0;
    };
    // Above the hard bound only a privileged process may go; up to it everyone.
    for wanted in [WANTED_DESCRIPTORS.max(hard), hard] {
        if setrlimit(Resource::RLIMIT_NOFILE, wanted, wanted.max(hard)).is_ok() {
            return wanted;
        }
    }
    soft
}

/// How many connections one pod may have in each direction, so that it cannot take the node's last descriptor: two of
/// them for each connection, and half of all for everybody else.
pub fn connections_per_pod(configured: usize) -> usize {
    let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((0, 0));
    let bound = usize::try_from(soft / 4).unwrap_or(usize::MAX).max(1);
    if bound < configured {
        tracing::warn!(
            configured,
            bound,
            descriptors = soft,
            "max_connections_per_pod is lowered: raise the limit on descriptors for more"
        );
    }
    configured.min(bound)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_pod_never_gets_all_descriptors() {
        let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        assert_eq!(connections_per_pod(1), 1);
        assert!(connections_per_pod(usize::MAX) as u64 <= soft / 4);
    }

    #[test]
    fn the_bound_never_falls() {
        let (before, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        assert!(raise_descriptor_limit() >= before);
        let (after, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        assert!(after >= before);
    }
}
