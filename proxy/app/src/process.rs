// SPDX-License-Identifier: Apache-2.0
//! What the process itself must be before it serves anyone.

use nix::sys::resource::{Resource, getrlimit};

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
}
