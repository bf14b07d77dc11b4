// SPDX-License-Identifier: Apache-2.0
//! The four answers about a destination.

use crate::{HboneTarget, ServiceKey, Uid, Workload};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// What is known about an original destination. There is no fifth answer: whoever matches on it has handled all.
#[derive(Clone, Debug)]
pub enum Answer {
    /// A tunnel to one of these, best first.
    Enrolled(Vec<Upstream>),
    /// Known and not enrolled, or left out of capture by its ports: plain, counted and logged as plain.
    Plain {
        reason: PlainReason,
        upstreams: Vec<Upstream>,
    },
    /// Outside the cluster: plain to the original destination, or refused by setting.
    Outside,
    /// Inside the ranges of pods and services and yet not known: ask, hold, then refuse. Never plain.
    NotKnown(Unresolved),
}

/// One endpoint that can serve the connection.
#[derive(Clone, Debug)]
pub struct Upstream {
    pub workload: Arc<Workload>,
    /// The service that the application dialled, if it dialled one.
    pub service: Option<ServiceKey>,
    /// The workload's own address and port.
    pub address: SocketAddr,
}

impl Upstream {
    pub fn hbone(&self) -> HboneTarget {
        HboneTarget::direct(self.address)
    }
}

#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum PlainReason {
    /// The destination is known and not (or no longer) announced.
    NotEnrolled,
    /// The destination's port is excluded from inbound capture.
    PortExcluded,
}

#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Unresolved {
    #[error("{ip} may belong to the cluster and nothing is known about it")]
    Address { ip: IpAddr },
    #[error("service {service} has no endpoint that can take a connection")]
    NoEndpoint { service: ServiceKey },
    #[error("service {service} has no port {port}")]
    NoPort { service: ServiceKey, port: u16 },
    #[error("workload {uid} has no address of this family")]
    NoAddress { uid: Uid },
    /// It may still turn out to be somebody's.
    #[error("the control plane has not told everything yet, and {ip} may belong to the cluster")]
    NotSynced { ip: IpAddr },
}
