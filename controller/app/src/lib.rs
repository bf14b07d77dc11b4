// SPDX-License-Identifier: Apache-2.0
//! `podveil-controller`: reads the cluster, takes the nodes' reports, and publishes over delta xDS what they are to know.
//!
//! ```text
//! source     ──watch──> keeper (one writer of the Index) ──> Publisher ──> xDS streams
//! Reports    ──mpsc───>   │
//!                         └──watch──> state file
//! ```
//!
//! Tasks, all ended by the stop token given to [`Controller::start`]: the source's, the keeper, the writer of the state
//! file, the gRPC server with one task a stream, and the HTTP endpoints. Who calls is proved by TLS; both services take
//! `/podveil/node/<node>` and nobody else.
//!
//! Left out: certificates (the CA decides by its own reading who may have which), and the rules themselves, which are
//! the index's.

#![forbid(unsafe_code)]

mod backends;
mod caller;
mod config;
mod controller;
mod events;
mod keeper;
mod metrics;
mod reports;
mod saved;
mod source;
mod status;
mod uninstall;

pub use config::{Config, OVERRIDES};
pub use controller::{Controller, StartError};
pub use uninstall::{parse_timeout, uninstall};
