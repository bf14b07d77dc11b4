// SPDX-License-Identifier: Apache-2.0
//! Connections to one pod: tunnels on 15008 ([`Inbound`]) and captured plain connections on 15006 ([`PlainInbound`]).
//!
//! A connection passes typed stages, each of which consumes the one before: `Accepted`, then (in a tunnel)
//! `Identified`, then `Permitted`, then `Connected`. The application is dialled only with a permit, and only at the
//! address that the connection was accepted on. `rules` says who may connect; it is asked when a connection opens and
//! again at every change of the state as long as it lives (`registry`).
//!
//! [`Inbound::run`] and [`PlainInbound::run`] own every task: one accept loop for each listener, one task for each
//! tunnel, stream and plain connection, and one that watches the state. They end with `PodContext::stop`, or after
//! `PodContext::drain` with the last connection.
//!
//! Left out: waypoints and application tunnels; how the kubelet is recognised ([`Kubelet`]).

#![forbid(unsafe_code)]

mod hbone;
mod joined;
mod plain;
mod registry;
pub mod rules;
mod shares;
mod target;

pub use hbone::Inbound;
pub use plain::{Kubelet, NoKubelet, PlainInbound};
