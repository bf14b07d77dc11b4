// SPDX-License-Identifier: Apache-2.0
use std::fmt;

/// What keeps a pod from being captured.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Obstacle {
    /// Its sandbox is in the node's own network namespace.
    HostNetwork,
    /// No process of it is to be found, and so no network namespace.
    NotFound,
    /// Something that is not the proxy listens on a port that capture needs.
    PortTaken,
    /// Its containers run in a virtual machine, or on a kernel in user space: the node's kernel has no sockets of theirs.
    Sandboxed,
    /// Work that failed for another reason, and is tried again.
    Work,
}

impl Obstacle {
    pub const ALL: [Self; 5] = [
        Self::HostNetwork,
        Self::NotFound,
        Self::PortTaken,
        Self::Sandboxed,
        Self::Work,
    ];

    /// What a person can do, to be read after the reason.
    pub(crate) fn cure(self) -> Option<&'static str> {
        match self {
            Self::HostNetwork => {
                Some("a pod there is never captured: label it io.cilium/mtls-enabled=false")
            }
            Self::NotFound => Some(
                "a runtime class that hides its processes cannot be captured: change it, or label the pod io.cilium/mtls-enabled=false",
            ),
            Self::PortTaken => Some(
                "take the pod out of the other mesh and start it anew, or label it io.cilium/mtls-enabled=false",
            ),
            Self::Sandboxed => {
                Some("change the pod's runtime class, or label it io.cilium/mtls-enabled=false")
            }
            Self::Work => None,
        }
    }

    /// A moment later it may be gone by itself, as while a sandbox is being made.
    pub(crate) fn may_pass(self) -> bool {
        matches!(self, Self::HostNetwork | Self::NotFound)
    }
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::HostNetwork => "host_network",
            Self::NotFound => "not_found",
            Self::PortTaken => "port_taken",
            Self::Sandboxed => "sandboxed",
            Self::Work => "work",
        })
    }
}
