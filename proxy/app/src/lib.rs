// SPDX-License-Identifier: Apache-2.0
//! The node program: configuration, and the `proxy` module's life around the data path of the other crates.
//!
//! [`proxy`] lists every task of the module and the channels between them. What a connection goes through is in
//! `podveil-outbound` and `podveil-inbound`; what is known of the cluster in `podveil-state`; capture and the holder of
//! listeners in `podveil-redirect`, which this program hosts as its other module.

#![forbid(unsafe_code)]

pub mod access_log;
pub mod admin;
mod backoff;
pub mod config;
mod endpoints;
mod kubelet;
mod line_limit;
pub mod log;
pub mod metrics;
pub mod pods;
mod prefetch;
pub mod process;
pub mod proxy;
pub mod ready;
mod recorder;
pub mod redirect;
mod remains;
pub mod reports;
pub mod supervisor;
#[cfg(test)]
mod testing;
pub mod zds;
