// SPDX-License-Identifier: Apache-2.0
//! Simulated nodes and pods on one machine: network namespaces joined by veth links, the real programs inside them.
//!
//! ```text
//!   pod - - veth - - node n1 ===== wire ===== node n2 - - veth - - pod
//!                        \                   /
//!                         `---- cp (CA, controller)
//! ```
//!
//! Used by `podveilctl demo`, the tests of `interop-tests/` and the benches. A [`Sandbox`] owns everything that it
//! makes: namespaces, processes, the run folder and cgroup folders. They go when it is dropped; when its process is
//! killed, a small janitor process removes them instead. Needs root.

#![forbid(unsafe_code)]

pub mod app;
mod capture;
mod client;
mod cluster;
mod command;
pub mod pattern;
mod process;
mod programs;
mod report;
mod sandbox;
mod topology;
mod world;

pub use capture::{Capture, Captured};
pub use client::{http_get, in_netns};
pub use cluster::{ClusterFile, Named, Namespace, Service, ServicePort, WorkloadEntry};
pub use command::{missing_tools, run};
pub use process::Process;
pub use programs::{Binaries, ControlPlane, NodePrograms, NodeSettings, admin_socket};
pub use report::Report;
pub use sandbox::{Sandbox, janitor, remove_leftovers};
pub use topology::{CONTROL_PLANE_ADDRESS, NodeNet, PodNet, Topology};
pub use world::{APP_PORT, Pod, World, eventually};
