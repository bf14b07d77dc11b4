// SPDX-License-Identifier: Apache-2.0
use crate::{Answered, Obstacle, PluginState};
use podveil_apply::{BackEnd, Chosen, FenceCount};
use podveil_model::Uid;
use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

/// The module as a whole, replaced at each change.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Status {
    /// Another process of this module serves the node; nothing here is told before that ends.
    pub stands_by: bool,
    /// The cluster is known, so that pods can be offered to the proxy.
    pub synced: bool,
    /// A proxy is connected to the ZDS socket.
    pub proxy_connected: bool,
    pub pods: Vec<PodStatus>,
    /// `system_version_info` of the newest addresses in use in every fence here.
    pub applied_version: Arc<str>,
    /// What new captures are made with; `None` before that is known.
    pub chosen: Option<Arc<Chosen>>,
    /// The CNI plugin's place in the node's chain.
    pub plugin: PluginState,
    /// What it was answered.
    pub answered: Answered,
}

impl Status {
    /// Nothing but moments of verification differs: no news for whoever waits for some.
    pub(crate) fn says_the_same(&self, next: &Self) -> bool {
        let quiet = |status: &Self| {
            let mut status = status.clone();
            status.pods.iter_mut().for_each(|pod| pod.verified = None);
            status
        };
        self == next || quiet(self) == quiet(next)
    }
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PodStatus {
    pub uid: Uid,
    pub condition: PodCondition,
    /// Why it is not ready; one sentence, empty when it is.
    pub reason: Arc<str>,
    /// What that is, in one word.
    pub obstacle: Option<Obstacle>,
    /// Its containers may have run before it was captured: the CNI plugin did not ask about it.
    pub started_uncaptured: bool,
    pub older: usize,
    pub captured: usize,
    pub fence: FenceCount,
    pub no_listener_syns: u64,
    /// What captures it, and since when; `None` before that was seen, or where it is not captured.
    pub back_end: Option<BackEnd>,
    pub captured_since: Option<SystemTime>,
    /// When all of it was last found to stand, a connection through it included.
    pub verified: Option<SystemTime>,
    /// How often it was found changed and was written again.
    pub repairs: u64,
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
