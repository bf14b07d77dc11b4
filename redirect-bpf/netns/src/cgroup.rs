// SPDX-License-Identifier: Apache-2.0
//! The cgroup2 folder whose sockets are the proxy's.
//!
//! nftables compares a socket with a folder by the cgroup its creator was in when it made the socket; a socket that is
//! accepted takes the folder of its listener. Every program that makes sockets for pods is therefore in the folder
//! before it makes the first one. Which folder that is:
//!
//! - On a machine with cgroup v1, one of our own in the cgroup2 mount beside it (`/sys/fs/cgroup/unified`), which has no
//!   controllers and does not change how the process is limited.
//! - On a machine with cgroup v2 alone, the cgroup of the pod that the programs' containers share. A folder of our own
//!   would take them out of the limits on memory and CPU that their pod has, and systemd mounts the hierarchy so that a
//!   container cannot leave its own part of it.
//! - Outside of a pod, one of our own on either kind.

use crate::pod_cgroup::pod_folder;
use nix::sched::{CloneFlags, setns};
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
    #[error(
        "the host's cgroup namespace cannot be entered (hostPID, CAP_SYS_ADMIN and CAP_SYS_PTRACE are needed)"
    )]
    HostNamespace(#[source] io::Error),
    #[error("cannot use cgroup {}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("no cgroup2 file system is mounted at or below /sys/fs/cgroup")]
    NoMount,
    #[error("{} is not to be seen: the host's /sys/fs/cgroup must be mounted here", path.display())]
    NotMounted { path: PathBuf },
    #[error("this process is in cgroup {cgroup:?}, which is no pod's")]
    NotInAPod { cgroup: String },
}

/// Which folder the node's programs share.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Membership {
    /// One of our own, of this name, directly below the mount.
    Folder(String),
    /// That of the pod that this process runs in.
    Pod,
}

impl Membership {
    /// `configured` if there is a name; else what suits the machine, with a folder called `fallback` where it is to be one
    /// of our own.
    /// # Errors
    /// See [`CgroupError`].
    pub fn choose(configured: Option<&str>, fallback: &str) -> Result<Self, CgroupError> {
        let (mounts, own) = (read("/proc/self/mountinfo")?, own_line()?);
        let seen = (&*mounts, &*own, in_initial_namespace()?);
        Ok(Self::suited(configured, fallback, seen))
    }

    /// `seen`: `/proc/self/mountinfo`, the line of cgroup v2 in `/proc/self/cgroup`, and whether that is as the host has it.
    fn suited(configured: Option<&str>, fallback: &str, seen: (&str, &str, bool)) -> Self {
        let (mounts, own, initial) = seen;
        let unified = cgroup2_mount(mounts) == Some("");
        // In a namespace of its own a container does not see where it is.
        let in_pod = pod_folder(own).is_some() || !initial;
        match configured {
            Some(name) => Self::Folder(name.to_owned()),
            None if unified && in_pod => Self::Pod,
            None => Self::Folder(fallback.to_owned()),
        }
    }

    /// Puts the whole process into the folder, if it is not there by itself.
    /// # Errors
    /// See [`CgroupError`].
    pub fn join(&self) -> Result<(), CgroupError> {
        match self {
            Self::Folder(name) => join(name).map(drop),
            Self::Pod => Ok(()),
        }
    }

    /// The folder as nft wants it told. For a pod's the process must have entered the host's cgroup namespace, or its path
    /// is not to be seen.
    /// # Errors
    /// See [`CgroupError`].
    pub fn locate(&self) -> Result<CgroupPath, CgroupError> {
        match self {
            Self::Folder(name) => locate(name),
            Self::Pod => {
                let line = own_line()?;
                let path = pod_folder(&line).ok_or_else(|| CgroupError::NotInAPod {
                    cgroup: line.trim().to_owned(),
                })?;
                let cgroup = CgroupPath {
                    level: path.split('/').count().try_into().unwrap_or(u32::MAX),
                    path: path.to_owned(),
                };
                match cgroup.absolute().is_dir() {
                    true => Ok(cgroup),
                    false => Err(CgroupError::NotMounted {
                        path: cgroup.absolute(),
                    }),
                }
            }
        }
    }

