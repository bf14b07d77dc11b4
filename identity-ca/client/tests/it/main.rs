// SPDX-License-Identifier: Apache-2.0
//! The crate from outside. Certificates are made at test time; `ca` is a CA of its own, so that a fault of the real
//! issuer and a fault of the verifier do not hide each other.

mod ca;
mod fake;
mod handshake;
mod incoming;
mod program;
mod verifier;
mod workload;
