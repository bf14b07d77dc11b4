// SPDX-License-Identifier: Apache-2.0
//! Who may connect to this pod: the same rules when a connection opens and as long as it lives.

use podveil_flow::{CloseReason, DropReason, Verdict};
use podveil_identity::WorkloadIdentity;
use podveil_model::{Mode, Uid, Workload};
use podveil_policy::{Connection, Denied, Permit};
use podveil_state::View;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// What is looked at: what was proved and what the kernel saw, never what a peer says about itself.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The workload that this pod is.
    pub uid: Uid,
    pub source_ip: IpAddr,
    pub source: Source,
    /// This pod's own address and the application's port.
    pub destination: SocketAddr,
}

#[derive(Clone, Debug)]
pub enum Source {
    /// In a tunnel: the identity is proved. `uid` is the workload found for it when the tunnel was accepted.
    Proved {
        identity: WorkloadIdentity,
        uid: Uid,
    },
    /// Plain, and from this node's own kubelet: as much as a plain connection, and a probe where the pod's spec says so.
    Kubelet,
    Plain,
}

impl Source {
    fn identity(&self) -> Option<&WorkloadIdentity> {
        match self {
            Self::Proved { identity, .. } => Some(identity),
            Self::Kubelet | Self::Plain => None,
        }
    }
}

/// When the rules are asked.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Moment {
    Opening,
    /// The connection is open: what holds for new connections only is left out.
    Living,
}

/// The proof that this connection may be made.
#[derive(Clone, Debug)]
pub struct Allowed {
    pub workload: Arc<Workload>,
    pub by: By,
}

/// What allowed it.
#[derive(Clone, Debug)]
pub enum By {
    Policy(Permit),
    /// It is a probe that the pod's own spec asks for: neither mode nor policy is asked.
    Probe,
}

impl Allowed {
    pub fn verdict(&self) -> Verdict {
        let rule = match &self.by {
            By::Policy(permit) => {
                let rule = permit.rule.as_ref();
                rule.map(|(policy, rule)| format!("{policy} rule {rule}"))
            }
            By::Probe => Some("kubelet probe".to_owned()),
        };
        Verdict::Allowed { rule }
    }
}

/// Why it may not be made, or not go on.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Refused {
    #[error("this pod's workload {uid} is not known here")]
    WorkloadNotKnown { uid: Uid },
    #[error("{ip} is not an address of this pod")]
    NotOurAddress { ip: IpAddr },
    #[error("no workload with address {ip} is known")]
    SourceNotKnown { ip: IpAddr },
    #[error("{ip} belongs to no workload of {identity}")]
    SourceMismatch {
        ip: IpAddr,
        identity: WorkloadIdentity,
    },
    #[error("the workload {uid} at the other end is gone")]
    SourceGone { uid: Uid },
    #[error("plain from {peer}, and both ends are mandatory")]
    Mandatory { peer: Uid },
    #[error("plain from {ip}, which is not known and may be mandatory, as this pod is")]
    MayBeMandatory { ip: IpAddr },
    #[error("plain, and this workload is strict")]
    Strict,
    #[error(transparent)]
    Policy(Denied),
}

impl Refused {
    /// May a state that is on its way change the answer?
    pub fn may_change(&self) -> bool {
        matches!(
            self,
            Self::WorkloadNotKnown { .. }
                | Self::SourceNotKnown { .. }
                | Self::MayBeMandatory { .. }
                | Self::Policy(Denied::Unknown { .. })
        )
    }

    /// Whose address the control plane is asked for, once.
    pub fn asks_for(&self) -> Option<IpAddr> {
        match self {
            Self::SourceNotKnown { ip } | Self::MayBeMandatory { ip } => Some(*ip),
            _ => None,
        }
    }

    pub fn reason(&self) -> DropReason {
        match self {
            Self::WorkloadNotKnown { .. } => DropReason::WorkloadNotKnown,
            Self::NotOurAddress { .. } => DropReason::BadTarget,
            Self::SourceNotKnown { .. } | Self::SourceMismatch { .. } | Self::SourceGone { .. } => {
                DropReason::PeerAddressMismatch
            }
            Self::Mandatory { .. } | Self::MayBeMandatory { .. } => DropReason::PlaintextMandatory,
            Self::Strict => DropReason::PlaintextStrict,
            Self::Policy(_) => DropReason::PolicyDenied,
        }
    }

