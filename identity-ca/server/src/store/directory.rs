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

use super::{Kept, Record};
use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// A journal names a handful of authorities.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// An open data directory; nobody else has it open.
#[derive(Debug)]
pub struct Directory {
    folder: PathBuf,
    _lock: File,
}

/// Why the data directory cannot be used; for the operator.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
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

impl Directory {
    /// Makes the directory where it is missing and locks it.
    ///
    /// # Errors
    /// [`DirectoryError::InUse`] while another CA runs on it.
    pub fn open(folder: &Path) -> Result<Self, DirectoryError> {
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
            Err(TryLockError::WouldBlock) => Err(DirectoryError::InUse {
                path: folder.to_owned(),
            }),
            Err(TryLockError::Error(source)) => Err(failed("locking", &path)(source)),
        }
    }

    /// What the journal says, and every authority that is kept; `None` where there is no journal yet.
    ///
    /// # Errors
    /// If something cannot be read.
    pub fn load(&self) -> Result<Option<Record>, DirectoryError> {
        let journal = match self.read(&self.journal_path()) {
            Ok(text) => text.as_str().to_owned(),
            Err(DirectoryError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let mut authorities = BTreeMap::new();
        for serial in self.serials()? {
            let kept = Kept {
                certificate: self
                    .read(&self.authority(&serial, "pem"))?
                    .as_str()
                    .to_owned(),
                key: self.read(&self.authority(&serial, "key"))?,
            };
            authorities.insert(serial, kept);
        }
        Ok(Some(Record {
            journal,
            authorities,
        }))
    }

    /// Authorities first, then the journal that names them: a kill in between leaves what was, and a file too many.
    ///
    /// # Errors
    /// If a file cannot be written; then what was kept before still stands.
    pub fn save(&self, record: &Record) -> Result<(), DirectoryError> {
        for (serial, kept) in &record.authorities {
            let certificate = self.authority(serial, "pem");
            if !certificate.exists() {
                write(&self.authority(serial, "key"), kept.key.as_bytes(), 0o600)?;
                write(&certificate, kept.certificate.as_bytes(), 0o600)?;
            }
        }
        write(&self.journal_path(), record.journal.as_bytes(), 0o600)
    }

    /// Brings what follows from the journal in line with it: `bundle.pem`, and no authority but these, whatever a kill
    /// has left.
    ///
    /// # Errors
    /// If a file cannot be written or removed.
    pub fn settle(&self, bundle: &str, serials: &[String]) -> Result<(), DirectoryError> {
        write(&self.folder.join("bundle.pem"), bundle.as_bytes(), 0o644)?;
        for path in self.authority_files()? {
            let stem = path.file_stem().and_then(|stem| stem.to_str());
            if !stem.is_some_and(|stem| serials.iter().any(|serial| serial == stem)) {
                fs::remove_file(&path).map_err(failed("removing", &path))?;
            }
        }
        Ok(())
    }

    /// Has a CA kept its record here before? The bundle is written after the first journal.
    pub fn was_used(&self) -> bool {
        self.bundle_path().exists()
    }

    pub fn bundle_path(&self) -> PathBuf {
        self.folder.join("bundle.pem")
    }

    pub fn journal_path(&self) -> PathBuf {
        self.folder.join("journal.json")
    }

    /// Of those that are kept whole: the certificate is written last.
    fn serials(&self) -> Result<Vec<String>, DirectoryError> {
        let mut serials = Vec::new();
        for path in self.authority_files()? {
            if path.extension().is_some_and(|extension| extension == "pem")
                && let Some(serial) = path.file_stem().and_then(|stem| stem.to_str())
            {
                serials.push(serial.to_owned());
            }
        }
        Ok(serials)
    }

    fn authority_files(&self) -> Result<Vec<PathBuf>, DirectoryError> {
        let folder = self.folder.join("authorities");
        let listed = fs::read_dir(&folder).map_err(failed("listing", &folder))?;
        listed
            .map(|entry| Ok(entry.map_err(failed("listing", &folder))?.path()))
            .collect()
    }

    fn authority(&self, serial: &str, extension: &str) -> PathBuf {
        self.folder
            .join("authorities")
            .join(format!("{serial}.{extension}"))
    }

    fn read(&self, path: &Path) -> Result<Zeroizing<String>, DirectoryError> {
        let metadata = fs::metadata(path).map_err(failed("reading", path))?;
        if metadata.len() > MAX_FILE_BYTES {
            return Err(DirectoryError::TooLarge {
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
) -> impl Fn(io::Error) -> DirectoryError + use<'a> {
    move |source| DirectoryError::Io {
        operation,
        path: path.to_owned(),
        source,
    }
}

fn make_folder(path: &Path) -> Result<(), DirectoryError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(failed("making", path))
}

/// A directory for a socket, made with mode 0700. One that stands already keeps its mode: it may be shared.
///
/// # Errors
/// [`DirectoryError::OpenToOthers`] if others may put files there.
pub fn socket_folder(path: &Path) -> Result<(), DirectoryError> {
    make_folder(path)?;
    let metadata = fs::metadata(path).map_err(failed("reading", path))?;
    refuse_bits(path, &metadata, 0o022)
}

fn refuse_bits(path: &Path, metadata: &fs::Metadata, bits: u32) -> Result<(), DirectoryError> {
    let mode = metadata.permissions().mode() & 0o777;
    if mode & bits != 0 {
        return Err(DirectoryError::OpenToOthers {
            path: path.to_owned(),
            mode,
        });
    }
    Ok(())
}

fn write(path: &Path, content: &[u8], mode: u32) -> Result<(), DirectoryError> {
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

    fn record(journal: &str, serials: &[&str]) -> Record {
        let kept = || Kept {
            certificate: "certificate".into(),
            key: Zeroizing::new("key".into()),
        };
        Record {
            journal: journal.into(),
            authorities: serials
                .iter()
                .map(|serial| ((*serial).to_owned(), kept()))
                .collect(),
        }
    }

    #[test]
    fn files_are_private_and_replaced_in_one_step() {
        let temporary = tempfile::tempdir().unwrap();
        let folder = temporary.path().join("data");
        let directory = Directory::open(&folder).unwrap();
        assert!(directory.load().unwrap().is_none() && !directory.was_used());
        directory.save(&record("one", &["01"])).unwrap();
        // As a kill in the middle of a write leaves it.
        fs::write(folder.join("journal.json.new"), "half").unwrap();
        directory.save(&record("two", &["01"])).unwrap();
        directory.settle("roots", &["01".to_owned()]).unwrap();
        assert_eq!(mode(&folder), 0o700);
        assert_eq!(mode(&folder.join("journal.json")), 0o600);
        assert_eq!(mode(&folder.join("bundle.pem")), 0o644);
        assert_eq!(mode(&folder.join("authorities/01.key")), 0o600);
        let read = directory.load().unwrap().unwrap();
        assert_eq!(read.journal, "two");
        assert_eq!(read.authorities["01"].certificate, "certificate");
        assert_eq!(read.authorities["01"].key.as_str(), "key");
        assert!(directory.was_used());
    }

    #[test]
    fn what_the_journal_does_not_name_is_removed() {
        let temporary = tempfile::tempdir().unwrap();
        let directory = Directory::open(temporary.path()).unwrap();
        directory.save(&record("one", &["01", "02"])).unwrap();
        directory.settle("roots", &["02".to_owned()]).unwrap();
        let read = directory.load().unwrap().unwrap();
        assert_eq!(read.authorities.keys().collect::<Vec<_>>(), ["02"]);
    }

    #[test]
    fn a_second_user_is_refused() {
        let temporary = tempfile::tempdir().unwrap();
        let first = Directory::open(temporary.path()).unwrap();
        assert!(matches!(
            Directory::open(temporary.path()),
            Err(DirectoryError::InUse { .. })
        ));
        drop(first);
        Directory::open(temporary.path()).unwrap();
    }

    #[test]
    fn a_key_open_to_others_is_refused_and_the_directory_is_closed() {
        let temporary = tempfile::tempdir().unwrap();
        let folder = temporary.path().join("data");
        let store = Directory::open(&folder).unwrap();
        store.save(&record("one", &["01"])).unwrap();
        let key = folder.join("authorities/01.key");
        fs::set_permissions(&key, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(
            store.load(),
            Err(DirectoryError::OpenToOthers { mode: 0o640, .. })
        ));
        drop(store);
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
        Directory::open(&folder).unwrap();
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
            Err(DirectoryError::OpenToOthers { .. })
        ));
    }
}
