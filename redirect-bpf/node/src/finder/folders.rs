// SPDX-License-Identifier: Apache-2.0
//! Pods by the cgroup that the kubelet makes for each before anything of it runs. To look there costs a few system calls,
//! whatever runs on the node, so that it can be done again and again while a sandbox is being made.

use podveil_netns::pod_cgroup::PodFolders;
use std::fs;
use std::path::{Path, PathBuf};

const MOUNT: &str = "/sys/fs/cgroup";
/// A container's folder, and the one that some runtimes make inside it.
const DEPTH: usize = 2;

/// The kubelet's folders of pods in one hierarchy.
#[derive(Clone, Debug)]
pub struct Folders {
    hierarchy: PathBuf,
    names: PodFolders,
}

impl Folders {
    /// Of the kubelet that this process was started by. `None` if that cannot be told: outside of pods, and where the
    /// hierarchies are not to be seen.
    pub fn of_own() -> Option<Self> {
        let lines = fs::read_to_string("/proc/self/cgroup").ok()?;
        let folders = lines.lines().filter_map(|line| {
            let controllers = line.split(':').nth(1)?;
            let mount = match controllers {
                "" => MOUNT.into(),
                name => Path::new(MOUNT).join(name.strip_prefix("name=").unwrap_or(name)),
            };
            Self::at(mount, line)
        });
        folders.into_iter().next()
    }

    /// `line`: of a process that is in a pod of that hierarchy.
    fn at(hierarchy: PathBuf, line: &str) -> Option<Self> {
        let names = PodFolders::of(line)?;
        let own = podveil_netns::pod_cgroup::pod_folder(line)?;
        let is_there = hierarchy.join(own).join("cgroup.procs").exists();
        is_there.then_some(Self { hierarchy, names })
    }

    /// The processes in the pod's cgroup and in those of its containers. None: it has no such cgroup, or nothing of it runs.
    pub fn processes(&self, uid: &str) -> Vec<i32> {
        let mut pids = Vec::new();
        for path in self.names.of_pod(uid) {
            collect(&self.hierarchy.join(path), DEPTH, &mut pids);
        }
        pids
    }
}

/// What ends meanwhile is nobody's.
fn collect(folder: &Path, depth: usize, pids: &mut Vec<i32>) {
    let Ok(listed) = fs::read_to_string(folder.join("cgroup.procs")) else {
        return;
    };
    // 0 is a process that our PID namespace does not show.
    let seen = listed.lines().filter_map(|line| line.parse::<i32>().ok());
    pids.extend(seen.filter(|pid| *pid > 0));
    let below = (depth > 0).then(|| fs::read_dir(folder).ok()).flatten();
    for entry in below.into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), depth - 1, pids);
        }
    }
}

#[cfg(test)]
impl Folders {
    /// Where tests make pods: `line` as in `/proc/<pid>/cgroup` of one.
    pub fn for_test(hierarchy: &Path, line: &str) -> Self {
        Self::at(hierarchy.to_owned(), line).expect("the pod's folder is there")
    }
}
