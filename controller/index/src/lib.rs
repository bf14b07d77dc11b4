// SPDX-License-Identifier: Apache-2.0
//! What the controller knows, joined: the state of the cluster, the nodes' reports, and from both the enrolment of each
//! workload and the snapshot that is published.
//!
//! [`Index`] has one writer and does no I/O: it is told things together with `now`, answers with a [`Snapshot`] when
//! there is a new one, and says when to be asked again. It
//! - drops finished pods, whose addresses may already be another's;
//! - settles addresses that two pods claim (the newest running one has it, the other is named in the status);
//! - derives endpoints from services;
//! - walks each workload through enrolment ([`Stage`](podveil_model::Stage)) and gives each step its epoch;
//! - keeps the last good value of a label or annotation that cannot be read, takes the strictest where none is known, and
//!   names it in the status.
//!
//! ```text
//! Cluster ──> Index::apply ──┐                ┌──> Snapshot ──> Index::published(number)
//! Report  ──> Index::report ─┴─> Index::poll ─┤
//!                                             └──> Index::next_wakeup
//! ```
//!
//! Left out: where a cluster is read (`podveil-source`), how a snapshot travels (`podveil-xds-server`).

#![forbid(unsafe_code)]

mod difference;
mod enrolment;
mod entry;
mod index;
mod letting_go;
mod mesh;
mod nodes;
mod resolve;
mod settings;
mod snapshot;
mod status;

pub use enrolment::{Held, Saved, SavedWorkload};
pub use entry::{NotBegun, NotWanted};
pub use index::{Awaited, AwaitedWorkload, Index, Start};
pub use letting_go::{Done, Holding, LettingGo, Why};
pub use nodes::{Condition, Module, Report, SILENCE, WorkloadReport};
pub use snapshot::Snapshot;
pub use status::{ModuleStatus, NodeStatus, Status, WorkloadStatus};
