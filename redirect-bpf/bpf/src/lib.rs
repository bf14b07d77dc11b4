// SPDX-License-Identifier: Apache-2.0
//! The eBPF programs of capture and fence, and what loads them, pins them and speaks with them.
//!
//! - `programs/`: the programs, in C. `node.bpf.c` stands once on a node, at the root of the cgroup hierarchy and at the
//!   proxy's cgroup; `pod.bpf.c` stands in each pod's network namespace. They touch nothing but their contexts and our
//!   maps, so that one object fits every kernel that has the hooks.
//! - [`Node`]: everything pinned in one folder, `<folder>/v<layout>/`: maps, the node's links, and each pod's. A link
//!   lives in its pin and not in this process, which may end and come back; a newer program takes an older one's place
//!   within the link.
//! - [`Former`]: what a program of another layout has left there.
//! - [`layout`]: what both sides read and write, byte for byte.
//!
//! Starts no task. `unsafe` is in [`mod@layout`] (a promise) and `kernel` (system calls).

mod bpffs;
mod former;
mod kernel;
pub mod layout;
mod links;
mod node;
mod pod_links;
mod pod_object;
mod table;

pub use former::Former;
pub use kernel::{MapSizes, pidfd_open, procfs};
pub use layout::Layout;
pub use node::{Fault, Node, NodeError};
pub use pod_links::Attached;
pub use table::{PodKey, PodTable, Table, TableError};
