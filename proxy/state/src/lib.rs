// SPDX-License-Identifier: Apache-2.0
//! What the proxy knows of the cluster, and what every pod's paths share.
//!
//! A [`View`] is one immutable state of everything: workloads, services, endpoints, policies, mesh configuration.
//! Connections read the newest one through a [`StateHandle`] without a lock; [`View::resolve`] gives one of the four
//! answers about a destination. One task, [`StateTask::run`], is the only writer: it takes batches from the xDS client,
//! publishes the view that holds them, and only then lets the client acknowledge them.
//!
//! A node may hold everything, or [on demand](OnDemand) no more than its own workloads and what their connections have asked
//! for: a destination or a peer by its [`Lookup`](podveil_model::Lookup), answered with all that the answer depends on and kept
//! up to date as long as it is used. Then nothing is concluded from what is not there, unless it was asked for.
//!
//! [`PodContext`] is all that the paths of one pod are given. They reach the network through [`Dial`] and say what
//! became of connections through [`Recorder`], so that both can be replaced in tests.

#![forbid(unsafe_code)]

mod accept;
mod affinity;
mod bounded;
mod context;
mod endpoints;
mod handle;
mod interest;
mod limits;
mod recorder;
mod resolve;
mod task;
#[cfg(feature = "testing")]
pub mod testing;
mod uses;
mod view;

pub use accept::{Listener, serve};
pub use affinity::Affinity;
pub use context::{Dial, Dialing, PodContext};
pub use handle::{Need, StateHandle, StateWriter, Word, channel};
pub use limits::Limits;
pub use recorder::{ConnectionId, Discard, Recorder};
pub use task::{OnDemand, StateTask, Version};
pub use uses::Pin;
pub use view::{Insert, View};
