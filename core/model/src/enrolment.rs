// SPDX-License-Identifier: Apache-2.0
use std::fmt;

/// Where a workload stands on the way into the mesh and out of it.
///
/// ```text
/// None ─▶ Wanted ─▶ Capturable ─▶ Announced ─▶ Mandatory
///   ▲       │           │          │     ▲         │
///   ├───────┴───────────┘          ▼     │         │
///   └────────────────────────── Draining ◀─────────┘
/// ```
///
/// Peers tunnel to a draining workload until it is None, which is published when every node has applied the draining and
/// with it accepts plain: nobody goes back to plain before it is taken.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Stage {
    /// Not under Podveil.
    #[default]
    None,
    /// The label is there; the node has been asked.
    Wanted,
    /// The node reports listeners, certificate and capture ready.
    Capturable,
    /// Peers tunnel to it; plain is still accepted.
    Announced,
    /// Plain between two mandatory workloads is refused.
    Mandatory,
    /// On the way out: plain is accepted again, peers still tunnel.
    Draining,
}

impl Stage {
    /// Do peers open tunnels to it?
    pub fn is_announced(self) -> bool {
        matches!(self, Self::Announced | Self::Mandatory | Self::Draining)
    }

    /// Is plain between it and another mandatory workload refused?
    pub fn is_mandatory(self) -> bool {
        self == Self::Mandatory
    }

    /// Should its node hold it under capture (for new connections)?
    pub fn wants_capture(self) -> bool {
        matches!(
            self,
            Self::Wanted | Self::Capturable | Self::Announced | Self::Mandatory
        )
    }

    /// Does it end when every node has it in use?
    pub fn waits_for_nodes(self) -> bool {
        matches!(self, Self::Announced | Self::Draining)
    }

    /// May its node hold a certificate for it? Draining workloads still carry connections.
    pub fn wants_certificate(self) -> bool {
        self != Self::None
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Wanted => "wanted",
            Self::Capturable => "capturable",
            Self::Announced => "announced",
            Self::Mandatory => "mandatory",
            Self::Draining => "draining",
        })
    }
}

/// What happens to peers without an identity, and to destinations without one.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Mode {
    #[default]
    Permissive,
    Strict,
}

/// Which of two states of a workload is newer, whatever replica told it: the version of the deciding object, then how
/// often the stage has changed since.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Epoch {
    pub resource_version: u64,
    pub stage: u32,
}

impl Epoch {
    pub fn next_stage(self) -> Self {
        Self {
            stage: self.stage.saturating_add(1),
            ..self
        }
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.resource_version, self.stage)
    }
}
