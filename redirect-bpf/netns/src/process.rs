// SPDX-License-Identifier: Apache-2.0
//! Descriptors of another process, with its pidfd as the proof of which one.

use nix::sys::stat::fstat;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};

/// The sockets of process `pid`, by the kernel's number: the same as in `/proc/net/tcp`.
/// # Errors
/// As reading `/proc/<pid>/fd`; the process must be visible from our PID namespace.
pub fn sockets(pid: i32) -> io::Result<BTreeMap<u64, RawFd>> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd"))?;
    Ok(entries
        .flatten()
        .filter_map(|entry| {
            let link = fs::read_link(entry.path()).ok()?;
            let inode = link
                .to_str()?
                .strip_prefix("socket:[")?
                .strip_suffix(']')?
                .parse()
                .ok()?;
            Some((inode, entry.file_name().to_str()?.parse().ok()?))
        })
        .collect())
}

/// Another descriptor of our own for the socket `inode`, which the process behind `pidfd` has as `fd`.
/// # Errors
/// As `pidfd_getfd(2)` (Linux 5.6, ptrace rights); `NotFound` if the number has been used again meanwhile.
pub fn duplicate(pidfd: BorrowedFd<'_>, fd: RawFd, inode: u64) -> io::Result<OwnedFd> {
    let copy = kernel::pidfd_getfd(pidfd, fd)?;
    if fstat(&copy)?.st_ino == inode {
        Ok(copy)
    } else {
        Err(io::ErrorKind::NotFound.into())
    }
}

mod kernel {
    #![expect(unsafe_code, reason = "pidfd_getfd has no safe wrapper")]

    use nix::libc;
    use std::io;
    use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

    pub fn pidfd_getfd(pidfd: BorrowedFd<'_>, fd: RawFd) -> io::Result<OwnedFd> {
        // SAFETY: the call takes numbers only and touches no memory of ours.
        let copy = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) };
        if copy < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just opened this descriptor for this call alone; descriptors fit an int.
        Ok(unsafe { OwnedFd::from_raw_fd(copy as RawFd) })
    }
}
