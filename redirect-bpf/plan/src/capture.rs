// SPDX-License-Identifier: Apache-2.0
use podveil_model::{Stage, Workload};
use std::collections::BTreeSet;

/// What is done with a pod's new connections.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Capture {
    pub phase: Phase,
    /// Destination ports that the pod's own connections keep for themselves.
    pub exclude_outbound_ports: BTreeSet<u16>,
    /// Ports of the pod that are reached past the proxy.
    pub exclude_inbound_ports: BTreeSet<u16>,
    /// Ports of the pod that take plain connections from anybody (still through the proxy).
    pub plain_inbound_ports: BTreeSet<u16>,
    /// Refuse a plain SYN from another mandatory workload before the handshake.
    pub refuses_plain: bool,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Phase {
    /// New connections go to the proxy.
    Capturing,
    /// New connections go their own way; those that the proxy carries keep what they need.
    Releasing,
}

impl Capture {
    /// What this workload's namespace should hold, given that it holds something of ours already or not. `None`:
    /// nothing.
    pub fn wanted(workload: &Workload, stands: bool) -> Option<Self> {
        if workload.host_network {
            return None;
        }
        let phase =
            if workload.stage.wants_capture() || (workload.stage == Stage::Draining && stands) {
                Phase::Capturing
            } else if stands {
                Phase::Releasing
            } else {
                return None;
            };
        Some(Self {
            phase,
            exclude_outbound_ports: workload.exclude_outbound_ports.clone(),
            exclude_inbound_ports: workload.exclude_inbound_ports.clone(),
            plain_inbound_ports: workload.plain_inbound_ports.clone(),
            refuses_plain: workload.stage.is_mandatory(),
        })
    }

    /// What is left to do for a workload that nobody wants any more.
    pub fn release() -> Self {
        Self {
            phase: Phase::Releasing,
            exclude_outbound_ports: BTreeSet::new(),
            exclude_inbound_ports: BTreeSet::new(),
            plain_inbound_ports: BTreeSet::new(),
            refuses_plain: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn workload(stage: Stage) -> Workload {
        Arc::unwrap_or_clone(podveil_testing::workload("web").stage(stage).build())
    }

    #[test]
    fn capture_begins_when_wanted_and_outlasts_draining() {
        let phase =
            |stage, stands| Capture::wanted(&workload(stage), stands).map(|capture| capture.phase);
        for stage in [
            Stage::Wanted,
            Stage::Capturable,
            Stage::Announced,
            Stage::Mandatory,
        ] {
            assert_eq!(phase(stage, false), Some(Phase::Capturing), "{stage}");
        }
        assert_eq!(phase(Stage::Draining, true), Some(Phase::Capturing));
        assert_eq!(phase(Stage::Draining, false), None);
        assert_eq!(phase(Stage::None, true), Some(Phase::Releasing));
        assert_eq!(phase(Stage::None, false), None);
    }

    #[test]
    fn a_host_network_workload_is_never_captured() {
        let mut workload = workload(Stage::Mandatory);
        workload.host_network = true;
        assert_eq!(Capture::wanted(&workload, true), None);
    }
}
