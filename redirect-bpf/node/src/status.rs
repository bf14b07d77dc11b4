// SPDX-License-Identifier: Apache-2.0
use crate::Obstacle;
use podveil_apply::FenceCount;
use podveil_model::Uid;
use std::fmt;
use std::sync::Arc;

/// The module as a whole, replaced at each change.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Status {
    /// The cluster is known, so that pods can be offered to the proxy.
    pub synced: bool,
    /// A proxy is connected to the ZDS socket.
    pub proxy_connected: bool,
    pub pods: Vec<PodStatus>,
    /// `system_version_info` of the newest addresses in use in every fence here.
    pub applied_version: Arc<str>,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PodStatus {
    pub uid: Uid,
    pub condition: PodCondition,
    /// Why it is not ready; one sentence, empty when it is.
    pub reason: Arc<str>,
    /// What that is, in one word.
    pub obstacle: Option<Obstacle>,
    pub older: usize,
    pub captured: usize,
    pub fence: FenceCount,
}

#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum PodCondition {
    Pending,
    Ready,
    Releasing,
    Released,
}

impl PodCondition {
    pub const ALL: [Self; 4] = [Self::Pending, Self::Ready, Self::Releasing, Self::Released];
}

impl fmt::Display for PodCondition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pending => "pending",
            Self::Ready => "ready",
            Self::Releasing => "releasing",
            Self::Released => "released",
        })
    }
}
