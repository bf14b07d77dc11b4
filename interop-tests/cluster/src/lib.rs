// SPDX-License-Identifier: Apache-2.0
//! Real Kubernetes on one machine, for tests and the demo: nothing of it is mocked.
//!
//! [`ApiServer`] is etcd and a kube-apiserver alone, on loopback, within seconds; any number side by side.
//!
//! The programs are Go modules pinned under `tools/`, built once into a cache outside the tree ([`tools`]). Whatever is
//! started here ends with its owner, also when that is killed.

#![forbid(unsafe_code)]

mod api_server;
mod keys;
mod kubeconfig;
mod process;
pub mod tools;

pub use api_server::{ApiServer, Controllers};
pub use process::Program;