    /// Is process `pid` in the folder? Its `/proc` must be the one that this process sees.
    /// # Errors
    /// When one of the two cannot be told.
    pub fn contains(&self, pid: i32) -> Result<bool, CgroupError> {
        let lines = read(&format!("/proc/{pid}/cgroup"))?;
        let line = lines.lines().find(|line| line.starts_with("0::"));
        Ok(match self {
            Self::Folder(name) => line == Some(&*format!("0::/{name}")),
            Self::Pod => {
                let own = own_line()?;
                let folder = pod_folder(&own);
                folder.is_some() && line.and_then(pod_folder) == folder
            }
        })
    }

    /// Undoes [`Membership::join`], and removes the folder unless other processes are in it.
    /// # Errors
    /// See [`CgroupError`].
    pub fn leave(&self) -> Result<(), CgroupError> {
        match self {
            Self::Folder(_) => leave(&self.locate()?),
            Self::Pod => Ok(()),
        }
    }
}

/// Leaves a container's own cgroup namespace for the host's, on a machine with cgroup v2 alone: paths and levels are told
/// as the calling thread's namespace has them, so this comes before any other thread. Does nothing elsewhere.
/// # Errors
/// [`CgroupError::HostNamespace`] without `hostPID`, CAP_SYS_ADMIN and CAP_SYS_PTRACE.
pub fn enter_host_namespace() -> Result<(), CgroupError> {
    let unified = cgroup2_mount(&read("/proc/self/mountinfo")?) == Some("");
    if !unified || in_initial_namespace()? {
        return Ok(());
    }
    let host = fs::File::open("/proc/1/ns/cgroup").map_err(CgroupError::HostNamespace)?;
    setns(host, CloneFlags::CLONE_NEWCGROUP)
        .map_err(|error| CgroupError::HostNamespace(error.into()))
}

/// The line of cgroup2 in this process's `/proc/self/cgroup`.
fn own_line() -> Result<String, CgroupError> {
    let lines = read("/proc/self/cgroup")?;
    let line = lines.lines().find(|line| line.starts_with("0::"));
    Ok(line.unwrap_or("0::/").to_owned())
}

/// The namespace that the machine booted with has a number of its own in every kernel (`PROC_CGROUP_INIT_INO`).
fn in_initial_namespace() -> Result<bool, CgroupError> {
    let path = "/proc/self/ns/cgroup";
    match fs::read_link(path) {
        Ok(link) => Ok(link.as_os_str() == "cgroup:[4026531835]"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(source) => Err(CgroupError::Io {
            path: path.into(),
            source,
        }),
    }
}

fn read(path: &str) -> Result<String, CgroupError> {
    fs::read_to_string(path).map_err(|source| CgroupError::Io {
        path: path.into(),
        source,
    })
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
    let mounts = read("/proc/self/mountinfo")?;
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
    // The writer itself, whatever number the kernel knows it by in this PID namespace.
    fs::write(&path, "0").map_err(|source| CgroupError::Io { path, source })
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
    fn the_pods_own_cgroup_serves_only_where_there_is_no_other_hierarchy() {
        let unified = "35 24 0:30 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw";
        // A node that is a container: it sees its own part as the whole.
        let nested = "612 590 0:30 /docker/9d1d /sys/fs/cgroup rw - cgroup2 cgroup rw";
        let both = "35 24 0:30 / /sys/fs/cgroup/unified rw,nosuid - cgroup2 cgroup2 rw";
        let pod = "0::/kubepods/besteffort/pod7c7a6d9e-3f0b-4a39-9b1c-2f6f0c8d51aa/9d1d";
        let static_pod =
            "0::/kubepods.slice/kubepods-pod3f0b4a399b1c2f6f0c8d51aa7c7a6d9e.slice/x.scope";
        let service = "0::/system.slice/podveil.service";
        let folder = |name: &str| Membership::Folder(name.to_owned());
        for (configured, mounts, own, initial, suited) in [
            (None, unified, pod, true, Membership::Pod),
            (None, unified, static_pod, true, Membership::Pod),
            (None, nested, pod, false, Membership::Pod),
            (None, unified, "0::/", false, Membership::Pod),
            (None, unified, service, true, folder("fallback")),
            (None, both, "0::/", true, folder("fallback")),
            (None, both, pod, true, folder("fallback")),
            (Some("own"), unified, pod, true, folder("own")),
        ] {
            let found = Membership::suited(configured, "fallback", (mounts, own, initial));
            assert_eq!(found, suited, "{mounts} {own} {initial}");
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
