// SPDX-License-Identifier: Apache-2.0
//! What this program has written to its node's disk, and its removal when Podveil is uninstalled.

use crate::config::NodeConfig;
use anyhow::Context;
use podveil_ca_client::ProgramConfig;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A folder that holds those of both node processes, and goes with the last one of them.
const SHARED: &str = "podveil";
/// The other process ends at the same time, and is not waited for any longer.
const OTHER_BOUND: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Removes the state of this process: the last trust bundle, and its folder.
///
/// # Errors
/// What could not be removed.
pub fn remove_state(program: &ProgramConfig) -> anyhow::Result<()> {
    let path = program.state_dir.display();
    (program.forget()).with_context(|| format!("the state in {path} cannot be removed"))
}

/// Removes the folders called `podveil` that this process shared with the other one, once that has emptied them or 5 s
/// have passed. Where they are mounts of the node's own folders, the node's are removed.
pub async fn remove_shared(config: &NodeConfig) {
    let sockets = [
        &config.zds_socket,
        &config.listeners_socket,
        &config.redirect.cni_socket,
    ]
    .map(|socket| socket.parent());
    let folders = sockets.into_iter().flatten().chain([&*config.state_dir]);
    let mut shared: Vec<PathBuf> = folders
        .filter_map(|folder| folder.parent())
        .filter(|parent| parent.file_name().is_some_and(|name| name == SHARED))
        .map(Path::to_owned)
        .collect();
    shared.sort_unstable();
    shared.dedup();
    let deadline = Instant::now() + OTHER_BOUND;
    loop {
        shared.retain(|folder| !is_removed(folder));
        if shared.is_empty() {
            return;
        }
        if Instant::now() >= deadline {
            tracing::info!(folders = ?shared, "stay, since they are not empty");
            return;
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

fn is_removed(folder: &Path) -> bool {
    // A mount is busy, and what is around it may be read-only.
    let removed = fs::remove_dir(folder).or_else(|_| remove_behind_mount(folder));
    removed.is_ok() || !folder.exists()
}

/// A container has the node's folder as a mount, which only the node's own name for it removes. It is believed to be
/// that if it is the same folder.
fn remove_behind_mount(folder: &Path) -> io::Result<()> {
    let name = folder.strip_prefix("/").unwrap_or(folder);
    let nodes = Path::new("/proc/1/root").join(name);
    let id = |path: &Path| fs::metadata(path).map(|found| (found.dev(), found.ino()));
    if id(&nodes)? != id(folder)? {
        return Err(ErrorKind::ResourceBusy.into());
    }
    fs::remove_dir(nodes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::NodeConfig;
    use podveil_program::config::Environment;

    struct Nothing;

    impl Environment for Nothing {
        fn variable(&self, _: &str) -> Option<String> {
            None
        }
    }

    #[tokio::test]
    async fn only_folders_of_our_name_go_and_only_when_empty() {
        let root = tempfile::tempdir().unwrap();
        let of = |path: &str| root.path().join(path);
        let file = of("config.yaml");
        let text = format!(
            "node: n1\nzds_socket: {}\nlisteners_socket: {}\nstate_dir: {}\n",
            of("run/podveil/zds/zds.sock").display(),
            of("own/listeners/listeners.sock").display(),
            of("lib/podveil/proxy").display(),
        );
        fs::write(&file, text).unwrap();
        let config = NodeConfig::load(Some(&file), &Nothing).unwrap();
        for folder in ["run/podveil", "own", "lib/podveil/proxy"] {
            fs::create_dir_all(of(folder)).unwrap();
        }
        let emptied = of("lib/podveil/proxy");
        let other = tokio::spawn(async move {
            tokio::task::yield_now().await;
            fs::remove_dir(emptied).unwrap();
        });
        remove_shared(&config).await;
        other.await.unwrap();
        assert!(!of("run/podveil").exists());
        assert!(!of("lib/podveil").exists());
        // An operator's own folder stays, even empty.
        assert!(of("own").exists());
    }
}