    /// How a living connection ends that is refused from now on.
    pub fn close(&self) -> CloseReason {
        match self {
            Self::WorkloadNotKnown { .. }
            | Self::NotOurAddress { .. }
            | Self::SourceNotKnown { .. }
            | Self::SourceMismatch { .. }
            | Self::SourceGone { .. } => CloseReason::WorkloadGone,
            Self::Mandatory { .. }
            | Self::MayBeMandatory { .. }
            | Self::Strict
            | Self::Policy(_) => CloseReason::PolicyChanged,
        }
    }

    pub fn verdict(&self) -> Verdict {
        Verdict::Dropped {
            reason: self.reason(),
            detail: self.to_string(),
        }
    }
}

/// # Errors
/// The first rule that the connection breaks.
pub fn check(view: &View, facts: &Facts, moment: Moment) -> Result<Allowed, Refused> {
    let workload = local(view, &facts.uid, facts.destination.ip())?;
    match &facts.source {
        Source::Proved { identity, uid } => {
            let peer = check_peer(view, facts.source_ip, identity)?;
            if peer.uid != *uid {
                return Err(Refused::SourceGone { uid: uid.clone() });
            }
        }
        Source::Kubelet if workload.probe_ports.contains(&facts.destination.port()) => {
            return Ok(Allowed {
                workload: workload.clone(),
                by: By::Probe,
            });
        }
        Source::Kubelet | Source::Plain => check_plain(view, workload, facts, moment)?,
    }
    let connection = Connection {
        source: facts.source.identity(),
        source_ip: facts.source_ip,
        destination: facts.destination,
    };
    let permit = view
        .policies()
        .evaluate(workload, &connection)
        .map_err(Refused::Policy)?;
    Ok(Allowed {
        workload: workload.clone(),
        by: By::Policy(permit),
    })
}

/// This pod's workload, which must have the address that was dialled: we never dial another.
///
/// # Errors
/// If the workload is not known or the address is not its own.
pub(crate) fn local<'a>(
    view: &'a View,
    uid: &Uid,
    ip: IpAddr,
) -> Result<&'a Arc<Workload>, Refused> {
    let workload = view
        .by_uid(uid)
        .ok_or_else(|| Refused::WorkloadNotKnown { uid: uid.clone() })?;
    if workload.addresses.contains(&ip) {
        Ok(workload)
    } else {
        Err(Refused::NotOurAddress { ip })
    }
}

/// The workload that has this address and this identity: a certificate is good only at its own pods' addresses.
///
/// # Errors
/// If there is none. Nobody at all known at the address may be a state that is on its way.
pub(crate) fn check_peer<'a>(
    view: &'a View,
    ip: IpAddr,
    identity: &WorkloadIdentity,
) -> Result<&'a Arc<Workload>, Refused> {
    if let Some(peer) = view.by_address_and_identity(ip, identity) {
        return Ok(peer);
    }
    Err(
        if view.all_by_address(ip).is_empty() || view.is_unheard_of(ip) {
            Refused::SourceNotKnown { ip }
        } else {
            Refused::SourceMismatch {
                ip,
                identity: identity.clone(),
            }
        },
    )
}

fn check_plain(
    view: &View,
    workload: &Workload,
    facts: &Facts,
    moment: Moment,
) -> Result<(), Refused> {
    let port = facts.destination.port();
    let exempt = workload.plain_inbound_ports.contains(&port)
        || workload.exclude_inbound_ports.contains(&port);
    if exempt {
        return Ok(());
    }
    if workload.mode == Mode::Strict {
        return Err(Refused::Strict);
    }
    // A plain connection that was opened before both ends were mandatory goes on.
    if moment == Moment::Living || !workload.stage.is_mandatory() {
        return Ok(());
    }
    let sources = view.all_by_address(facts.source_ip);
    if let Some(peer) = sources.iter().find(|source| source.stage.is_mandatory()) {
        return Err(Refused::Mandatory {
            peer: peer.uid.clone(),
        });
    }
    // Somebody we have not heard of may be mandatory. Nobody's address, as the control plane says, is a node's.
    let ip = facts.source_ip;
    if view.is_unheard_of(ip) {
        return Err(Refused::MayBeMandatory { ip });
    }
    Ok(())
}

#[cfg(test)]
#[path = "rules_tests.rs"]
mod tests;
