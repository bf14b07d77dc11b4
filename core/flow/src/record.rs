// SPDX-License-Identifier: Apache-2.0
use crate::DropReason;
use podveil_identity::WorkloadIdentity;
use podveil_model::{ServiceKey, Workload};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Direction {
    Inbound,
    Outbound,
}

/// How the connection crossed the network.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Protection {
    /// Mutual TLS in an HBONE tunnel.
    MutualTls {
        cipher: &'static str,
        key_exchange: &'static str,
    },
    Plain,
}

/// One end, as far as it is known.
#[derive(Clone, Debug, Default)]
pub struct End {
    pub address: Option<SocketAddr>,
    pub workload: Option<Arc<Workload>>,
    /// Proved by a certificate, never guessed from an address.
    pub identity: Option<WorkloadIdentity>,
}

/// Which rule let the connection through, or what refused it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Verdict {
    /// `rule` names the policy and rule; `None` where no policy applies.
    Allowed { rule: Option<String> },
    /// `detail` is one sentence for a person.
    Dropped { reason: DropReason, detail: String },
}

#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum CloseReason {
    /// The source gave up before the far side was reached: never opened, and not refused either.
    Abandoned,
    /// Both sides ended cleanly.
    Clean,
    /// Never carried a byte: the verdict says why.
    Dropped,
    /// A drain deadline passed.
    Drained,
    /// Policy or mode no longer permits it.
    PolicyChanged,
    ResetBySource,
    ResetByDestination,
    /// The tunnel under it was lost.
    TunnelLost,
    /// The workload at one end is gone.
    WorkloadGone,
}

impl CloseReason {
    pub fn label(self) -> &'static str {
        match self {
            Self::Abandoned => "abandoned",
            Self::Clean => "clean",
            Self::Dropped => "dropped",
            Self::Drained => "drained",
            Self::PolicyChanged => "policy_changed",
            Self::ResetBySource => "reset_by_source",
            Self::ResetByDestination => "reset_by_destination",
            Self::TunnelLost => "tunnel_lost",
            Self::WorkloadGone => "workload_gone",
        }
    }
}

/// One connection at its end: who, to whom, how protected, which rule, how much, and why it ended.
#[derive(Clone, Debug)]
pub struct ConnectionRecord {
    pub direction: Direction,
    pub source: End,
    pub destination: End,
    /// The tunnel's far address, for an HBONE connection.
    pub hbone: Option<SocketAddr>,
    pub service: Option<ServiceKey>,
    pub protection: Protection,
    pub verdict: Verdict,
    pub close: CloseReason,
    /// Bytes from source to destination.
    pub received_bytes: u64,
    /// Bytes from destination to source.
    pub sent_bytes: u64,
    pub duration: Duration,
}

impl ConnectionRecord {
    /// Was it ever open? One that was refused or given up was not.
    pub fn was_opened(&self) -> bool {
        !matches!(self.close, CloseReason::Abandoned | CloseReason::Dropped)
    }
}
