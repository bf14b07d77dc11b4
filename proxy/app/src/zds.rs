// SPDX-License-Identifier: Apache-2.0
//! ZDS, the proxy's side: an agent on the node hands pods over, each with its network namespace.
//!
//! [`Session`] understands the packets of one connection and does no I/O. [`run`] is the shell: it connects, says hello,
//! answers one packet at a time, and connects again when the connection is lost. What pods mean is behind
//! [`Workloads`]. While there is no connection, the pods that are known go on.

mod client;
mod listeners;
mod session;

pub use client::{Status, Workloads, run};
pub use listeners::{ListenersError, PodListeners, fetch};
pub use session::{AddedWorkload, PacketError, Request, Session, WorkloadInfo};

/// Longest packet either side sends, as the peers have it.
const MAX_PACKET_BYTES: usize = 1024;

#[cfg(test)]
mod tests;
