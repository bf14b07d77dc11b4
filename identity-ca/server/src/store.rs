// SPDX-License-Identifier: Apache-2.0
//! The data directory, mode 0700:
//!
//! - `authorities/<serial>.pem` and `.key`, 0600: one authority each, written before the journal names it, removed after
//!   the journal no longer does;
//! - `journal.json`, 0600: what holds, replaced in one step; the only file that is read to decide anything;
//! - `bundle.pem`, 0644: the roots, for programs' first contact; made from the journal;
//! - `lock`: held while a CA uses the directory.
//!
//! Every file is written beside its place, synced, and renamed, and the directory is synced: after a kill or a power cut
//! there is the old file or the new one.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// A journal names a handful of authorities.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// An open data directory; nobody else has it open.
#[derive(Debug)]
pub struct Store {
    folder: PathBuf,
    _lock: File,
}

/// Why the data directory cannot be used; for the operator.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("another process uses {}", path.display())]
    InUse { path: PathBuf },
    #[error("{operation} {}", path.display())]
    Io {
        operation: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} is open to others (mode {mode:o}), so it is not used", path.display())]
    OpenToOthers { path: PathBuf, mode: u32 },
    #[error("{} is larger than {MAX_FILE_BYTES} bytes", path.display())]
    TooLarge { path: PathBuf },
}

impl Store {
    /// Makes the directory where it is missing and locks it.
    ///
    /// # Errors
    /// [`StoreError::InUse`] while another CA runs on it.
    pub fn open(folder: &Path) -> Result<Self, StoreError> {
        for folder in [folder, &folder.join("authorities")] {
            make_folder(folder)?;
            // A volume comes with a mode of its own.
            fs::set_permissions(folder, fs::Permissions::from_mode(0o700))
                .map_err(failed("closing to others", folder))?;
        }
        let path = folder.join("lock");
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(failed("opening", &path))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self {
                folder: folder.to_owned(),
                _lock: lock,
            }),
            Err(TryLockError::WouldBlock) => Err(StoreError::InUse {
                path: folder.to_owned(),
            }),
            Err(TryLockError::Error(source)) => Err(failed("locking", &path)(source)),
        }
    }

    pub fn journal_path(&self) -> PathBuf {
        self.folder.join("journal.json")
    }

    /// `None` where there is no journal yet.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn read_journal(&self) -> Result<Option<String>, StoreError> {
        match self.read(&self.journal_path()) {
            Ok(text) => Ok(Some(text.as_str().to_owned())),
            Err(StoreError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    pub fn has_bundle(&self) -> bool {
        self.folder.join("bundle.pem").exists()
    }

    /// # Errors
    /// If it cannot be written; then the old one still stands.
    pub fn write_journal(&self, text: &str) -> Result<(), StoreError> {
        write(&self.journal_path(), text.as_bytes(), 0o600)
    }

    /// # Errors
    /// If it cannot be written; then the old one still stands.
    pub fn write_bundle(&self, pem: &str) -> Result<(), StoreError> {
        write(&self.folder.join("bundle.pem"), pem.as_bytes(), 0o644)
    }

    /// Certificate and key.
    ///
    /// # Errors
    /// If one of the files is missing or cannot be read.
    pub fn read_authority(&self, serial: &str) -> Result<(String, Zeroizing<String>), StoreError> {
        let certificate = self.read(&self.authority(serial, "pem"))?;
        Ok((
            certificate.as_str().to_owned(),
            self.read(&self.authority(serial, "key"))?,
        ))
    }

    /// # Errors
    /// If a file cannot be written; nothing refers to it then.
    pub fn write_authority(
        &self,
        serial: &str,
        certificate: &str,
        key: &str,
    ) -> Result<(), StoreError> {
        write(&self.authority(serial, "key"), key.as_bytes(), 0o600)?;
        write(
            &self.authority(serial, "pem"),
            certificate.as_bytes(),
            0o600,
        )
    }

    /// Removes every authority but these: what a crash left before the journal named it, or after it no longer did.
    ///
    /// # Errors
    /// If the directory cannot be read or a file not removed.
    pub fn keep_only(&self, serials: &[String]) -> Result<(), StoreError> {
        let folder = self.folder.join("authorities");
        for entry in fs::read_dir(&folder).map_err(failed("listing", &folder))? {
            let path = entry.map_err(failed("listing", &folder))?.path();
            let stem = path.file_stem().and_then(|stem| stem.to_str());
            if !stem.is_some_and(|stem| serials.iter().any(|serial| serial == stem)) {
                fs::remove_file(&path).map_err(failed("removing", &path))?;
            }
        }
        Ok(())
    }

    fn authority(&self, serial: &str, extension: &str) -> PathBuf {
        self.folder
            .join("authorities")
            .join(format!("{serial}.{extension}"))
    }

    fn read(&self, path: &Path) -> Result<Zeroizing<String>, StoreError> {
        let metadata = fs::metadata(path).map_err(failed("reading", path))?;
        if metadata.len() > MAX_FILE_BYTES {
            return Err(StoreError::TooLarge {
                path: path.to_owned(),
            });
        }
        refuse_bits(path, &metadata, 0o077)?;
        fs::read_to_string(path)
            .map(Zeroizing::new)
            .map_err(failed("reading", path))
    }
}

fn failed<'a>(
    operation: &'static str,
    path: &'a Path,
) -> impl Fn(io::Error) -> StoreError + use<'a> {
    move |source| StoreError::Io {
        operation,
        path: path.to_owned(),
        source,
    }
}

