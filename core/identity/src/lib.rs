// SPDX-License-Identifier: Apache-2.0
//! The Kubernetes view of SPIFFE IDs.
//!
//! [`SpiffeId`] and [`TrustDomain`] come from the `spiffe` crate. This crate adds the two shapes that Podveil gives
//! meaning to: a workload, `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`, and one of our own
//! programs, `spiffe://<trust domain>/podveil/...`. An ID is data: it is parsed into parts and built again from them,
//! never echoed.

#![forbid(unsafe_code)]

mod program;
mod workload;

pub use program::ProgramIdentity;
pub use spiffe::{SpiffeId, TrustDomain};
pub use workload::{KubernetesName, WorkloadIdentity};

/// Why a SPIFFE ID or one of its parts is not what it should be.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum IdentityError {
    #[error(
        "{name:?} is not a Kubernetes name: 1 to 253 of a-z, 0-9, '-', '.', beginning and ending with a letter or digit"
    )]
    BadName { name: String },
    #[error("{id} is not the ID of one of Podveil's programs")]
    NotAProgram { id: SpiffeId },
    #[error("{id} is not the ID of a workload (/ns/<namespace>/sa/<service account>)")]
    NotAWorkload { id: SpiffeId },
    #[error("{text:?} is not a SPIFFE ID")]
    NotSpiffe {
        text: String,
        #[source]
        source: spiffe::SpiffeIdError,
    },
}
