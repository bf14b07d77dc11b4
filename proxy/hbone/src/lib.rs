// SPDX-License-Identifier: Apache-2.0
//! HBONE: application connections as HTTP/2 CONNECT streams over one mutual TLS connection.
//!
//! - [`Tunnel`] is the client's side of a tunnel, [`Server`] the server's; each takes a TLS stream (or any other byte
//!   stream, in tests) and leaves identities, policy and pooling to its user.
//! - [`HboneStream`] is one application connection, an end that `podveil_net::relay` understands. A TCP reset is
//!   `RST_STREAM` CONNECT_ERROR, both ways (RFC 9113 §8.5); a half-close is END_STREAM; a lost tunnel is a reset.
//! - [`Authority`], [`Baggage`], [`Forwarded`]: the headers, parsed with bounds and built. `baggage` and `forwarded` are
//!   hints for people and decide nothing.
//!
//! Starts no task: [`Tunnel::open`] hands back a driver future that its user spawns and owns, [`Server::accept`] drives
//! its own connection.

#![forbid(unsafe_code)]

mod authority;
mod baggage;
mod forwarded;
mod keepalive;
mod server;
mod settings;
mod stream;
mod tunnel;

pub use authority::{Authority, AuthorityError, Host};
pub use baggage::{Baggage, BaggageError, WorkloadType};
pub use forwarded::{Forwarded, ForwardedError, traceparent};
pub use server::{Incoming, Server};
pub use settings::{MAX_STREAMS, Settings};
pub use stream::HboneStream;
pub use tunnel::{ConnectRequest, NoSlot, Slot, StreamError, Tunnel, TunnelEnd};

/// Fuzz entry points: each takes any bytes and must neither panic nor use memory out of proportion.
pub mod fuzz {
    pub use crate::authority::fuzz as authority;
    pub use crate::baggage::fuzz as baggage;
    pub use crate::forwarded::fuzz as forwarded;
}
