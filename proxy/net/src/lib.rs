// SPDX-License-Identifier: Apache-2.0
//! Sockets of the data path: what a captured connection dialled, sockets inside a pod's network namespace, and the
//! relay that carries bytes between two ends.
//!
//! The relay knows two kinds of end through one trait, [`Duplex`]: a TCP socket (here) and an HBONE stream (in
//! `podveil-hbone`). This crate starts no task and decides nothing about who may talk to whom.

#![forbid(unsafe_code)]

mod chunks;
mod duplex;
mod original_dst;
mod pod_sockets;
mod relay;
mod tcp;

pub use chunks::Chunks;
pub use duplex::{Broken, Duplex};
pub use original_dst::{NoOriginalDst, original_dst};
pub use pod_sockets::{ConnectError, Family, KEPT_SOURCE_PORTS, ListenError, MARK, PodSockets};
pub use relay::{Counters, Ended, Side, relay};
pub use tcp::{READ_CHUNK, TcpEnd, prepare_application, prepare_tunnel};
