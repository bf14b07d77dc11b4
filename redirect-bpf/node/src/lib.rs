// SPDX-License-Identifier: Apache-2.0
//! The `redirect` module: brings this node's pods under capture and lets them go again.
//!
//! ```text
//! controller ──xDS──> Cluster ──goals, fence──> Pod (state machine, one each) ──Action──> work in the pod's netns
//!      ^                                         │    ^                                   (find, listen, apply, ..)
//!      └──── reports ────────────────────────────┘    └── acknowledged ── ZDS server <── offers: netns, by descriptor
//!                                                                          listeners' holder <── descriptors
//! ```
//!
//! [`run`] starts and owns these tasks, all ended by its token: the reconcile loop (sole owner of all pods; at most
//! [`run`]'s bound of pieces of work at once), the ZDS server, the holder's server and one task a held listener, the
//! report stream, the xDS client, and for the CNI plugin the server that answers it and the keeper of its place in the
//! node's chain. Between them: `watch` channels of whole states, where a slow reader misses nothing but
//! what has been replaced, and one bounded channel of results of work.
//!
//! What stands in the kernel is read there, never remembered on disk. A stopped module leaves capture in place; the next
//! one finds it, takes the listening sockets back from the proxy, and goes on. One that is started beside it stands by:
//! which of them serves the node is a lock, let go with the process. [`teardown`] removes everything.
//!
//! Left out: what the rules are (`podveil-plan`, `podveil-apply`), and everything that carries bytes.

#![forbid(unsafe_code)]

mod cluster;
mod cni;
mod config;
mod ending;
mod entry;
mod fence_steps;
mod finder;
mod holder;
mod kubelet;
mod listeners;
mod metrics;
mod obstacle;
mod pod;
mod reconcile;
mod reports;
mod run;
mod settling;
mod status;
mod work;
mod zds;

pub use cni::{Answered, CniConfig, InstallError, PluginState};
pub use config::{Find, RedirectConfig};
pub use metrics::register;
pub use obstacle::Obstacle;
pub use podveil_apply::{BackEnd, BackEndChoice, Chosen, Feature, Unusable};
pub use run::{Ended, RedirectError, TeardownError, purge, run, teardown};
pub use status::{PodCondition, PodStatus, Status};
