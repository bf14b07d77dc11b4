// SPDX-License-Identifier: Apache-2.0
//! The state of a cluster as it was written down: [`Cluster`], and where it is read from.
//!
//! [`SourceConfig`] names the source: the Kubernetes API (`podveil-kube`), or a YAML file or a directory of them
//! ([`FileSource`]). The controller and the CA each read it for themselves, so that neither has to believe the other.
//!
//! Task: `FileSource::start` spawns one, which ends with its [`CancellationToken`](tokio_util::sync::CancellationToken).
//! In: file-system notices. Out: two `watch` channels, the last good [`Cluster`] and the [`Status`] of the last
//! reading. A broken file changes only the status.
//!
//! Left out: what the state means. Endpoints, duplicates and enrolment are `podveil-index`'s.

#![forbid(unsafe_code)]

mod cluster;
mod config;
mod file;
mod parse;
mod policy;
mod ports;
mod rules;
mod watch;

pub use cluster::{
    Cluster, Endpoint, Namespace, Node, Phase, Pod, PolicyEntry, Ranges, ServiceEntry, Target,
    labels,
};
pub use config::SourceConfig;
pub use parse::{Fault, ParseError, parse};
pub use ports::{BadPorts, ports, shortened};
pub use rules::{BadLabel, Defaults, NotEnrolled, Rules};
pub use watch::{FileSource, LoadError, Status, load};
