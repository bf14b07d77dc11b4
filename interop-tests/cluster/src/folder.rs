// SPDX-License-Identifier: Apache-2.0
use anyhow::Context;
use std::fs;
use std::path::{Path, PathBuf};

/// `/tmp/podveil-<kind>-<number>` of this process, removed when dropped. Those of processes that were killed are removed
/// by whoever makes the next.
#[derive(Debug)]
pub(crate) struct Folder {
    path: PathBuf,
    pub(crate) number: u8,
}

const OWNER: &str = "owner";

impl Folder {
    pub(crate) fn new(kind: &str) -> anyhow::Result<Self> {
        let parent = std::env::temp_dir();
        for number in 0..=u8::MAX {
            let path = parent.join(format!("podveil-{kind}-{number}"));
            if is_abandoned(&path)
                && let Err(error) = fs::remove_dir_all(&path)
            {
                tracing::debug!(path = %path.display(), %error, "another process removes it too");
            }
            match fs::create_dir(&path) {
                Ok(()) => {
                    fs::write(path.join(OWNER), std::process::id().to_string())?;
                    return Ok(Self { path, number });
                }
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => {
                    return Err(error).with_context(|| format!("making {}", path.display()));
                }
            }
        }
        anyhow::bail!("256 of podveil-{kind} run already")
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

/// A folder without an owner's name yet is somebody's who makes it just now.
fn is_abandoned(path: &Path) -> bool {
    fs::read_to_string(path.join(OWNER))
        .is_ok_and(|owner| !owner.is_empty() && !Path::new("/proc").join(owner).exists())
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(folder = %self.path.display(), %error, "a folder is left");
        }
    }
}
