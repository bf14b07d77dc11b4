// SPDX-License-Identifier: Apache-2.0
//! What every program of Podveil needs of the CA, and the one place where TLS between them is configured.
//!
//! - [`TrustBundle`], [`Svid`], [`Credentials`]: what is held. Private keys are made here and never leave the process.
//! - [`verify`]: the SPIFFE rules for a peer's certificate, as verifiers for both sides of a rustls connection.
//! - [`transport`]: gRPC channels and listeners over TLS 1.3 whose peer must prove an exact SPIFFE ID.
//! - [`renewal`]: when to ask for a certificate; a state machine without I/O or clock.
//! - [`ProgramCredentials`]: this program's own SVID and the trust bundle, kept fresh. One task.
//! - [`WorkloadCertificates`]: the SVIDs of the workloads of this node, one per identity. One task.
//!
//! Left out: issuing (`podveil-ca-issuer`), keys on disk (there are none), TLS between workloads (`podveil-tls`).
//!
//! Channels out: `watch` of [`Credentials`], of [`TrustBundle`], and of each workload's [`Svid`]; a reader always finds
//! the newest value and nothing queues. Both tasks end with their `CancellationToken`.

#![forbid(unsafe_code)]

mod authority;
mod bundle;
mod key;
mod program;
pub mod renewal;
mod svid;
pub mod transport;
pub mod verify;
mod workload;

pub use authority::{GENERATION_HEADER, IssueError};
pub use bundle::{BundleError, TrustBundle};
pub use key::{Key, KeyError};
pub use program::{Module, ProgramConfig, ProgramCredentials};
pub use svid::{Credentials, Svid, SvidError};
pub use workload::{
    CertificateState, CertificateStatus, Held, WorkloadCertificates, WorkloadLimits,
    WorkloadSvidError,
};
