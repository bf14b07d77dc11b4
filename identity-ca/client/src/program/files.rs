// SPDX-License-Identifier: Apache-2.0
//! The files of a program: token and bootstrap bundle (read), the last bundle (kept). Never a key.

use crate::{BundleError, ProgramConfig, TrustBundle};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use tonic::metadata::{Ascii, MetadataValue};
use zeroize::Zeroizing;

const MAX_TOKEN_BYTES: usize = 16 * 1024;
const MAX_BUNDLE_BYTES: usize = 256 * 1024;
const STORED_BUNDLE: &str = "bundle.pem";

#[derive(Debug, thiserror::Error)]
pub(super) enum FileError {
    #[error("{} holds no usable trust bundle", path.display())]
    Bundle {
        path: PathBuf,
        #[source]
        source: BundleError,
    },
    #[error("{} holds no certificate", path.display())]
    Empty { path: PathBuf },
    #[error("could not read {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} holds no token (one line of visible ASCII)", path.display())]
    Token { path: PathBuf },
    #[error("{} is larger than {limit_bytes} bytes", path.display())]
    TooLarge { path: PathBuf, limit_bytes: usize },
}

/// `Bearer <token>`, marked so that it is not printed.
pub(super) async fn bearer(path: &Path) -> Result<MetadataValue<Ascii>, FileError> {
    let bytes = Zeroizing::new(read(path, MAX_TOKEN_BYTES).await?);
    let not_a_token = || FileError::Token {
        path: path.to_owned(),
    };
    let token = bytes.trim_ascii();
    if token.is_empty() || !token.iter().all(u8::is_ascii_graphic) {
        return Err(not_a_token());
    }
    let bearer = Zeroizing::new([b"Bearer ", token].concat());
    let mut value =
        MetadataValue::<Ascii>::try_from(bearer.as_slice()).map_err(|_| not_a_token())?;
    value.set_sensitive(true);
    Ok(value)
}

/// What a program trusts on first contact, newest first: the bundle it stored, then the operator's.
pub(super) fn trust_files(config: &ProgramConfig) -> [PathBuf; 2] {
    [
        config.state_dir.join(STORED_BUNDLE),
        config.bootstrap_bundle.clone(),
    ]
}

pub(super) async fn read_bundle(
    config: &ProgramConfig,
    path: &Path,
) -> Result<TrustBundle, FileError> {
    let text = read(path, MAX_BUNDLE_BYTES).await?;
    let bundle = TrustBundle::from_pem(config.trust_domain.clone(), &text).map_err(|source| {
        FileError::Bundle {
            path: path.to_owned(),
            source,
        }
    })?;
    if bundle.roots.is_empty() {
        return Err(FileError::Empty {
            path: path.to_owned(),
        });
    }
    Ok(bundle)
}

/// Replaces the stored bundle as a whole: a reader finds the old one or the new one.
pub(super) async fn store_bundle(config: &ProgramConfig, bundle: &TrustBundle) -> io::Result<()> {
    let directory = config.state_dir.clone();
    let text = bundle.to_pem();
    let write = move || {
        // Two processes of a node may share the directory.
        let new = directory.join(format!("{STORED_BUNDLE}.{}", std::process::id()));
        let mut file = std::fs::File::create(&new)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&new, directory.join(STORED_BUNDLE))
    };
    tokio::task::spawn_blocking(write)
        .await
        .map_err(io::Error::other)?
}

impl ProgramConfig {
    /// Removes what a program has kept in `state_dir`, and the folder unless something else lies in it. For a program
    /// that has ended and does not come back.
    /// # Errors
    /// As `unlink(2)` and `rmdir(2)`; what is not there is none.
    pub fn forget(&self) -> io::Result<()> {
        let entries = match std::fs::read_dir(&self.state_dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        for entry in entries {
            let entry = entry?;
            // A process that was killed while it wrote has left its unfinished one.
            if entry
                .file_name()
                .as_encoded_bytes()
                .starts_with(STORED_BUNDLE.as_bytes())
            {
                std::fs::remove_file(entry.path())?;
            }
        }
        match std::fs::remove_dir(&self.state_dir) {
            Err(error) if error.kind() != io::ErrorKind::DirectoryNotEmpty => Err(error),
            _ => Ok(()),
        }
    }
}

async fn read(path: &Path, limit_bytes: usize) -> Result<Vec<u8>, FileError> {
    use tokio::io::AsyncReadExt as _;
    let read_error = |source| FileError::Read {
        path: path.to_owned(),
        source,
    };
    let file = tokio::fs::File::open(path).await.map_err(read_error)?;
    let mut bytes = Vec::new();
    file.take(limit_bytes as u64 + 1)
        .read_to_end(&mut bytes)
        .await
        .map_err(read_error)?;
    if bytes.len() > limit_bytes {
        return Err(FileError::TooLarge {
            path: path.to_owned(),
            limit_bytes,
        });
    }
    Ok(bytes)
}
