// SPDX-License-Identifier: Apache-2.0
//! Delta-ADS server: one snapshot of the cluster, kept equal at many subscribers by sending them the differences.
//!
//! [`Publisher::publish`] takes the whole state in types of `core/`, gives each resource a version from its content,
//! and wakes subscribers if anything changed. Each stream is a state machine without I/O that always
//! goes from what it sent last straight to the newest snapshot: there is no queue of old pushes. A resource is encoded
//! once, whoever is sent it, and a response is put together as its connection takes it.
//! [`DiscoveryService`] puts it on gRPC and asks its `authorize` closure who calls.
//!
//! One task per stream is started. It ends with the stream or with the stop token given to the service.

#![forbid(unsafe_code)]

mod body;
mod encode;
mod found_by;
mod published;
mod publisher;
mod requests;
mod resources;
mod response;
mod service;
mod snapshot;
mod subscriber;
mod version;

pub use publisher::Publisher;
pub use resources::delimited;
pub use service::{Caller, DiscoveryService};
pub use snapshot::Snapshot;
pub use version::{Version, VersionError};
