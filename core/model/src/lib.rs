// SPDX-License-Identifier: Apache-2.0
//! What Podveil knows about a cluster: workloads, services, endpoints, addresses, and where each stands in enrolment.
//!
//! No I/O and no wire types: `xds/client` and `controller/source` parse into these, everything else reads them.

#![forbid(unsafe_code)]

mod address;
mod answer;
mod enrolment;
mod lookup;
mod mesh;
mod service;
mod workload;

pub use address::{
    HBONE_PORT, HboneTarget, INBOUND_PORT, LocalAddr, NotDialable, OUTBOUND_PORT, OriginalDst,
    PeerAddr, VERIFICATION_V4, VERIFICATION_V6, check_target, is_own_port, is_verification,
};
pub use answer::{Answer, PlainReason, Unresolved, Upstream};
pub use enrolment::{Epoch, Mode, Stage};
pub use lookup::{Lookup, Question, digest};
pub use mesh::MeshConfig;
pub use service::{Balancing, EndpointPorts, Scope, Service, ServiceKey, ServicePort};
pub use workload::{Decision, External, Health, Locality, Uid, Workload};
