// SPDX-License-Identifier: Apache-2.0
//! Delta-ADS client: what a node knows about the cluster, kept equal to what the control plane says.
//!
//! [`Session`] is the protocol without sockets and clocks: subscriptions, answers, versions, tombstones, backoff.
//! [`Client::start`] puts it on a gRPC channel. [`parse`] is the only place where wire resources become types of
//! `core/`; a resource it cannot understand is refused by name, and what was held before stays in use.
//!
//! One task is started, owned by the [`CancellationToken`](tokio_util::sync::CancellationToken) given to
//! [`Client::start`]. Channels out: [`Batch`]es (bounded; while it is full nothing more is read from the stream) and
//! [`Status`]. Channel in: [`Demand`] (bounded; a full one is an error to the asker).
//!
//! Left out: choosing among replicas ([`Servers`]), TLS (the channel brings it), and what the updates mean, which is
//! `proxy/state`'s.

#![forbid(unsafe_code)]

mod client;
mod config;
mod counts;
pub mod parse;
mod servers;
mod session;
mod update;

pub use client::{AskError, Client, Demand, Wish};
pub use config::{Config, NodeInfo};
pub use counts::{Counts, Termination};
pub use servers::Servers;
pub use session::{AskRefused, Lost, Received, Session};
pub use update::{Acknowledge, Batch, Rejected, ResourceType, Status, Update};
