// SPDX-License-Identifier: Apache-2.0
//! The node's side of `podveil-cni`: puts the plugin into the node's CNI chain and answers what it asks, so that a pod that
//! is to be captured starts only then.

mod admissions;
mod install;
mod namespaces;
mod server;

pub use admissions::{Admissions, Facts};
pub(crate) use install::remove_file;
pub use install::{InstallError, Installation, keep};
pub use namespaces::{Namespaces, tell};
pub use server::{Ask, serve};

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

/// What the hosting program says about the plugin.
#[derive(Clone, Debug)]
pub struct CniConfig {
    /// `false`: it is taken out where it is found.
    pub enabled: bool,
    /// Where the plugin asks, by the same name in this program and on the node.
    pub socket: PathBuf,
    /// The program to be copied.
    pub plugin: PathBuf,
    /// The container runtime's folders, as this program sees them.
    pub bin_dir: PathBuf,
    pub conf_dir: PathBuf,
    /// Does a pod that cannot be asked about stay out?
    pub fail_closed: bool,
    /// Never asked about.
    pub exempt_namespaces: Vec<String>,
}

/// How the plugin stands in the node's chain.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum PluginState {
    Installed,
    /// Why not; one sentence.
    Missing(Arc<str>),
    #[default]
    Off,
}

impl fmt::Display for PluginState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Installed => f.write_str("installed"),
            Self::Missing(reason) => write!(f, "not installed: {reason}"),
            Self::Off => f.write_str("off"),
        }
    }
}

/// What was answered, since the program started.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Answered {
    pub captured: u64,
    pub not_enrolled: u64,
    pub refused: u64,
}
