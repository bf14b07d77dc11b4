// SPDX-License-Identifier: Apache-2.0
//! The cgroup2 folder whose sockets are the proxy's.
//!
//! nftables compares a socket with a folder by the cgroup its creator was in when it made the socket; a socket that is
//! accepted takes the folder of its listener. Every program that makes sockets for pods therefore joins the folder
//! before it makes the first one. On a machine with cgroup v1 the folder lies in the cgroup2 mount beside it
//! (`/sys/fs/cgroup/unified`), which has no controllers and does not change how the process is limited.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Where nft looks for the paths in `socket cgroupv2`.
const NFT_ROOT: &str = "/sys/fs/cgroup";

/// A cgroup2 folder as nft wants it told: `socket cgroupv2 level <level> "<path>"`.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct CgroupPath {
    /// Depth below the root of the cgroup2 hierarchy.
    pub level: u32,
    /// Relative to `/sys/fs/cgroup`.
    pub path: String,
}

impl CgroupPath {
    pub fn absolute(&self) -> PathBuf {
        Path::new(NFT_ROOT).join(&self.path)
    }
}

#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("{name:?} is not a folder name: letters, digits, '-', '_' and '.', at most 64")]
    BadName { name: String },
    #[error("cannot use cgroup {path}")]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("no cgroup2 file system is mounted at or below /sys/fs/cgroup")]
    NoMount,
}

/// Puts the whole process into the folder `name`, making it if need be.
/// # Errors
/// See [`CgroupError`].
pub fn join(name: &str) -> Result<CgroupPath, CgroupError> {
    let cgroup = locate(name)?;
    let path = cgroup.absolute();
    match fs::create_dir(&path) {
        Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
            return Err(CgroupError::Io { path, source });
        }
        _ => {}
    }
    enter(&path)?;
    Ok(cgroup)
}

/// The folder that [`join`] would use, without touching it.
/// # Errors
/// See [`CgroupError`].
pub fn locate(name: &str) -> Result<CgroupPath, CgroupError> {
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > 64 || name.starts_with('.') || !name.chars().all(legal) {
        return Err(CgroupError::BadName {
            name: name.to_owned(),
        });
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(|source| CgroupError::Io {
        path: "/proc/self/mountinfo".into(),
        source,
    })?;
    let mount = cgroup2_mount(&mounts).ok_or(CgroupError::NoMount)?;
    let path = match mount {
        "" => name.to_owned(),
        mount => format!("{mount}/{name}"),
    };
    Ok(CgroupPath { level: 1, path })
}

/// Moves the process back to the root of the hierarchy and removes the folder, unless other processes are in it.
/// # Errors
/// See [`CgroupError`].
pub fn leave(cgroup: &CgroupPath) -> Result<(), CgroupError> {
    let path = cgroup.absolute();
    if !path.exists() {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        enter(parent)?;
    }
    match fs::remove_dir(&path) {
        Err(source)
            if source.kind() != io::ErrorKind::ResourceBusy
                && source.kind() != io::ErrorKind::NotFound =>
        {
            Err(CgroupError::Io { path, source })
        }
        _ => Ok(()),
    }
}

fn enter(folder: &Path) -> Result<(), CgroupError> {
    let path = folder.join("cgroup.procs");
    fs::write(&path, std::process::id().to_string())
        .map_err(|source| CgroupError::Io { path, source })
}

/// Path of the first cgroup2 mount relative to [`NFT_ROOT`]; fields 5 and up of `mountinfo` (proc(5)).
fn cgroup2_mount(mountinfo: &str) -> Option<&str> {
    mountinfo.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        if right.split(' ').next()? != "cgroup2" {
            return None;
        }
        let relative = left.split(' ').nth(4)?.strip_prefix(NFT_ROOT)?;
        match relative.strip_prefix('/') {
            Some(relative) => Some(relative),
            None => relative.is_empty().then_some(""),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_is_found_on_either_kind_of_machine() {
        for (line, found) in [
            (
                "35 24 0:30 / /sys/fs/cgroup/unified rw,nosuid - cgroup2 cgroup2 rw",
                Some("unified"),
            ),
            (
                "35 24 0:30 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw",
                Some(""),
            ),
            ("35 24 0:30 / /sys/fs/cgroup2 rw - cgroup2 cgroup2 rw", None),
            ("35 24 0:30 / /sys/fs/cgroup rw - cgroup cgroup rw", None),
        ] {
            assert_eq!(cgroup2_mount(line), found, "{line}");
        }
    }

    #[test]
    fn a_name_that_leaves_the_folder_is_refused() {
        for name in ["", "..", "a/b", ".hidden", "a b", "a\"b"] {
            assert!(
                matches!(locate(name), Err(CgroupError::BadName { .. })),
                "{name}"
            );
        }
    }
}
