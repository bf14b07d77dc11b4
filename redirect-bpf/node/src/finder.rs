// SPDX-License-Identifier: Apache-2.0
//! Where a pod's network namespace is.

mod cri;
mod directory;
mod folders;
mod given;
mod processes;

use crate::Obstacle;
use crate::config::Find;
use podveil_model::Uid;
use podveil_netns::process::Process;
use podveil_netns::{NetNs, NetNsError};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

pub use given::{Given, Sandbox};
pub use processes::{Processes, is_hosts};

/// Finds the namespaces of this node's pods.
#[derive(Debug)]
pub struct Finder {
    /// By the CNI plugin; what it says is the newest.
    pub given: Given,
    way: Way,
}

#[derive(Debug)]
enum Way {
    /// The namespace of a pod is the file of its uid in here: simulated nodes.
    Directory(PathBuf),
    /// The namespace of a pod is its oldest process's: real nodes.
    Processes(Processes),
}

/// A pod's namespace, and why it is believed to be the pod's.
#[derive(Clone, Debug)]
pub struct Found {
    pub netns: Arc<NetNs>,
    /// The pod has this namespace at least as long as this process of it lives. `None`: one has to look again.
    pub anchor: Option<Arc<Process>>,
    pub by: By,
    /// The pod's addresses, where who found it knows them.
    pub addresses: Arc<[IpAddr]>,
}

/// Who said where to look.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum By {
    Cni,
    Directory,
    Processes,
    Runtime,
}

impl Found {
    /// Is it certain, without looking again, that the pod still has this namespace?
    pub fn is_certain(&self) -> bool {
        (self.anchor.as_ref()).is_some_and(|anchor| anchor.is_alive())
    }
}

#[derive(Debug, thiserror::Error)]
pub enum FindError {
    #[error("uid {uid:?} cannot be a file name")]
    BadUid { uid: Uid },
    /// Not there yet, or no more, or not to be had: the reason.
    #[error("{what}")]
    Missing { what: String, obstacle: Obstacle },
    #[error("the pod's network namespace cannot be taken")]
    NetNs(#[source] NetNsError),
    #[error("{} is this program's own network namespace", path.display())]
    Own { path: PathBuf },
    #[error("{} cannot be read", path.display())]
    List {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
}

impl Finder {
    pub fn new(find: &Find) -> Self {
        let way = match find {
            Find::Directory(directory) => Way::Directory(directory.clone()),
            Find::Processes { cri_socket } => Way::Processes(Processes::new(cri_socket.clone())),
        };
        Self {
            given: Given::default(),
            way,
        }
    }

    /// # Errors
    /// See [`FindError`]. The node's own namespace is never a pod's.
    pub async fn find(&self, uid: &Uid) -> Result<Found, FindError> {
        let Some(given) = self.given.of(uid) else {
            return self.way.find(uid).await;
        };
        if given.starts {
            return Ok(given.found());
        }
        match self.way.find(uid).await {
            // From now on the process ties the pod to it.
            Ok(found) if found.netns.id() == given.netns.id() => {
                self.given.forget(uid);
                Ok(found)
            }
            // Known only by its process: what was handed over is not where its sockets are.
            Err(error) if error.is_sandboxed() => {
                self.given.forget(uid);
                Err(error)
            }
            // Processes of the sandbox before, or none yet.
            _ => Ok(given.found()),
        }
    }

    /// Every namespace that may be a pod's, each with a name for it.
    /// # Errors
    /// When nothing can be listed; what ends or changes meanwhile is passed over.
    pub async fn all(&self) -> Result<Vec<(String, Found)>, FindError> {
        match &self.way {
            Way::Directory(directory) => directory::all(directory),
            Way::Processes(processes) => processes.all().await,
        }
    }
}

impl Way {
    async fn find(&self, uid: &Uid) -> Result<Found, FindError> {
        match self {
            Self::Directory(directory) => directory::find(directory, uid),
            Self::Processes(processes) => processes.find(uid).await,
        }
    }
}

impl FindError {
    fn is_sandboxed(&self) -> bool {
        let sandboxed = Obstacle::Sandboxed;
        matches!(self, Self::Missing { obstacle, .. } if *obstacle == sandboxed)
    }
}
