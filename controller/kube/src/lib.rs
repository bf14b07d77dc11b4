// SPDX-License-Identifier: Apache-2.0
//! The state of a Kubernetes cluster, followed through its API: [`KubeSource`].
//!
//! Each kind of object is watched by a task of its own. An object is converted to the few fields that anyone here reads
//! as soon as it arrives, and nothing else of it is kept; a change of anything else wakes nobody. What was read is joined
//! to one [`Cluster`](podveil_source::Cluster), a few milliseconds after the first of a burst of changes.
//!
//! The first `Cluster` is there when every watch has read its whole list. A watch that breaks keeps what it has, says so
//! in the [`Status`](podveil_source::Status), and goes on by itself.
//!
//! Beside it, [`Election`]: which of several replicas acts; and [`Backend`]: what the API server itself dials.
//!
//! Left out: what the state means (`podveil-index`), and everything else that is written to the API.

#![forbid(unsafe_code)]

mod backends;
mod client;
mod endpoints;
mod follow;
mod join;
mod kinds;
mod lease;
mod objects;
mod pages;
mod pods;
mod services;
mod source;
mod table;

pub use backends::Backend;
pub use client::{ClientError, Patience, client, client_of};
pub use k8s_openapi;
pub use kube;
pub use lease::{Election, LEASE_DURATION, Standing};
pub use objects::UNINSTALL;
pub use pages::each;
pub use source::{KubeOptions, KubeSource, Scope, UNINSTALL_CONFIG_MAP};
