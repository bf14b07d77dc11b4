// SPDX-License-Identifier: Apache-2.0
//! What Podveil costs on a cluster of many nodes and pods, measured on the real programs and a real API server.
//!
//! ```text
//!   objects, as kubelets would write them          subscribers: our own client, one a node,
//!        │                                          with the reports of both its modules
//!        ▼                                                  ▲
//!   kube-apiserver ◀──watches── podveil-controller ─────────┤
//!        │                                                  ▼
//!        └── its own watch events: when a change began   podveil-node [proxy], one for real
//! ```
//!
//! [`measure`] fills an API server with a cluster of a given [`Size`], starts `podveil-ca` and `podveil-controller`, and
//! returns [`Figures`]. Nodes and pods are objects alone; nothing runs in them.

#![forbid(unsafe_code)]

mod api;
mod arrivals;
mod figures;
mod measure;
mod objects;
mod process;
mod programs;
mod size;
mod subscriber;

pub use api::{Api, load};
pub use figures::{Figures, Latencies, Restart};
pub use measure::{Bed, measure};
pub use size::Size;
