// SPDX-License-Identifier: Apache-2.0
//! Real Kubernetes on one machine, for tests and the demo: nothing of it is mocked.
//!
//! ```text
//!   control: etcd, kube-apiserver, controllers, scheduler ── bridge ── link to this host
//!                                                            │    │
//!       node-1: containerd, kubelet, kube-proxy, pods ───────┘    └─────── node-2: the same
//! ```
//!
//! [`ApiServer`] is etcd and a kube-apiserver alone, on loopback, within seconds; any number side by side. [`Cluster`] is
//! two whole nodes, dual stack. Each of its three machines has mount, network and PID namespaces of its own, and memory in
//! place of every folder that it writes to: when its first process ends, the kernel removes all of it.
//!
//! The programs are Go modules pinned under `tools/`, built once into a cache outside the tree ([`tools`]). Whatever is
//! started here ends with its owner, also when that is killed. Needs root for [`Cluster`].

#![forbid(unsafe_code)]

mod api_server;
mod cluster;
pub mod enrolment;
mod folder;
mod image;
pub mod journey;
mod keys;
mod kubeconfig;
mod load;
mod machine;
mod node;
mod outage;
pub mod podveil;
mod process;
mod server;
pub mod tools;
pub mod traces;
pub mod wire;

pub use api_server::{ApiServer, Controllers};
pub use cluster::{Cluster, missing_programs};
pub use image::APP_IMAGE;
pub use load::{Load, Served};
pub use machine::Machine;
pub use node::Node;
pub use process::Program;
