// SPDX-License-Identifier: Apache-2.0
//! Where the CA's record is kept: the journal and the authorities that it names.

mod directory;
mod secret;

pub use directory::{Directory, DirectoryError, socket_folder};
pub use secret::{KubeSecret, ROOTS, ROOTS_KEY, SECRET, SecretError};

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use zeroize::Zeroizing;

/// What is kept, as texts and whole.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Record {
    /// The only part that is read to decide anything.
    pub journal: String,
    /// By serial.
    pub authorities: BTreeMap<String, Kept>,
}

/// One authority: certificate and PKCS#8 key, both PEM.
#[derive(Clone, Eq, PartialEq)]
pub struct Kept {
    pub certificate: String,
    pub key: Zeroizing<String>,
}

/// Never the key.
impl fmt::Debug for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kept").finish_non_exhaustive()
    }
}

/// Every change of the record is in the store before anybody sees it.
#[derive(Debug)]
pub enum Store {
    /// For one CA alone.
    Directory(Arc<Directory>),
    /// Shared by replicas.
    Secret(Box<KubeSecret>),
}

/// Why the record cannot be read or written; for the operator.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    #[error(transparent)]
    Secret(#[from] SecretError),
}

impl StoreError {
    /// Another replica has written meanwhile: to be read again.
    pub fn is_conflict(&self) -> bool {
        matches!(self, Self::Secret(error) if error.is_conflict())
    }

    /// Trying again may help.
    pub fn is_passing(&self) -> bool {
        matches!(
            self,
            Self::Secret(SecretError::Api { .. } | SecretError::Missing { .. })
        )
    }
}

impl Store {
    /// `None` where nothing is kept yet.
    ///
    /// # Errors
    /// If what is kept cannot be read.
    pub async fn load(&mut self) -> Result<Option<Record>, StoreError> {
        match self {
            Self::Directory(directory) => {
                let directory = directory.clone();
                Ok(blocking(move || directory.load()).await?)
            }
            Self::Secret(secret) => Ok(secret.load().await?),
        }
    }

    /// # Errors
    /// If it cannot be written; then what was kept before still stands.
    pub async fn save(&mut self, record: Record) -> Result<(), StoreError> {
        match self {
            Self::Directory(directory) => {
                let directory = directory.clone();
                Ok(blocking(move || directory.save(&record)).await?)
            }
            Self::Secret(secret) => Ok(secret.save(&record).await?),
        }
    }

    /// After the record: what is derived from it, and away with what it no longer names.
    ///
    /// # Errors
    /// If that cannot be written.
    pub async fn settle(&mut self, bundle: String, serials: Vec<String>) -> Result<(), StoreError> {
        match self {
            Self::Directory(directory) => {
                let directory = directory.clone();
                Ok(blocking(move || directory.settle(&bundle, &serials)).await?)
            }
            // The Secret is always whole, and the replica that acts publishes the roots.
            Self::Secret(_) => Ok(()),
        }
    }

    /// Is there a sign that a record was here before? Then a missing one is lost, not new.
    ///
    /// # Errors
    /// If it cannot be told.
    pub async fn was_used(&mut self) -> Result<bool, StoreError> {
        match self {
            Self::Directory(directory) => Ok(directory.was_used()),
            Self::Secret(secret) => Ok(secret.was_used().await?),
        }
    }

    /// Of a record that others write too, the version read last.
    pub fn version(&self) -> Option<&str> {
        match self {
            Self::Directory(_) => None,
            Self::Secret(secret) => secret.version(),
        }
    }

    /// Why there is no record after [`Store::load`] said so, where that is not for want of a journal alone.
    pub fn missing(&self) -> Option<StoreError> {
        match self {
            Self::Directory(_) => None,
            Self::Secret(secret) if secret.exists() => None,
            Self::Secret(secret) => Some(secret.missing().into()),
        }
    }

    /// For messages: what [`Store::was_used`] looks at.
    pub fn sign(&self) -> String {
        match self {
            Self::Directory(directory) => directory.bundle_path().display().to_string(),
            Self::Secret(secret) => secret.sign(),
        }
    }

    /// For messages: where the journal is.
    pub fn place(&self) -> String {
        match self {
            Self::Directory(directory) => directory.journal_path().display().to_string(),
            Self::Secret(secret) => secret.place(),
        }
    }
}

/// Files are synced; that takes as long as the disk takes.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work)
        .await
        .expect("work on files does not panic")
}
