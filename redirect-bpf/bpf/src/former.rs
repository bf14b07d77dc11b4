// SPDX-License-Identifier: Apache-2.0
use crate::layout::{Layout, Pod};
use crate::node::NodeError;
use crate::pod_links::Attached;
use crate::table::{Table, TableError};
use crate::{bpffs, kernel, pod_links};
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Maps that one layout takes over from another as they are. What they tell of sockets that are open cannot be found out
/// again, so both write to them while both stand.
const SHARED: [&str; 5] = [
    "listeners",
    "older",
    "pod_counts",
    "proxy_connections",
    "proxy_sockets",
];

/// What programs of other layouts have left in the same folder: links, which act until they are taken away, and maps.
///
/// Programs of both layouts run one after the other, each for the pods that stand in its own `pods`. Of a pod that stands in
/// both, the one that runs last says whether it is captured, and what the fence of either refuses is refused. So a pod is
/// written into our tables first, whole, and then forgotten here; the layout goes with its last pod.
#[derive(Debug, Default)]
pub struct Former {
    layouts: Vec<Left>,
    /// Pods are written side by side, and one of them is the last.
    removes: Mutex<()>,
}

#[derive(Debug)]
struct Left {
    folder: PathBuf,
    /// None if that program came to its end before it made them.
    pods: Option<Table<u64, Pod>>,
}

impl Former {
    /// Every layout in `folder` but our own.
    /// # Errors
    /// [`NodeError`]; [`TableError::Layout`] where the promises of [`Layout`] were broken.
    pub fn beside(own: Layout, folder: &Path) -> Result<Self, NodeError> {
        let unreadable = |source| NodeError::Folder {
            path: folder.to_owned(),
            source,
        };
        let mut all = Vec::new();
        for entry in fs::read_dir(folder).map_err(unreadable)? {
            let entry = entry.map_err(unreadable)?;
            if Layout::of(&entry.file_name()).is_some_and(|layout| layout != own) {
                let folder = entry.path();
                let pods = match Table::open(&folder.join("maps"), "pods") {
                    Err(TableError::Io { source, .. })
                        if source.kind() == io::ErrorKind::NotFound =>
                    {
                        None
                    }
                    opened => Some(opened?),
                };
                all.push(Left { folder, pods });
            }
        }
        Ok(Self {
            layouts: all,
            removes: Mutex::default(),
        })
    }

    pub fn is_empty(&self) -> bool {
        self.layouts.is_empty()
    }

    /// Pins what is shared in `maps` too, where it is not yet.
    /// # Errors
    /// [`NodeError::Table`].
    pub fn lend(&self, maps: &Path) -> Result<(), NodeError> {
        for name in SHARED {
            let failed = |source| TableError::Io { name, source };
            let pin = maps.join(name);
            for left in &self.layouts {
                if pin.exists() {
                    break;
                }
                match kernel::get(&left.folder.join("maps").join(name)) {
                    Ok(map) => kernel::pin(map.as_fd(), &pin).map_err(failed)?,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(failed(error).into()),
                }
            }
        }
        Ok(())
    }

    /// What was written of this pod.
    /// # Errors
    /// [`NodeError::Table`].
    pub fn pod(&self, cookie: u64) -> Result<Option<Pod>, NodeError> {
        for pods in self.layouts.iter().filter_map(|left| left.pods.as_ref()) {
            if let Some(pod) = pods.find(&cookie)? {
                return Ok(Some(pod));
            }
        }
        Ok(None)
    }

    /// The pods whose namespaces have ended, and those that were only begun with.
    /// # Errors
    /// [`NodeError`].
    pub fn gone(&self) -> Result<Vec<u64>, NodeError> {
        let mut gone = Vec::new();
        for left in &self.layouts {
            for (cookie, attached) in pod_links::all(&left.folder)? {
                let is_gone = match attached {
                    Attached::Stands => false,
                    Attached::Gone => true,
                    Attached::Partly => self.pod(cookie)?.is_none_or(|pod| pod.flags == 0),
                };
                if is_gone {
                    gone.push(cookie);
                }
            }
        }
        Ok(gone)
    }

    /// Ends what those programs do for this pod.
    /// # Errors
    /// [`NodeError`].
    pub fn forget(&self, cookie: u64) -> Result<(), NodeError> {
        for left in &self.layouts {
            if let Some(pods) = &left.pods {
                pods.remove(&cookie)?;
            }
            pod_links::remove(&left.folder, cookie)?;
        }
        Ok(())
    }

    /// Takes away what no pod depends on any more.
    /// # Errors
    /// [`NodeError`].
    pub fn remove_unused(&self) -> Result<(), NodeError> {
        let _one_at_a_time = self.removes.lock().unwrap_or_else(PoisonError::into_inner);
        for Left { folder, .. } in &self.layouts {
            if pod_links::all(folder)?.is_empty() {
                bpffs::remove(folder).map_err(|source| NodeError::Folder {
                    path: folder.clone(),
                    source,
                })?;
            }
        }
        Ok(())
    }
}
