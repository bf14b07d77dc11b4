// SPDX-License-Identifier: Apache-2.0
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Makes `folder` a folder on a bpf file system: one that is mounted above it, or one of its own.
/// # Errors
/// As mkdir(2) and mount(2).
pub fn ensure(folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    if statfs(folder)?.filesystem_type() == BPF_FS_MAGIC {
        return Ok(());
    }
    let options = Some("mode=0700");
    mount(
        Some("podveil"),
        folder,
        Some("bpf"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
        options,
    )?;
    Ok(())
}

/// Removes the folder and everything in it, and the file system if it was of its own.
/// # Errors
/// As unlink(2), rmdir(2) and umount(2); a folder that is not there is no error.
pub fn remove(folder: &Path) -> io::Result<()> {
    let Ok(metadata) = fs::metadata(folder) else {
        return Ok(());
    };
    if statfs(folder)?.filesystem_type() == BPF_FS_MAGIC {
        clear(folder)?;
        let parent = folder.parent().map(fs::metadata).transpose()?;
        if parent.is_some_and(|parent| parent.dev() != metadata.dev()) {
            umount2(folder, MntFlags::MNT_DETACH)?;
        }
    }
    fs::remove_dir(folder)
}

fn clear(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        // The kernel's own (`maps.debug`): nobody else may use a dot here, and nobody can remove them.
        if entry.file_name().as_encoded_bytes().contains(&b'.') {
            continue;
        }
        if entry.file_type()?.is_dir() {
            clear(&entry.path())?;
            fs::remove_dir(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}
