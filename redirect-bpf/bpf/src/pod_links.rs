// SPDX-License-Identifier: Apache-2.0
//! The links of pods, pinned in a folder of each in every layout: `pods/<cookie>/<program>`.

use crate::kernel::{self, AttachType, LinkInfo};
use crate::node::NodeError;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

/// What has become of a namespace's programs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Attached {
    Stands,
    /// The namespace has ended.
    Gone,
    /// No program has been pinned yet, or never was.
    Partly,
}

/// `layout`: the folder of one layout.
pub fn folder(layout: &Path, cookie: u64) -> PathBuf {
    layout.join("pods").join(cookie.to_string())
}

/// The namespaces that have a folder.
/// # Errors
/// [`NodeError::Folder`]; where the layout itself has none there are none.
pub fn all(layout: &Path) -> Result<Vec<(u64, Attached)>, NodeError> {
    let path = layout.join("pods");
    let entries = match fs::read_dir(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(|source| NodeError::Folder { path, source })?,
    };
    Ok(entries
        .flatten()
        .filter_map(|entry| {
            let cookie = entry.file_name().to_str()?.parse().ok()?;
            Some((cookie, attached(&entry.path())))
        })
        .collect())
}

fn attached(folder: &Path) -> Attached {
    let pins = fs::read_dir(folder).into_iter().flatten().flatten();
    let link = pins.filter_map(|pin| info(&pin.path()).ok()).next();
    match link {
        Some(info) if info.target != 0 => Attached::Stands,
        Some(_) => Attached::Gone,
        None => Attached::Partly,
    }
}

/// # Errors
/// As bpf(2).
pub fn info(pin: &Path) -> io::Result<LinkInfo> {
    kernel::link_info(kernel::get(pin)?.as_fd(), AttachType::SkLookup)
}

/// # Errors
/// [`NodeError::Remove`]; a pod that has none is no error.
pub fn remove(layout: &Path, cookie: u64) -> Result<(), NodeError> {
    let path = folder(layout, cookie);
    match fs::remove_dir_all(&path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(NodeError::Remove { path, source })
        }
        _ => Ok(()),
    }
}
