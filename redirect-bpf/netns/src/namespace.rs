// SPDX-License-Identifier: Apache-2.0
use nix::fcntl::{OFlag, open};
use nix::sched::{CloneFlags, setns};
use nix::sys::stat::{Mode, fstat};
use std::fmt;
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// A network namespace, kept alive by the descriptor held here.
pub struct NetNs {
    fd: OwnedFd,
    id: NetNsId,
    cookie: OnceLock<u64>,
}

/// Device and inode of the namespace's file: equal exactly when two descriptors name the same live namespace. An inode
/// may be used again once its namespace is gone; [`NetNs::cookie`] is not.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct NetNsId {
    pub device: u64,
    pub inode: u64,
}

impl fmt::Display for NetNsId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "net:[{}]", self.inode)
    }
}

#[derive(Debug, thiserror::Error)]
pub enum NetNsError {
    #[error("cannot enter the network namespace (CAP_SYS_ADMIN is needed)")]
    Enter(#[source] io::Error),
    #[error("the descriptor is not a network namespace")]
    NotANetNs,
    #[error("cannot open network namespace {path}")]
    Open {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot examine the network namespace")]
    Stat(#[source] io::Error),
}

impl NetNs {
    /// # Errors
    /// [`NetNsError::Open`], or [`NetNsError::NotANetNs`] if something else lies at `path`.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, NetNsError> {
        let path = path.as_ref();
        let fd =
            open(path, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).map_err(|source| {
                NetNsError::Open {
                    path: path.to_owned(),
                    source: source.into(),
                }
            })?;
        Self::from_fd(fd)
    }

    /// Takes a descriptor that came from elsewhere, after asking the kernel what it is.
    /// # Errors
    /// [`NetNsError::NotANetNs`].
    pub fn from_fd(fd: OwnedFd) -> Result<Self, NetNsError> {
        if kernel::namespace_type(fd.as_fd()) != Some(CloneFlags::CLONE_NEWNET.bits()) {
            return Err(NetNsError::NotANetNs);
        }
        let stat = fstat(&fd).map_err(|error| NetNsError::Stat(error.into()))?;
        Ok(Self {
            fd,
            id: NetNsId {
                device: stat.st_dev,
                inode: stat.st_ino,
            },
            cookie: OnceLock::new(),
        })
    }

    /// The calling thread's own.
    /// # Errors
    /// [`NetNsError::Open`] where `/proc` is missing.
    pub fn current() -> Result<Self, NetNsError> {
        Self::open("/proc/thread-self/ns/net")
    }

    pub fn id(&self) -> NetNsId {
        self.id
    }

    /// The kernel's number for this namespace, never used twice between two boots.
    /// # Errors
    /// [`NetNsError::Enter`]; [`NetNsError::Stat`] before kernel 5.12.
    pub fn cookie(&self) -> Result<u64, NetNsError> {
        if let Some(cookie) = self.cookie.get() {
            return Ok(*cookie);
        }
        let cookie = self
            .run(|| {
                let socket =
                    socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::DGRAM, None)?;
                kernel::netns_cookie(socket.as_fd())
            })?
            .map_err(NetNsError::Stat)?;
        Ok(*self.cookie.get_or_init(|| cookie))
    }

    /// Runs `work` with the calling thread inside this namespace, then takes the thread back. For making sockets and
    /// reading `/proc/thread-self/net`: `work` must not block for long and cannot await.
    ///
    /// A thread that cannot return would do everybody's work in a pod, so the process ends there instead.
    /// # Errors
    /// [`NetNsError::Enter`]; `work` has then not run.
    pub fn run<T>(&self, work: impl FnOnce() -> T) -> Result<T, NetNsError> {
        struct Return(NetNs);
        impl Drop for Return {
            fn drop(&mut self) {
                if setns(&self.0, CloneFlags::CLONE_NEWNET).is_err() {
                    tracing::error!("a thread cannot leave a pod's network namespace, ending");
                    std::process::abort();
                }
            }
        }

        let home = Self::current()?;
        if home.id == self.id {
            return Ok(work());
        }
        setns(self, CloneFlags::CLONE_NEWNET).map_err(|error| NetNsError::Enter(error.into()))?;
        let home = Return(home);
        let result = work();
        mem::drop(home);
        Ok(result)
    }

    /// # Errors
    /// [`NetNsError::Stat`] when the process is out of descriptors.
    pub fn try_clone(&self) -> Result<Self, NetNsError> {
        let fd = self.fd.try_clone().map_err(NetNsError::Stat)?;
        Ok(Self {
            fd,
            id: self.id,
            cookie: self.cookie.clone(),
        })
    }
}

impl AsFd for NetNs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl fmt::Debug for NetNs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NetNs")
            .field("id", &self.id)
            .field("fd", &self.fd.as_raw_fd())
            .finish()
    }
}

mod kernel {
    #![expect(unsafe_code, reason = "two questions that no safe wrapper asks")]

    use nix::libc;
    use std::io;
    use std::mem;
    use std::os::fd::{AsRawFd, BorrowedFd};

    /// `NS_GET_NSTYPE`: the CLONE_NEW* flag of the namespace behind a descriptor, `None` if it is something else.
    pub fn namespace_type(fd: BorrowedFd<'_>) -> Option<libc::c_int> {
        const NS_GET_NSTYPE: libc::Ioctl = 0xb703;
        // SAFETY: the request takes no argument and writes no memory; `fd` is open for the length of the call.
        let kind = unsafe { libc::ioctl(fd.as_raw_fd(), NS_GET_NSTYPE) };
        (kind >= 0).then_some(kind)
    }

    pub fn netns_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
        let mut cookie = 0u64;
        let mut length = mem::size_of_val(&cookie) as libc::socklen_t;
        // SAFETY: `cookie` is `length` bytes long, both live through the call, and every bit pattern is a valid u64.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_NETNS_COOKIE,
                (&raw mut cookie).cast(),
                &raw mut length,
            )
        };
        match result {
            0 => Ok(cookie),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn the_current_namespace_is_itself() {
        let one = NetNs::current().unwrap();
        let two = NetNs::current().unwrap();
        assert_eq!(one.id(), two.id());
        assert_eq!(one.cookie().unwrap(), two.cookie().unwrap());
        assert_eq!(one.run(|| 7).unwrap(), 7);
    }

    #[test]
    fn another_file_is_refused() {
        let file = File::open("/proc/self/status").unwrap();
        assert!(matches!(
            NetNs::from_fd(file.into()),
            Err(NetNsError::NotANetNs)
        ));
        assert!(matches!(
            NetNs::open("/proc/self/ns/uts"),
            Err(NetNsError::NotANetNs)
        ));
    }

    #[test]
    #[ignore = "netns"]
    fn a_thread_comes_back_even_from_a_panic() {
        std::thread::spawn(|| {
            let home = NetNs::current().unwrap();
            nix::sched::unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let other = NetNs::current().unwrap();
            setns(&home, CloneFlags::CLONE_NEWNET).unwrap();
            assert_ne!(home.id(), other.id());
            assert_ne!(home.cookie().unwrap(), other.cookie().unwrap());
            let inside = other.run(|| NetNs::current().unwrap().id()).unwrap();
            assert_eq!(inside, other.id());
            let panicked = std::panic::catch_unwind(|| other.run(|| panic!("in the pod")));
            assert!(panicked.is_err());
            assert_eq!(NetNs::current().unwrap().id(), home.id());
        })
        .join()
        .unwrap();
    }
}
