// SPDX-License-Identifier: Apache-2.0
use crate::kernel::{self, MapSizes};
use crate::layout::Plain;
use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::mem::size_of;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

/// A pinned map with its types.
pub struct Table<K, V> {
    fd: OwnedFd,
    name: &'static str,
    types: PhantomData<fn(K) -> V>,
}

#[derive(Debug, thiserror::Error)]
pub enum TableError {
    #[error("map {name} cannot be read or written")]
    Io {
        name: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("map {name} is laid out otherwise than this program: {found:?}, not {expected:?}")]
    Layout {
        name: &'static str,
        expected: MapSizes,
        found: MapSizes,
    },
}

impl<K: Plain, V: Plain> Table<K, V> {
    /// Opens the map pinned in `folder`.
    /// # Errors
    /// [`TableError::Layout`] if keys or values have another size than `K` and `V`.
    pub fn open(folder: &Path, name: &'static str) -> Result<Self, TableError> {
        let failed = |source| TableError::Io { name, source };
        let fd = kernel::get(&folder.join(name)).map_err(failed)?;
        let found = kernel::map_sizes(fd.as_fd()).map_err(failed)?;
        let expected = MapSizes {
            key_bytes: size_of::<K>() as u32,
            value_bytes: size_of::<V>() as u32,
        };
        if found != expected {
            return Err(TableError::Layout {
                name,
                expected,
                found,
            });
        }
        Ok(Self {
            fd,
            name,
            types: PhantomData,
        })
    }

    /// # Errors
    /// [`TableError::Io`].
    pub fn find(&self, key: &K) -> Result<Option<V>, TableError> {
        kernel::map_lookup(self.fd.as_fd(), key).map_err(self.failed())
    }

    /// # Errors
    /// [`TableError::Io`], also when the map is full.
    pub fn set(&self, key: &K, value: &V) -> Result<(), TableError> {
        kernel::map_update(self.fd.as_fd(), key, value).map_err(self.failed())
    }

    /// # Errors
    /// [`TableError::Io`].
    pub fn remove(&self, key: &K) -> Result<(), TableError> {
        kernel::map_delete(self.fd.as_fd(), key).map_err(self.failed())
    }

    fn failed(&self) -> impl FnOnce(io::Error) -> TableError + use<K, V> {
        let name = self.name;
        move |source| TableError::Io { name, source }
    }
}

impl<K: Plain + Ord, V: Plain> Table<K, V> {
    /// The keys that `wanted` picks. What others change meanwhile may be missing or there.
    /// # Errors
    /// [`TableError::Io`].
    pub fn keys(&self, wanted: impl Fn(&K) -> bool) -> Result<Vec<K>, TableError> {
        // A key that vanishes under the walk sends it back to the start: hence the bound and the set.
        let mut keys = std::collections::BTreeSet::new();
        let mut restarts = 0;
        let mut at = None;
        while let Some(key) =
            kernel::map_next_key(self.fd.as_fd(), at.as_ref()).map_err(self.failed())?
        {
            if !keys.insert(key) {
                restarts += 1;
                if restarts > keys.len() * 3 {
                    break;
                }
            }
            at = Some(key);
        }
        Ok(keys.into_iter().filter(wanted).collect())
    }

    /// Makes the keys that `ours` picks exactly `wanted`, all with `value`.
    /// # Errors
    /// [`TableError::Io`].
    pub fn replace(
        &self,
        ours: impl Fn(&K) -> bool,
        wanted: impl IntoIterator<Item = K>,
        value: &V,
    ) -> Result<(), TableError> {
        let wanted: Vec<K> = wanted.into_iter().collect();
        for key in &wanted {
            self.set(key, value)?;
        }
        for key in self.keys(ours)? {
            if !wanted.contains(&key) {
                self.remove(&key)?;
            }
        }
        Ok(())
    }
}

impl<K, V> fmt::Debug for Table<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Table").field("name", &self.name).finish()
    }
}
