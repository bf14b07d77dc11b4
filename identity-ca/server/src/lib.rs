// SPDX-License-Identifier: Apache-2.0
//! The certificate authority: `podveil-ca`.
//!
//! - `store`, `journal`, `ledger`: the record; authorities, bundle sequence and rotation survive restart and kill.
//! - `shared`, `peers`: on Kubernetes, one record for several replicas. Each serves; the one that has the Lease acts.
//! - `entitlement`, `cluster`, `reading`: who may have which identity, from the CA's own reading of the cluster.
//! - `anonymous`, `first_contact`, `admission`, `issuance`: who asks, how often, and the answer; [`Refusal`] names every
//!   reason.
//! - `own`: the CA's own SVID. `consumers`: who holds which bundle.
//! - [`rotation`], `drill`: rotations as a machine without I/O, and the task that runs it.
//! - `service`, `server`: gRPC over TLS 1.3 for programs, gRPC on a Unix socket for a person.
//!
//! Tasks, all ending with the token given to [`RunningCa::start`]: the two servers, one for each bundle stream, one that
//! follows the cluster, one that keeps the own SVID, one that runs rotations; on Kubernetes also the election, one that
//! follows the record, one that publishes the roots, one that exchanges acknowledgements. They meet in `watch` channels,
//! which always hold the newest value: the ledger's [`Snapshot`], the entitlements, the standing in the election, and the
//! notice that a consumer changed.
//!
//! Left out: the profile of certificates (`podveil-ca-issuer`), TLS and the check of peers (`podveil-ca-client`).

#![forbid(unsafe_code)]

mod admin_stdio;
mod admission;
mod anonymous;
mod api;
mod cluster;
mod config;
mod consumers;
mod drill;
mod entitlement;
mod first_contact;
mod issuance;
mod journal;
mod kubernetes;
mod ledger;
mod metrics;
mod own;
mod peers;
mod reading;
mod refusal;
pub mod rotation;
mod server;
mod service;
mod shared;
mod store;
mod waiting;

pub use admin_stdio::admin_stdio;
pub use config::{
    Config, DEFAULT_ADMIN_SOCKET, FirstContactConfig, LimitsConfig, OVERRIDES, RotationConfig,
    StoreConfig,
};
pub use ledger::{Ledger, LedgerError, Lives, Snapshot};
pub use refusal::{REASON_KEY, Refusal};
pub use server::{RunningCa, run};
pub use store::{
    Directory, DirectoryError, Kept, KubeSecret, Record, SecretError, Store, StoreError,
};
