// SPDX-License-Identifier: Apache-2.0
use crate::backend::{ApplyError, Backend, Observed, VerifyError};
use crate::command::CommandError;
use crate::connections::Connection;
use crate::probe::Unusable;
use crate::{Ebpf, Flavour, Iptables, Nftables, verification};
use podveil_bpf::{Node, NodeError};
use podveil_netns::NetNs;
use podveil_netns::cgroup::CgroupPath;
use podveil_plan::{Capture, Fence, FenceStep, Phase};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Which back end captures pods.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum BackEndChoice {
    /// The first of [`BackEnd::ALL`] that this node has everything for.
    #[default]
    Auto,
    Only(BackEnd),
}

/// From the one that is preferred to the one that serves almost everywhere.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum BackEnd {
    Ebpf,
    Nftables,
    Iptables,
}

impl BackEnd {
    pub const ALL: [Self; 3] = [Self::Ebpf, Self::Nftables, Self::Iptables];
}

impl fmt::Display for BackEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ebpf => "ebpf",
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
        })
    }
}

/// What captures pods from now on, and what was tried before it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Chosen {
    pub back_end: BackEnd,
    pub unusable: Vec<Unusable>,
}

#[derive(Debug, thiserror::Error)]
pub enum BackEndError {
    #[error("what an earlier run has left of eBPF cannot be taken over")]
    Left(#[source] NodeError),
    #[error("pods cannot be captured by any back end: {}", listed(.0))]
    None(Vec<Unusable>),
}

fn listed(all: &[Unusable]) -> String {
    let all: Vec<String> = all.iter().map(Unusable::to_string).collect();
    all.join("; ")
}

/// The back ends of one node. A pod stays with the one that has captured it until it is released, whichever is chosen
/// now: moving it would break the connections that the proxy carries.
#[derive(Debug)]
pub struct BackEnds {
    /// There if it is chosen, or if an earlier run has left something of it.
    ebpf: Option<Ebpf>,
    nftables: Nftables,
    /// The newer flavour first: on a node with both that is the one that others use.
    iptables: [Iptables; 2],
    chosen: Chosen,
    /// Whose pods are, by their namespaces' cookies, as far as something has been seen to stand.
    owners: Mutex<BTreeMap<u64, Owner>>,
}

/// Past this many all are looked for anew: namespaces come and go, and cookies do not come back.
const MAX_OWNERS: usize = 65_536;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Owner {
    Ebpf,
    Nftables,
    Iptables(usize),
}

impl BackEnds {
    /// Tries what is chosen, or one after the other, on this node. `folder`: where eBPF's maps and links are pinned.
    /// `cgroup`: where every socket of the proxy is made; it must exist.
    /// # Errors
    /// [`BackEndError`]: nothing that may be used can be, or pods are captured by eBPF and it cannot be had any more.
    pub async fn open(
        choice: BackEndChoice,
        folder: &Path,
        cgroup: CgroupPath,
    ) -> Result<Self, BackEndError> {
        let mut opened = Self::left(folder, cgroup.clone())?;
        let candidates = match &choice {
            BackEndChoice::Auto => &BackEnd::ALL[..],
            BackEndChoice::Only(one) => std::slice::from_ref(one),
        };
        let mut unusable = Vec::new();
        for back_end in candidates {
            let missing = match back_end {
                BackEnd::Ebpf => opened.have_ebpf(folder, &cgroup).err(),
                BackEnd::Nftables => opened.nftables.probe().await.err(),
                BackEnd::Iptables => opened.have_iptables().await.err(),
            };
            let Some(missing) = missing else {
                tracing::info!(%back_end, "back end of new captures");
                opened.chosen = Chosen {
                    back_end: *back_end,
                    unusable,
                };
                return Ok(opened);
            };
            tracing::warn!(
                %back_end, feature = %missing.feature, reason = %missing.reason,
                "a back end cannot be used on this node"
            );
            unusable.push(missing);
        }
        Err(BackEndError::None(unusable))
    }

    /// Whatever earlier runs have captured pods with, to let these go; nothing is probed.
    /// # Errors
    /// [`BackEndError::Left`].
    pub fn left(folder: &Path, cgroup: CgroupPath) -> Result<Self, BackEndError> {
        let ebpf = match Node::stands(folder) {
            true => Some(Ebpf::open(folder, cgroup.clone()).map_err(BackEndError::Left)?),
            false => None,
        };
        Ok(Self {
            ebpf,
            nftables: Nftables::new(cgroup.clone()),
            iptables: [Flavour::Nft, Flavour::Legacy].map(|one| Iptables::new(cgroup.clone(), one)),
            owners: Mutex::default(),
            chosen: Chosen {
                back_end: BackEnd::Nftables,
                unusable: Vec::new(),
            },
        })
    }

    pub fn chosen(&self) -> &Chosen {
        &self.chosen
    }

