// SPDX-License-Identifier: Apache-2.0
use crate::zds::{self, ListenersError, PodListeners};
use podveil_model::{HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT, Uid};
use podveil_net::{Family, ListenError, PodSockets};
use podveil_netns::NetNs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

/// Where a pod's listening sockets come from.
#[derive(Clone, Debug)]
pub enum ListenerSource {
    /// The holder at this socket made them and keeps them over our restarts (mode B).
    Holder(PathBuf),
    /// We make them in the pod's network namespace (mode A).
    Own { backlog: u32, mark: Option<u32> },
}

/// Why a pod has no listeners.
#[derive(Debug, thiserror::Error)]
pub enum PodListenersError {
    #[error("the holder's listeners were not had")]
    Holder(#[source] ListenersError),
    #[error("a listener could not be made")]
    Own(#[source] ListenError),
}

impl ListenerSource {
    /// May a pod that is served come again with other listeners?
    pub fn may_change(&self) -> bool {
        matches!(self, Self::Holder(_))
    }

    /// # Errors
    /// [`PodListenersError`]; no socket is left.
    pub async fn of(
        &self,
        uid: &Uid,
        netns: &Arc<NetNs>,
    ) -> Result<PodListeners, PodListenersError> {
        match self {
            Self::Holder(path) => zds::fetch(path, uid)
                .await
                .map_err(PodListenersError::Holder),
            Self::Own { backlog, mark } => own(&PodSockets::new(netns.clone(), *mark), *backlog)
                .map_err(PodListenersError::Own),
        }
    }
}

fn own(sockets: &PodSockets, backlog: u32) -> Result<PodListeners, ListenError> {
    let both = |port| -> Result<Vec<std::net::TcpListener>, ListenError> {
        let mut listeners = Vec::new();
        for family in [Family::V4, Family::V6] {
            match sockets.listen(port, family, backlog) {
                Ok(listener) => listeners.push(
                    listener
                        .into_std()
                        .map_err(|source| ListenError::Bind { port, source })?,
                ),
                // A pod without IPv6 is served all the same.
                Err(ListenError::Bind { source, .. })
                    if family == Family::V6 && has_no_ipv6(&source) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(listeners)
    };
    Ok(PodListeners {
        outbound: both(OUTBOUND_PORT)?,
        inbound_plain: both(INBOUND_PORT)?,
        inbound_hbone: both(HBONE_PORT)?,
    })
}

fn has_no_ipv6(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrNotAvailable
        || error.raw_os_error() == Some(nix::libc::EAFNOSUPPORT)
}
