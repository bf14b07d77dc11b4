// SPDX-License-Identifier: Apache-2.0
use crate::kernel::{self, MapSizes};
use crate::layout::Plain;
use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::mem::size_of;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

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
    /// All keys. What others change meanwhile may be missing or there.
    /// # Errors
    /// [`TableError::Io`].
    pub fn keys(&self) -> Result<BTreeSet<K>, TableError> {
        // A key that vanishes under the walk sends it back to the start: hence the bound and the set.
        let mut keys = BTreeSet::new();
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
        Ok(keys)
    }
}

/// A key that belongs to one pod.
pub trait PodKey: Plain + Ord {
    /// The cookie of its namespace.
    fn netns(&self) -> u64;
}

/// The keys of all pods in one map, with what each pod has remembered: to find one pod's in the map takes a walk through
/// everybody's, and through a million empty places. Nobody else writes to it while a [`Node`](crate::Node) is open.
pub struct PodTable<K> {
    table: Table<K, u32>,
    pods: Mutex<HashMap<u64, BTreeSet<K>>>,
}

impl<K: PodKey> PodTable<K> {
    /// Opens the map pinned in `folder`, and reads what stands there.
    /// # Errors
    /// As [`Table::open`]; [`TableError::Io`].
    pub fn open(folder: &Path, name: &'static str) -> Result<Self, TableError> {
        let table = Table::<K, u32>::open(folder, name)?;
        let mut pods = HashMap::<u64, BTreeSet<K>>::new();
        for key in table.keys()? {
            pods.entry(key.netns()).or_default().insert(key);
        }
        Ok(Self {
            table,
            pods: pods.into(),
        })
    }

    /// The cookies of all pods that have any.
    pub fn netns(&self) -> BTreeSet<u64> {
        self.pods().keys().copied().collect()
    }

    /// What this pod has.
    pub fn of(&self, netns: u64) -> BTreeSet<K> {
        self.pods().get(&netns).cloned().unwrap_or_default()
    }

    /// Gives a pod exactly these, and writes each again: somebody may have taken one away.
    /// # Errors
    /// [`TableError::Io`], also when the map is full.
    pub fn replace(&self, netns: u64, wanted: BTreeSet<K>) -> Result<(), TableError> {
        let mut pods = self.pods();
        let held = pods.entry(netns).or_default();
        // Before they are written: what was, when one cannot be, is known all the same.
        held.extend(&wanted);
        for key in &wanted {
            self.table.set(key, &1)?;
        }
        for key in held.difference(&wanted) {
            self.table.remove(key)?;
        }
        match wanted.is_empty() {
            true => pods.remove(&netns),
            false => pods.insert(netns, wanted),
        };
        Ok(())
    }

    /// # Errors
    /// [`TableError::Io`].
    pub fn remove(&self, key: &K) -> Result<(), TableError> {
        self.table.remove(key)?;
        if let Some(held) = self.pods().get_mut(&key.netns()) {
            held.remove(key);
        }
        Ok(())
    }

    /// Does the map hold all that this pod has?
    /// # Errors
    /// [`TableError::Io`].
    pub fn stands(&self, netns: u64) -> Result<bool, TableError> {
        for key in self.of(netns) {
            if self.table.find(&key)?.is_none() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn pods(&self) -> MutexGuard<'_, HashMap<u64, BTreeSet<K>>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K> fmt::Debug for PodTable<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.table.fmt(f)
    }
}

impl<K, V> fmt::Debug for Table<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Table").field("name", &self.name).finish()
    }
}
