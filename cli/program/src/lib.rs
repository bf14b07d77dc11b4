// SPDX-License-Identifier: Apache-2.0
//! What every program of Podveil shares: its configuration file, its log, its signals and its small HTTP endpoint.
//!
//! Starts no task by itself but those of [`http::serve`]. Knows nothing about what the programs do.

#![forbid(unsafe_code)]

pub mod config;
mod descriptors;
pub mod duration;
pub mod http;
mod log;
mod secrets;
mod signal;

pub use config::{ConfigError, Environment, Override, ProcessEnvironment};
pub use descriptors::raise_descriptor_limit;
pub use duration::HumanDuration;
pub use log::{LogFormat, init_log};
pub use secrets::forbid_core_dumps;
pub use signal::shutdown_signal;
