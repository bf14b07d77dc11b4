// SPDX-License-Identifier: Apache-2.0
//! What should stand in a pod's network namespace, as data.
//!
//! - [`Capture`]: which new connections are brought to the proxy, from the pod's state alone.
//! - [`Fence`]: the addresses around it that plaintext must not reach, and [`FenceStep`] between two of them.
//! - the numbers that every back end and every operator shares: [`MARK`], [`OWN_MARK`], [`VERIFY_MARK`],
//!   [`ROUTE_TABLE`].
//!
//! No I/O, no clock. `podveil-apply` turns it into rules.

#![forbid(unsafe_code)]

mod capture;
mod fence;

pub use capture::{Capture, Phase};
pub use fence::{Fence, FenceChange, FenceStep};

/// Carried by a connection that the proxy opened to its pod's application (in conntrack) and by each of the
/// application's answers on it (on the packet), so that an answer to a kept client address comes back over `lo`.
pub const MARK: u32 = 0x53a;
/// The bits of a packet mark that are ours to read.
pub const MARK_MASK: u32 = 0xfff;
/// In conntrack on a connection that the proxy opened to anything outside the pod.
pub const OWN_MARK: u32 = 0x53b;
/// On the socket of a connection that verification opens. It is the proxy's, and is captured all the same.
pub const VERIFY_MARK: u32 = 0x53c;
/// Route table and rule priority of the way back over `lo`. Not 100 and 32764: Cilium's and Istio's clean-up deletes
/// those.
pub const ROUTE_TABLE: u32 = 1338;
