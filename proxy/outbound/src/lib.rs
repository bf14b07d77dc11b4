// SPDX-License-Identifier: Apache-2.0
//! Connections from one pod, captured to 15001.
//!
//! A connection is accepted, checked to be the pod's own, resolved to one of the four answers, joined to a tunnel or a
//! plain connection, carried, and recorded. While an answer, a certificate or a tunnel is missing it is held, within the
//! hold bound; whatever fails after the accept is a reset for the application, never a clean end.
//!
//! [`Outbound::run`] owns every task: one accept loop for each listener, one task for each connection, one driver for
//! each tunnel, and one that holds the tunnels against changes of state, certificate and trust. They end with
//! `PodContext::stop`, or after `PodContext::drain` with the last connection.
//!
//! Left out: policy, which is the destination's to apply; balancing by load.

#![forbid(unsafe_code)]

mod accepted;
mod connect;
mod path;
mod pool;
mod refused;
mod rules;
mod tunnels;

pub use path::Outbound;
pub use rules::{PlainRefused, check_plain};
