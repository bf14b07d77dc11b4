// SPDX-License-Identifier: Apache-2.0
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Descriptors for two sockets a connection and the tunnels of a busy node, or for several connections of each of thousands
/// of nodes. The kernel's own bound (`fs.nr_open`) is this by default.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_never_falls() {
        let (before, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        assert!(raise_descriptor_limit() >= before);
        let (after, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        assert!(after >= before);
    }
}
