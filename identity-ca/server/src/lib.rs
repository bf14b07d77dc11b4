// SPDX-License-Identifier: Apache-2.0
//! The certificate authority: `podveil-ca`.
//!
//! - `store`, `ledger`: the data directory; authorities, bundle sequence and rotation survive restart and kill.
//! - `entitlement`, `cluster`: who may have which identity, from the CA's own reading of the cluster.
//! - `anonymous`, `tokens`, `admission`, `issuance`: who asks, how often, and the answer; [`Refusal`] names every reason.
//! - `own`: the CA's own SVID. `consumers`: who holds which bundle.
//! - [`rotation`], `drill`: rotations as a machine without I/O, and the task that runs it.
//! - `service`, `server`: gRPC over TLS 1.3 for programs, gRPC on a Unix socket for a person.
//!
//! Tasks, all ending with the token given to [`RunningCa::start`]: the two servers, one for each bundle stream, one that
//! follows the cluster, one that keeps the own SVID, one that runs rotations. They meet in three `watch` channels, which
//! always hold the newest value: the ledger's [`Snapshot`], the entitlements, and the notice that a consumer changed.
//!
//! Left out: the profile of certificates (`podveil-ca-issuer`), TLS and the check of peers (`podveil-ca-client`).

#![forbid(unsafe_code)]

mod admission;
mod anonymous;
mod cluster;
mod config;
mod consumers;
mod drill;
mod entitlement;
mod issuance;
mod ledger;
mod metrics;
mod own;
mod refusal;
pub mod rotation;
mod server;
mod service;
mod store;
mod tokens;

pub use config::{Config, LimitsConfig, OVERRIDES, RotationConfig};
pub use ledger::{Ledger, LedgerError, Lives, Snapshot};
pub use refusal::{REASON_KEY, Refusal};
pub use server::{RunningCa, run};
pub use store::{Store, StoreError};
