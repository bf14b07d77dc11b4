// SPDX-License-Identifier: Apache-2.0
use crate::backend::{ApplyError, Backend, Observed, VerifyError};
use crate::command::CommandError;
use crate::connections::Connection;
use crate::{Ebpf, Nftables};
use podveil_bpf::{Node, NodeError};
use podveil_netns::NetNs;
use podveil_netns::cgroup::CgroupPath;
use podveil_plan::{Capture, Fence, FenceChange};
use std::collections::BTreeSet;
use std::error::Error;
use std::fmt;
use std::io;
use std::path::Path;

/// Which back end captures pods.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum BackEndChoice {
    /// [`BackEnd::Ebpf`] where this kernel has what it needs.
    Auto,
    Ebpf,
    #[default]
    Nftables,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum BackEnd {
    Ebpf,
    Nftables,
}

impl fmt::Display for BackEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ebpf => "ebpf",
            Self::Nftables => "nftables",
        })
    }
}

/// The back ends of one node. A pod stays with the one that has captured it until it is released, whichever is chosen
/// now: moving it would break the connections that the proxy carries.
#[derive(Debug)]
pub struct BackEnds {
    /// There if it is chosen, or if an earlier run has left something of it.
    ebpf: Option<Ebpf>,
    nftables: Nftables,
    chosen: BackEnd,
}

impl BackEnds {
    /// `folder`: where eBPF's maps and links are pinned. `cgroup`: where every socket of the proxy is made; it must exist.
    /// # Errors
    /// [`NodeError`] if eBPF is demanded and cannot be had, or if what an earlier run has left of it cannot be taken over.
    pub fn open(
        choice: BackEndChoice,
        folder: &Path,
        cgroup: CgroupPath,
    ) -> Result<Self, NodeError> {
        let nftables = Nftables::new(cgroup.clone());
        let left = Node::stands(folder);
        let ebpf = match choice {
            BackEndChoice::Nftables if !left => None,
            BackEndChoice::Auto if !left => Ebpf::open(folder, cgroup)
                .inspect_err(|error| {
                    let reason = error.source().map(ToString::to_string);
                    tracing::warn!(%error, reason, "no capture by eBPF here, nftables takes its place");
                })
                .ok(),
            _ => Some(Ebpf::open(folder, cgroup)?),
        };
        let chosen = match (choice, &ebpf) {
            (BackEndChoice::Nftables, _) | (_, None) => BackEnd::Nftables,
            (_, Some(_)) => BackEnd::Ebpf,
        };
        tracing::info!(%chosen, "back end of new captures");
        Ok(Self {
            ebpf,
            nftables,
            chosen,
        })
    }

    /// Takes away what is left of eBPF when no pod is captured any more.
    /// # Errors
    /// [`NodeError::Folder`].
    pub fn purge(folder: &Path) -> Result<(), NodeError> {
        Ebpf::purge(folder)
    }

    /// Whose this pod is, or would be.
    async fn of(&self, netns: &NetNs) -> Result<Owner<'_>, ApplyError> {
        let Some(ebpf) = &self.ebpf else {
            return Ok(Owner::Nftables(&self.nftables));
        };
        let has_table = async || match self.nftables.has_table(netns).await {
            // Nobody has captured anything with a program that is not there.
            Err(ApplyError::Command(CommandError::Io { source, .. }))
                if source.kind() == io::ErrorKind::NotFound =>
            {
                Ok(false)
            }
            found => found,
        };
        let is_ebpf =
            ebpf.owns(netns).await? || (self.chosen == BackEnd::Ebpf && !has_table().await?);
        Ok(if is_ebpf {
            Owner::Ebpf(ebpf)
        } else {
            Owner::Nftables(&self.nftables)
        })
    }
}

enum Owner<'a> {
    Ebpf(&'a Ebpf),
    Nftables(&'a Nftables),
}

/// The same call on whichever it is.
macro_rules! on {
    ($owner:expr, $backend:ident => $call:expr) => {
        match $owner {
            Owner::Ebpf($backend) => $call.await,
            Owner::Nftables($backend) => $call.await,
        }
    };
}

impl Backend for BackEnds {
    async fn apply(
        &self,
        netns: &NetNs,
        capture: &Capture,
        fence: &Fence,
    ) -> Result<BTreeSet<Connection>, ApplyError> {
        on!(self.of(netns).await?, it => it.apply(netns, capture, fence))
    }

    async fn change_fence(&self, netns: &NetNs, change: &FenceChange) -> Result<(), ApplyError> {
        on!(self.of(netns).await?, it => it.change_fence(netns, change))
    }

    async fn verify(&self, netns: &NetNs, capture: &Capture) -> Result<(), VerifyError> {
        on!(self.of(netns).await?, it => it.verify(netns, capture))
    }

    async fn stands(&self, netns: &NetNs) -> Result<bool, ApplyError> {
        on!(self.of(netns).await?, it => it.stands(netns))
    }

    async fn owns(&self, netns: &NetNs) -> Result<bool, ApplyError> {
        on!(self.of(netns).await?, it => it.owns(netns))
    }

    async fn observe(
        &self,
        netns: &NetNs,
        older: &mut BTreeSet<Connection>,
    ) -> Result<Observed, ApplyError> {
        on!(self.of(netns).await?, it => it.observe(netns, older))
    }

    async fn remove(&self, netns: &NetNs) -> Result<(), ApplyError> {
        on!(self.of(netns).await?, it => it.remove(netns))
    }
}
