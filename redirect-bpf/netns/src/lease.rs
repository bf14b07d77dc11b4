// SPDX-License-Identifier: Apache-2.0
//! Whose turn it is on this node: one process at a time, and the next one the moment it ends, however that ends.

use crate::seqpacket::private_directory;
use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

/// Between two attempts while another process has its turn. A lock that is waited for in the kernel cannot be given up.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Held until this is dropped or the process ends: a lock of the kernel's on a file (flock(2)).
#[derive(Debug)]
pub struct Lease {
    _file: File,
}

impl Lease {
    /// The lease of the file at `path`, or `None` while another process has it. The folder is made with mode 0700 if
    /// missing, and refused if others may enter it.
    /// # Errors
    /// As `open(2)` and `flock(2)`; `PermissionDenied` if the folder is open to others.
    pub fn try_take(path: &Path) -> io::Result<Option<Self>> {
        let folder = path.parent().ok_or(ErrorKind::InvalidInput)?;
        loop {
            private_directory(folder)?;
            let file = File::options()
                .create(true)
                .truncate(false)
                .write(true)
                .open(path)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(error)) => return Err(error),
            }
            // Removed between the two, it is a file that nobody else will find.
            let locked = file.metadata()?;
            match fs::metadata(path) {
                Ok(found) if (found.dev(), found.ino()) == (locked.dev(), locked.ino()) => {
                    return Ok(Some(Self { _file: file }));
                }
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
    }

    /// As [`Lease::try_take`], when it can be had.
    /// CANCEL: it is not taken.
    /// # Errors
    /// As [`Lease::try_take`].
    pub async fn take(path: &Path) -> io::Result<Self> {
        loop {
            if let Some(lease) = Self::try_take(path)? {
                return Ok(lease);
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Removes the file; whoever waits for it goes on with another one.
    /// # Errors
    /// As `unlink(2)`; a file that is not there is none.
    pub fn remove(path: &Path) -> io::Result<()> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_has_it_at_a_time_and_the_next_one_when_it_is_let_go() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("own/lease");
        let first = Lease::take(&path).await.unwrap();
        assert!(Lease::try_take(&path).unwrap().is_none());
        let waits = tokio::spawn({
            let path = path.clone();
            async move { Lease::take(&path).await.unwrap() }
        });
        drop(first);
        let second = waits.await.unwrap();
        assert!(Lease::try_take(&path).unwrap().is_none());
        drop(second);
    }

    #[test]
    fn a_removed_file_is_nobodys_turn() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("own/lease");
        let before = Lease::try_take(&path).unwrap().unwrap();
        Lease::remove(&path).unwrap();
        Lease::remove(&path).unwrap();
        let after = Lease::try_take(&path).unwrap().unwrap();
        assert!(Lease::try_take(&path).unwrap().is_none());
        drop((before, after));
    }
}
