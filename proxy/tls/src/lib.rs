// SPDX-License-Identifier: Apache-2.0
//! Mutual TLS 1.3 between workloads.
//!
//! [`Configs`] is made of one SVID and one trust bundle and lives as long as this pair is in use ([`ConfigCache`]).
//! [`accept`] and [`connect`] hold a handshake to the rules and say whom they met: [`VerifiedPeer`]. No SNI, no
//! resumption, no tickets, ALPN `h2`; key exchange X25519MLKEM768, X25519, P-256. No timeouts here: the caller has the
//! deadline of the whole connection. What the rules for a peer's certificate are is in `podveil_ca_client::verify`.

#![forbid(unsafe_code)]

mod config;
mod handshake;
mod read_ahead;

pub use config::{ConfigCache, Configs};
pub use handshake::{HandshakeError, TlsStream, VerifiedPeer, accept, connect};
pub use read_ahead::ReadAhead;
