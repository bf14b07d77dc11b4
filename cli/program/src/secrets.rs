// SPDX-License-Identifier: Apache-2.0

/// Keeps this process's memory, and the keys in it, out of core files and away from debuggers of the same user. The
/// limit on core files would not do: it does not hold for dumps that go to a pipe.
///
/// For each program's start. A kernel that refuses is told of and no reason not to start.
pub fn forbid_core_dumps() {
    if let Err(error) = nix::sys::prctl::set_dumpable(false) {
        tracing::warn!(%error, "a crash may write keys into a core file");
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_process_is_not_dumpable_afterwards() {
        super::forbid_core_dumps();
        assert!(!nix::sys::prctl::get_dumpable().unwrap());
    }
}
