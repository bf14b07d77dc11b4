// SPDX-License-Identifier: Apache-2.0
//! Other processes, each with its pidfd as the proof of which one, and descriptors that they hold.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::fstat;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};

/// A process held by its pidfd: whatever becomes of its number, this names no other one.
#[derive(Debug)]
pub struct Process {
    pid: i32,
    pidfd: OwnedFd,
}

impl Process {
    /// The process that has the number `pid` now.
    /// # Errors
    /// As `pidfd_open(2)` (Linux 5.3): `ESRCH` if there is none.
    pub fn open(pid: i32) -> io::Result<Self> {
        let pidfd = kernel::pidfd_open(pid)?;
        Ok(Self { pid, pidfd })
    }

    pub fn pid(&self) -> i32 {
        self.pid
    }

    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// False once it has ended. As long as it is true, what `/proc/<pid>` says is about this process.
    pub fn is_alive(&self) -> bool {
        is_running(self.pidfd.as_fd())
    }

    /// Waits for its end, on the current runtime.
    /// # Errors
    /// When the runtime takes no more descriptors.
    pub async fn ended(&self) -> io::Result<()> {
        let watched = kernel::watch(self.pidfd.try_clone()?)?;
        // A pidfd that is readable once is so for ever.
        watched.readable().await.map(drop)
    }
}

/// A pidfd becomes readable when its process ends.
pub(crate) fn is_running(pidfd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(pidfd, PollFlags::POLLIN)];
    matches!(poll(&mut fds, PollTimeout::ZERO), Ok(0))
}

/// When process `pid` began, in clock ticks since boot: with the number itself it names one process of this boot.
/// # Errors
/// As reading `/proc/<pid>/stat`; `InvalidData` if that is not as proc(5) has it.
pub fn start_time(pid: i32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field is a name in brackets that may hold anything; the 20th after it is the start time.
    let after_name = stat.rsplit_once(')').map(|(_, after)| after);
    after_name
        .and_then(|after| after.split_ascii_whitespace().nth(19)?.parse().ok())
        .ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// What process `pid` calls itself: at most 15 bytes, and not to be trusted where it runs in a pod.
/// # Errors
/// As reading `/proc/<pid>/comm`.
pub fn name(pid: i32) -> io::Result<String> {
    let name = fs::read(format!("/proc/{pid}/comm"))?;
    Ok(String::from_utf8_lossy(name.trim_ascii_end()).into_owned())
}

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
    #![expect(
        unsafe_code,
        reason = "pidfd_open and pidfd_getfd have no safe wrapper, and tokio asks for a promise about a descriptor"
    )]

    use nix::libc;
    use std::io;
    use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
    use tokio::io::unix::AsyncFd;

    pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
        // SAFETY: the call takes numbers only and touches no memory of ours.
        let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        if pidfd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just opened this descriptor for this call alone; descriptors fit an int.
        Ok(unsafe { OwnedFd::from_raw_fd(pidfd as RawFd) })
    }

    /// Registers a pidfd with the runtime.
    pub fn watch(pidfd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
        // SAFETY: an `OwnedFd` always names the same descriptor, and is never taken out of the `AsyncFd`.
        unsafe { AsyncFd::register(pidfd) }.map_err(Into::into)
    }

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

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[tokio::test]
    async fn the_end_of_a_process_is_seen() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::open(child.id() as i32).unwrap();
        assert!(process.is_alive());
        assert!(start_time(process.pid()).unwrap() > 0);
        child.kill().unwrap();
        process.ended().await.unwrap();
        assert!(!process.is_alive());
        child.wait().unwrap();
        assert!(Process::open(process.pid()).is_err());
        assert!(start_time(process.pid()).is_err());
    }
}
