// SPDX-License-Identifier: Apache-2.0
//! Which pod a process belongs to, read off `/proc/<pid>/cgroup`.
//!
//! The kubelet names a pod's cgroup after the pod's UID, below a folder `kubepods`: with the `cgroupfs` driver
//! `kubepods/<qos>/pod<UID>`, with `systemd` a slice `kubepods-<qos>-pod<UID>.slice` whose UID has `_` for `-` (the dash
//! separates slices). Both may lie below a `--cgroup-root`, or below the container that the node itself is. A pod from a
//! file on the node has a hash for its UID. cgroup v1 has a line for each hierarchy, v2 one line. Seen from a private cgroup
//! namespace a path begins with `/..`, and with the `cgroupfs` driver no longer names `kubepods`: then it is nobody's.

/// The UID of the pod in whose cgroup the process is, given its `/proc/<pid>/cgroup`. `None` if it is in none, or if its
/// hierarchies disagree.
pub fn pod_uid(cgroup: &str) -> Option<String> {
    let mut uids = cgroup.lines().filter_map(uid_in_line);
    let uid = uids.next()?;
    uids.all(|other| other == uid).then_some(uid)
}

/// The path of that pod's own cgroup, which holds those of its containers: relative to the hierarchy, without a leading
/// slash. For the one line of cgroup v2.
pub fn pod_folder(line: &str) -> Option<&str> {
    pod_in_line(line).map(|(folder, _)| folder)
}

/// How the node's kubelet names the cgroups of its pods, read off where one of them is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PodFolders {
    /// The folder `kubepods` or `..kubepods.slice`, relative to the hierarchy.
    root: String,
    /// With the `systemd` driver, what the names of slices begin with: `kubepods`, or that below a `--cgroup-root`.
    slices: Option<String>,
}

impl PodFolders {
    /// From the line of a process that is in a pod. `None` if it is in none, or if containers are not below their pods'
    /// folders there.
    pub fn of(line: &str) -> Option<Self> {
        let folder = pod_folder(line)?;
        let (parent, name) = folder.rsplit_once('/')?;
        let Some(slice) = name.strip_suffix(".slice") else {
            // `<root>/pod<UID>`, or a class of service between the two; not `<slice>:<prefix>:<container>`.
            let root = CLASSES
                .iter()
                .find_map(|class| parent.strip_suffix(&format!("/{class}")))
                .unwrap_or(parent);
            let is_root = root.rsplit('/').next() == Some("kubepods");
            return is_root.then(|| Self {
                root: root.to_owned(),
                slices: None,
            });
        };
        let (class, _) = slice.rsplit_once("-pod")?;
        let slices = CLASSES
            .iter()
            .find_map(|name| class.strip_suffix(&format!("-{name}")))
            .unwrap_or(class);
        let root = match slices == class {
            true => parent,
            false => parent.strip_suffix(&format!("/{class}.slice"))?,
        };
        let is_root = root.rsplit('/').next() == Some(&*format!("{slices}.slice"));
        is_root.then(|| Self {
            root: root.to_owned(),
            slices: Some(slices.to_owned()),
        })
    }

    /// Where the cgroup of the pod may be, relative to the hierarchy: by its class of service. Nowhere if that is no UID.
    pub fn of_pod(&self, uid: &str) -> Vec<String> {
        if !is_uid(uid) {
            return Vec::new();
        }
        let root = &self.root;
        let Some(slices) = &self.slices else {
            let in_class = CLASSES.map(|class| format!("{root}/{class}/pod{uid}"));
            return [format!("{root}/pod{uid}")]
                .into_iter()
                .chain(in_class)
                .collect();
        };
        let uid = uid.replace('-', "_");
        let in_class = CLASSES.map(|class| {
            let class = format!("{slices}-{class}");
            format!("{root}/{class}.slice/{class}-pod{uid}.slice")
        });
        [format!("{root}/{slices}-pod{uid}.slice")]
            .into_iter()
            .chain(in_class)
            .collect()
    }
}

/// Classes of service with a folder of their own; guaranteed pods are beside them.
const CLASSES: [&str; 2] = ["besteffort", "burstable"];

fn uid_in_line(line: &str) -> Option<String> {
    pod_in_line(line).map(|(_, uid)| uid)
}

/// `<hierarchy>:<controllers>:<path>` (cgroups(7)). Of several pods in one path the outermost counts: the others are a
/// cluster that runs inside it.
fn pod_in_line(line: &str) -> Option<(&str, String)> {
    let path = line.splitn(3, ':').nth(2)?.strip_prefix('/')?;
    let mut under_kubepods = false;
    let mut end = 0;
    for part in path.split('/') {
        end += part.len();
        // A runtime that was not told of systemd makes one folder of `<slice>:<prefix>:<container>`.
        let slice = part.split_once(".slice:").map(|(slice, _)| slice);
        let uid = match slice.or_else(|| part.strip_suffix(".slice")) {
            Some(slice) => {
                let (parents, uid) = slice.rsplit_once("-pod").unwrap_or((slice, ""));
                let ours = parents.split('-').any(|parent| parent == "kubepods");
                ours.then(|| uid.replace('_', "-"))
            }
            None if under_kubepods => part.strip_prefix("pod").map(str::to_owned),
            None => None,
        };
        if let Some(uid) = uid.filter(|uid| is_uid(uid)) {
            return Some((path.get(..end)?, uid));
        }
        under_kubepods |= part == "kubepods";
        // The slash.
        end += 1;
    }
    None
}