    /// Leaves the flavour that works in the first place.
    async fn have_iptables(&mut self) -> Result<(), Unusable> {
        let [newer, older] = &self.iptables;
        if let Err(missing) = newer.probe().await {
            older.probe().await.map_err(|_| missing)?;
            self.iptables.swap(0, 1);
        }
        Ok(())
    }

    fn have_ebpf(&mut self, folder: &Path, cgroup: &CgroupPath) -> Result<(), Unusable> {
        if self.ebpf.is_none() {
            let opened = Ebpf::open(folder, cgroup.clone()).map_err(|error| {
                // What was made before it failed; nobody has been captured with it.
                let _unless_it_was_never_there = Ebpf::purge(folder);
                Unusable::ebpf(&error)
            })?;
            self.ebpf = Some(opened);
        }
        Ok(())
    }

    /// Takes away what is left of eBPF when no pod is captured any more.
    /// # Errors
    /// [`NodeError::Folder`].
    pub fn purge(folder: &Path) -> Result<(), NodeError> {
        Ebpf::purge(folder)
    }

    /// Whose this pod is, or would be.
    async fn of(&self, netns: &NetNs) -> Result<Owner, ApplyError> {
        let cookie = netns.cookie()?;
        if let Some(owner) = self.known().get(&cookie) {
            return Ok(*owner);
        }
        let Some(owner) = self.found(netns).await? else {
            return Ok(match self.chosen.back_end {
                BackEnd::Ebpf => Owner::Ebpf,
                BackEnd::Nftables => Owner::Nftables,
                BackEnd::Iptables => Owner::Iptables(0),
            });
        };
        let mut known = self.known();
        if known.len() >= MAX_OWNERS {
            known.clear();
        }
        known.insert(cookie, owner);
        Ok(owner)
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<u64, Owner>> {
        self.owners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whose is what stands there?
    async fn found(&self, netns: &NetNs) -> Result<Option<Owner>, ApplyError> {
        if let Some(ebpf) = &self.ebpf
            && ebpf.owns(netns).await?
        {
            return Ok(Some(Owner::Ebpf));
        }
        if if_there(self.nftables.has_table(netns).await)? {
            return Ok(Some(Owner::Nftables));
        }
        for (place, iptables) in self.iptables.iter().enumerate() {
            if if_there(iptables.has_chains(netns).await)? {
                return Ok(Some(Owner::Iptables(place)));
            }
        }
        // Begun with, or ended, half-way.
        Ok(Iptables::has_sets(netns)
            .await?
            .then_some(Owner::Iptables(0)))
    }
}

/// Nobody has captured anything with a program that is not there.
fn if_there(found: Result<bool, ApplyError>) -> Result<bool, ApplyError> {
    match found {
        Err(ApplyError::Command(CommandError::Io { source, .. }))
            if source.kind() == io::ErrorKind::NotFound =>
        {
            Ok(false)
        }
        found => found,
    }
}

/// The same call on whichever it is.
macro_rules! on {
    ($self:ident, $netns:ident, $backend:ident => $call:expr) => {
        match ($self.of($netns).await?, &$self.ebpf) {
            (Owner::Ebpf, Some($backend)) => $call.await,
            (Owner::Iptables(place), _) => {
                let $backend = &$self.iptables[place];
                $call.await
            }
            (Owner::Nftables | Owner::Ebpf, _) => {
                let $backend = &$self.nftables;
                $call.await
            }
        }
    };
}

impl Backend for BackEnds {
    async fn apply(
        &self,
        netns: &NetNs,
        capture: &Capture,
        fence: &Arc<Fence>,
    ) -> Result<BTreeSet<Connection>, ApplyError> {
        on!(self, netns, it => it.apply(netns, capture, fence))
    }

    async fn change_fence(&self, netns: &NetNs, step: &FenceStep) -> Result<(), ApplyError> {
        on!(self, netns, it => it.change_fence(netns, step))
    }

    async fn verify(&self, netns: &NetNs, capture: &Capture) -> Result<(), VerifyError> {
        on!(self, netns, it => it.verify(netns, capture))?;
        match capture.phase {
            Phase::Capturing => verification::connect(netns, capture).await,
            Phase::Releasing => Ok(()),
        }
    }

    async fn stands(&self, netns: &NetNs) -> Result<bool, ApplyError> {
        on!(self, netns, it => it.stands(netns))
    }

    async fn owns(&self, netns: &NetNs) -> Result<bool, ApplyError> {
        on!(self, netns, it => it.owns(netns))
    }

    async fn observe(
        &self,
        netns: &NetNs,
        older: &mut BTreeSet<Connection>,
    ) -> Result<Observed, ApplyError> {
        on!(self, netns, it => it.observe(netns, older))
    }

    fn forget_gone(&self) -> Result<(), ApplyError> {
        self.ebpf.as_ref().map_or(Ok(()), Backend::forget_gone)
    }

    async fn remove(&self, netns: &NetNs) -> Result<(), ApplyError> {
        let cookie = netns.cookie()?;
        on!(self, netns, it => it.remove(netns))?;
        // The next capture is made by what is chosen then.
        self.known().remove(&cookie);
        Ok(())
    }
}
