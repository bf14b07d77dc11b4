// SPDX-License-Identifier: Apache-2.0
//! `podveil-cni`, the last plugin of a node's CNI chain: a pod of an enrolled namespace goes on only when capture stands in
//! its network namespace, so that nothing in it, init containers included, sends or answers before that.
//!
//! It has no access to any API and decides nothing: [`run`] tells the node program which pod it is, hands it the network
//! namespace by descriptor, and passes the result of the plugins before it on unchanged, or says why not. CNI 0.3.1 to
//! 1.1.0.
//!
//! Where the node program cannot be asked, a file says which namespaces are [`NotEnrolled`]: their pods start.
//!
//! [`wire`] is what the two say to each other, [`ConfList`] edits the list that the plugin stands in; the node program uses
//! both. Starts nothing, keeps nothing.

#![forbid(unsafe_code)]

mod ask;
mod config;
mod environment;
mod failure;
mod list;
mod namespaces;
mod plugin;
pub mod wire;

pub use ask::AskError;
pub use config::{Config, ConfigError, Settings};
pub use environment::{Arguments, Attachment, EnvironmentError, Verb};
pub use failure::Failure;
pub use list::{ConfList, ListError};
pub use namespaces::NotEnrolled;
pub use plugin::{PLUGIN, Variables, run};