fn make_folder(path: &Path) -> Result<(), StoreError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(failed("making", path))
}

/// A directory for a socket, made with mode 0700. One that stands already keeps its mode: it may be shared.
///
/// # Errors
/// [`StoreError::OpenToOthers`] if others may put files there.
pub fn socket_folder(path: &Path) -> Result<(), StoreError> {
    make_folder(path)?;
    let metadata = fs::metadata(path).map_err(failed("reading", path))?;
    refuse_bits(path, &metadata, 0o022)
}

fn refuse_bits(path: &Path, metadata: &fs::Metadata, bits: u32) -> Result<(), StoreError> {
    let mode = metadata.permissions().mode() & 0o777;
    if mode & bits != 0 {
        return Err(StoreError::OpenToOthers {
            path: path.to_owned(),
            mode,
        });
    }
    Ok(())
}

fn write(path: &Path, content: &[u8], mode: u32) -> Result<(), StoreError> {
    let beside = path.with_added_extension("new");
    // What an interrupted write left has an unknown mode.
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(failed("removing", &beside)(error));
        }
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&beside)
        .map_err(failed("making", &beside))?;
    // The umask may have taken bits from the mode; only the public file has any to lose.
    file.set_permissions(fs::Permissions::from_mode(mode))
        .and_then(|()| file.write_all(content))
        .and_then(|()| file.sync_all())
        .map_err(failed("writing", &beside))?;
    fs::rename(&beside, path).map_err(failed("renaming", &beside))?;
    let folder = path.parent().unwrap_or(Path::new("."));
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(failed("syncing", folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn files_are_private_and_replaced_in_one_step() {
        let temporary = tempfile::tempdir().unwrap();
        let folder = temporary.path().join("data");
        let store = Store::open(&folder).unwrap();
        assert_eq!(store.read_journal().unwrap(), None);
        store.write_journal("one").unwrap();
        // As a kill in the middle of a write leaves it.
        fs::write(folder.join("journal.json.new"), "half").unwrap();
        store.write_journal("two").unwrap();
        store.write_bundle("roots").unwrap();
        store.write_authority("01", "certificate", "key").unwrap();
        assert_eq!(store.read_journal().unwrap().as_deref(), Some("two"));
        assert_eq!(mode(&folder), 0o700);
        assert_eq!(mode(&folder.join("journal.json")), 0o600);
        assert_eq!(mode(&folder.join("bundle.pem")), 0o644);
        assert_eq!(mode(&folder.join("authorities/01.key")), 0o600);
        let (certificate, key) = store.read_authority("01").unwrap();
        assert_eq!((certificate.as_str(), key.as_str()), ("certificate", "key"));
    }

    #[test]
    fn what_the_journal_does_not_name_is_removed() {
        let temporary = tempfile::tempdir().unwrap();
        let store = Store::open(temporary.path()).unwrap();
        store.write_authority("01", "certificate", "key").unwrap();
        store.write_authority("02", "certificate", "key").unwrap();
        store.keep_only(&["02".to_owned()]).unwrap();
        assert!(store.read_authority("01").is_err());
        assert!(store.read_authority("02").is_ok());
    }

    #[test]
    fn a_second_user_is_refused() {
        let temporary = tempfile::tempdir().unwrap();
        let first = Store::open(temporary.path()).unwrap();
        assert!(matches!(
            Store::open(temporary.path()),
            Err(StoreError::InUse { .. })
        ));
        drop(first);
        Store::open(temporary.path()).unwrap();
    }

    #[test]
    fn a_key_open_to_others_is_refused_and_the_directory_is_closed() {
        let temporary = tempfile::tempdir().unwrap();
        let folder = temporary.path().join("data");
        let store = Store::open(&folder).unwrap();
        store.write_authority("01", "certificate", "key").unwrap();
        let key = folder.join("authorities/01.key");
        fs::set_permissions(&key, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(
            store.read_authority("01"),
            Err(StoreError::OpenToOthers { mode: 0o640, .. })
        ));
        drop(store);
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
        Store::open(&folder).unwrap();
        assert_eq!(mode(&folder), 0o700);
    }

    #[test]
    fn a_socket_folder_that_others_may_write_to_is_refused() {
        let temporary = tempfile::tempdir().unwrap();
        let folder = temporary.path().join("run");
        socket_folder(&folder).unwrap();
        assert_eq!(mode(&folder), 0o700);
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(
            socket_folder(&folder),
            Err(StoreError::OpenToOthers { .. })
        ));
    }
}