/// A UUID, or for a pod from a file on the node 32 digits without dashes.
fn is_uid(uid: &str) -> bool {
    let digits = uid.bytes().filter(u8::is_ascii_hexdigit).count();
    let dashes = uid.bytes().filter(|byte| *byte == b'-').count();
    digits == 32 && digits + dashes == uid.len() && matches!(dashes, 0 | 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "7c7a6d9e-3f0b-4a39-9b1c-2f6f0c8d51aa";

    /// `/proc/<pid>/cgroup` as each kind of node has it, `# pod: <uid or none>` in the first line.
    macro_rules! kinds {
        ($($name:literal),* $(,)?) => {
            [$(($name, include_str!(concat!("../testdata/cgroup/", $name, ".txt")))),*]
        };
    }

    const KINDS: [(&str, &str); 18] = kinds![
        "v1-cgroupfs",
        "v1-cgroupfs-below-a-root",
        "v1-systemd-docker",
        "v2-cgroupfs",
        "v2-cgroupfs-in-a-container",
        "v2-cgroupfs-static-pod",
        "v2-host-service",
        "v2-kind",
        "v2-kind-seen-from-its-host",
        "v2-private-namespace-cgroupfs",
        "v2-private-namespace-own",
        "v2-private-namespace-systemd",
        "v2-runtime-without-systemd",
        "v2-systemd-below-a-root",
        "v2-systemd-containerd",
        "v2-systemd-crio-conmon",
        "v2-systemd-crio-guaranteed",
        "v2-systemd-static-pod",
    ];

    #[test]
    fn the_pod_of_a_process_is_told_by_its_cgroup() {
        for (name, file) in KINDS {
            let (head, lines) = file.split_once('\n').unwrap();
            let expected = head.strip_prefix("# pod: ").unwrap();
            let found = pod_uid(lines);
            assert_eq!(found.as_deref().unwrap_or("none"), expected, "{name}");
        }
    }

    #[test]
    fn a_pods_own_cgroup_is_the_one_above_its_containers() {
        let slice = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod7c7a6d9e_3f0b_4a39_9b1c_2f6f0c8d51aa.slice";
        let line = format!("0::/{slice}/cri-containerd-9d1d.scope");
        assert_eq!(pod_folder(&line), Some(slice));
        let folder = format!("kubepods/pod{UID}");
        assert_eq!(pod_folder(&format!("0::/{folder}/9d1d/x")), Some(&*folder));
        assert_eq!(pod_folder(&format!("0::/{folder}")), Some(&*folder));
        assert_eq!(pod_folder("0::/system.slice/containerd.service"), None);
    }

    #[test]
    fn where_one_pod_is_tells_where_the_others_are() {
        let other = UID.replace('7', "8");
        for (name, file) in KINDS {
            let line = file.lines().nth(1).unwrap();
            let folders = PodFolders::of(line);
            // Nobody sees more than the way up to here, or the pod has no folder that holds its containers.
            if matches!(
                name,
                "v2-private-namespace-systemd" | "v2-runtime-without-systemd"
            ) {
                assert_eq!(folders, None, "{name}");
                continue;
            }
            assert_eq!(folders.is_some(), pod_folder(line).is_some(), "{name}");
            let Some(folders) = folders else { continue };
            let uid = uid_in_line(line).unwrap();
            let found = folders.of_pod(&uid);
            assert!(
                found.iter().any(|path| pod_folder(line) == Some(path)),
                "{name}: {found:?}"
            );
            // Each of the others' is seen as theirs, and as nobody else's.
            for path in folders.of_pod(&other) {
                let line = format!("0::/{path}/container");
                assert_eq!(pod_folder(&line), Some(&*path), "{name}");
                assert_eq!(uid_in_line(&line).as_deref(), Some(&*other), "{name}");
                assert_eq!(PodFolders::of(&line).as_ref(), Some(&folders), "{name}");
            }
            assert_eq!(folders.of_pod("../../etc"), Vec::<String>::new());
        }
    }

    #[test]
    fn what_only_looks_like_a_pods_cgroup_is_none() {
        for line in [
            "",
            "0::",
            "0::/",
            "garbage",
            &format!("0::/pod{UID}"),
            &format!("0::/user.slice/pod{UID}"),
            &format!("0::/mykubepods-pod{}.slice", UID.replace('-', "_")),
            "0::/kubepods/pod",
            "0::/kubepods/pod../../etc",
            "0::/kubepods/burstable/podxyz/abc",
        ] {
            assert_eq!(pod_uid(line), None, "{line}");
        }
    }

    #[test]
    fn a_cluster_inside_a_pod_belongs_to_that_pod() {
        let inner = UID.replace('7', "8");
        let line =
            format!("0::/kubepods/burstable/pod{UID}/abc/kubepods/besteffort/pod{inner}/def");
        assert_eq!(pod_uid(&line).as_deref(), Some(UID));
    }

    #[test]
    fn hierarchies_that_disagree_name_no_pod() {
        let other = UID.replace('7', "8");
        let lines = format!("4:memory:/kubepods/pod{UID}/a\n3:cpu:/kubepods/pod{other}/a\n");
        assert_eq!(pod_uid(&lines), None);
    }
}
