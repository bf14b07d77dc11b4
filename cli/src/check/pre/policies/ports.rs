// SPDX-License-Identifier: Apache-2.0
//! What a rule's ports say of the connections between enrolled pods, and of the tunnels that take their place.

use k8s_openapi::api::networking::v1::NetworkPolicyPort;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use podveil_model::HBONE_PORT;
use std::ops::RangeInclusive;

/// Names are asked of pods that are rarely enrolled, and a rule about nothing else concerns no tunnel.
const DNS: RangeInclusive<i32> = 53..=53;
const ALL: RangeInclusive<i32> = 1..=65_535;

/// What a rule names.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Ports {
    Tcp(RangeInclusive<i32>),
    /// By the name that a container gives it; nobody names the tunnels' port.
    Named,
    /// What becomes no tunnel.
    NotTcp,
}

/// What all that one rule names comes to; no ports are all ports.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Named {
    Everything,
    /// Tunnels, and others or not.
    Tunnels,
    /// Connections that become tunnels, and not those.
    Connections,
    /// Neither.
    Others,
}

impl Ports {
    pub const ALL: Self = Self::Tcp(ALL);
}

impl Named {
    pub fn by(ports: &[Ports]) -> Self {
        let any = |is: fn(&RangeInclusive<i32>) -> bool| {
            (ports.iter()).any(|one| matches!(one, Ports::Tcp(range) if is(range)))
        };
        if ports.is_empty() || any(|range| *range.start() <= 1 && range.end() == ALL.end()) {
            Self::Everything
        } else if any(|range| range.contains(&HBONE_PORT.into())) {
            Self::Tunnels
        } else if ports.contains(&Ports::Named) || any(|range| *range != DNS) {
            Self::Connections
        } else {
            Self::Others
        }
    }

    pub fn lets_tunnels_through(self) -> bool {
        matches!(self, Self::Everything | Self::Tunnels)
    }
}

impl From<&NetworkPolicyPort> for Ports {
    fn from(port: &NetworkPolicyPort) -> Self {
        if port.protocol.as_deref().is_some_and(|named| named != "TCP") {
            return Self::NotTcp;
        }
        match (&port.port, port.end_port) {
            (None, _) => Self::ALL,
            (Some(IntOrString::Int(first)), last) => Self::Tcp(*first..=last.unwrap_or(*first)),
            (Some(IntOrString::String(_)), _) => Self::Named,
        }
    }
}
