// SPDX-License-Identifier: Apache-2.0
//! The rules of issuing X.509-SVIDs, without I/O: authorities, what is taken from a request, the leaf profile, the
//! shape of an answered chain.
//!
//! From a certificate request only the public key is taken ([`Csr`]); who the certificate names is the caller's
//! decision, given as a parsed [`SpiffeId`](podveil_identity::SpiffeId). Each certificate is parsed and checked again
//! after it was signed, so a fault in the builder cannot leave this crate.
//!
//! Left out: who may have which identity, where keys are kept, and when authorities change; that is `podveil-ca`.
//! Time is a parameter everywhere.

#![forbid(unsafe_code)]

mod authority;
mod chain;
mod check;
mod csr;
mod leaf;
mod serial;

pub use authority::{Authority, AuthorityError, Role, end_of_life};
pub use chain::chain;
pub use check::CheckError;
pub use csr::{Csr, CsrError, MAX_CSR_BYTES, SubjectKey};
pub use leaf::{IssueError, Leaf};
pub use serial::{Serial, SerialError};
