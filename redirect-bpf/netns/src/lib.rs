// SPDX-License-Identifier: Apache-2.0
//! Network namespaces, packets with descriptors between processes of one node, and the node's cgroup.
//!
//! - [`NetNs`]: a namespace held by descriptor; [`NetNs::run`] does a short piece of work inside it.
//! - [`seqpacket`]: `SOCK_SEQPACKET` Unix sockets on tokio, with descriptor passing and proof of who the peer is.
//! - [`Lease`]: whose turn it is on this node.
//! - [`process`]: another process, by pidfd, and descriptors that it holds.
//! - [`cgroup`]: the cgroup2 folder by which the kernel tells the proxy's sockets from everybody else's.
//! - [`pod_cgroup`]: the pod that a process belongs to, by its cgroup.
//! - [`netlink`]: questions to the kernel about a namespace; [`sock_diag`]: about its TCP sockets.
//!
//! Starts no task. Knows nothing of protocols or rules.

#![deny(unsafe_code)]

pub mod cgroup;
mod lease;
mod namespace;
pub mod netlink;
pub mod pod_cgroup;
pub mod process;
pub mod seqpacket;
pub mod sock_diag;

pub use lease::Lease;
pub use namespace::{NetNs, NetNsError, NetNsId};
