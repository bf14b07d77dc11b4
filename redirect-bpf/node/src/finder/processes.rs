// SPDX-License-Identifier: Apache-2.0
//! Pods by their processes in `/proc`, which must be the node's (`hostPID`).

use super::cri::Cri;
use super::folders::Folders;
use super::{By, FindError, Found};
use crate::Obstacle;
use podveil_model::Uid;
use podveil_netns::pod_cgroup::pod_uid;
use podveil_netns::process::{self, Process};
use podveil_netns::{NetNs, NetNsError, NetNsId};
use std::collections::HashMap;
use std::error::Error;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::Mutex;

/// How many of a pod's processes are tried when the oldest ones end under our hands.
const MAX_TRIED: usize = 4;

/// Between two looks through all processes, as a multiple of how long the first took: they cost a tenth of a processor at
/// most, however many wait and however much runs on the node.
const PAUSE: u32 = 9;

/// Looks into the pod's cgroup where it is known which that is. Elsewhere through all processes of the node, once for
/// everybody who asks at the same time.
#[derive(Debug, Default)]
pub struct Processes {
    newest: Mutex<Option<Scan>>,
    folders: Option<Folders>,
    cri: Option<Cri>,
}

/// Who was there at one moment.
#[derive(Debug)]
struct Scan {
    begun: Instant,
    ended: Instant,
    pods: Arc<HashMap<String, Vec<Member>>>,
}

/// A process of a pod: by number and start time, so that another one under the same number is told from it. In the
/// order of age.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct Member {
    start_ticks: u64,
    pid: i32,
}

/// Why a process does not lead to its pod's namespace.
#[derive(Debug, thiserror::Error)]
enum MemberError {
    #[error("process {pid} has ended")]
    Ended { pid: i32 },
    /// The container runtime starts a sandbox's process in the node's namespace and moves it from there.
    #[error("process {pid} is still in the node's network namespace")]
    Host { pid: i32 },
    #[error(transparent)]
    NetNs(#[from] NetNsError),
    #[error("its sandbox is {program}, process {pid}")]
    Sandboxed { pid: i32, program: String },
}

/// Programs that are a pod's first process where its containers have a kernel of their own: gVisor, and the machines of
/// Kata. A container may run one of them too, but never as the pod's oldest process.
const SANDBOXES: [&str; 6] = [
    "cloud-hypervisor",
    "containerd-shim-kata",
    "firecracker",
    "qemu-",
    "runsc",
    "stratovirt",
];

impl Processes {
    /// `cri_socket`: of the container runtime, to be asked before `/proc` is looked through.
    pub fn new(cri_socket: Option<PathBuf>) -> Self {
        Self {
            newest: Mutex::default(),
            folders: Folders::of_own(),
            cri: cri_socket.map(Cri::new),
        }
    }

    /// The namespace of the pod's oldest process: that of its sandbox, which is there before every container and cannot be
    /// feigned by one.
    pub async fn find(&self, uid: &Uid) -> Result<Found, FindError> {
        let members = self.in_folder(uid).await;
        // Nobody is asked for a sandbox that has not begun.
        if members.as_ref().is_some_and(Vec::is_empty) {
            return Err(missing());
        }
        if let Some(found) = self.find_by_cri(uid).await {
            return Ok(found);
        }
        match members {
            Some(members) => open_oldest(&uid.0, &members),
            None => match self.pods().await?.get(&*uid.0) {
                Some(members) => open_oldest(&uid.0, members),
                None => Err(missing()),
            },
        }
    }

    /// The pod's processes, if it is known where they are to be found.
    async fn in_folder(&self, uid: &Uid) -> Option<Vec<Member>> {
        let (folders, uid) = (self.folders.clone()?, uid.clone());
        let look = move || members(folders.processes(&uid.0));
        tokio::task::spawn_blocking(look).await.ok()
    }

    /// The runtime says which process; that it is the pod's must be so in `/proc` as well. `None`: look there.
    async fn find_by_cri(&self, uid: &Uid) -> Option<Found> {
        let pid = match self.cri.as_ref()?.sandbox(uid).await {
            Ok(pid) => pid?,
            Err(error) => {
                let source = error.source().map(ToString::to_string);
                tracing::debug!(%uid, %error, source, "the pod is looked for in /proc");
                return None;
            }
        };
        let start_ticks = process::start_time(pid).ok()?;
        match open(&uid.0, Member { start_ticks, pid }) {
            Ok(found) => Some(Found {
                by: By::Runtime,
                ..found
            }),
            Err(error) => {
                tracing::debug!(%uid, pid, %error, "what the runtime names is not the pod's");
                None
            }
        }
    }

    /// Of every pod on the machine that has a namespace of its own.
    pub async fn all(&self) -> Result<Vec<(String, Found)>, FindError> {
        let pods = self.pods().await?;
        let open = |(uid, members): (&String, &Vec<Member>)| {
            let found = open_oldest(uid, members).ok()?;
            Some((format!("pod {uid}"), found))
        };
        Ok(pods.iter().filter_map(open).collect())
    }

    /// A look that began after the call. One is under way at a time; those who ask meanwhile share the next one.
    async fn pods(&self) -> Result<Arc<HashMap<String, Vec<Member>>>, FindError> {
        let asked = Instant::now();
        let mut newest = self.newest.lock().await;
        if let Some(scan) = newest.as_ref().filter(|scan| scan.begun >= asked) {
            return Ok(scan.pods.clone());
        }
        if let Some(last) = newest.as_ref() {
            let pause = PAUSE * (last.ended - last.begun);
            tokio::time::sleep_until((last.ended + pause).into()).await;
        }
        let begun = Instant::now();
        let scanned = tokio::task::spawn_blocking(scan).await;
        let pods = scanned
            .unwrap_or_else(|error| Err(io::Error::other(error)))
            .map_err(|source| FindError::List {
                path: "/proc".into(),
                source,
            })?;
        let pods = Arc::new(pods);
        *newest = Some(Scan {
            begun,
            ended: Instant::now(),
            pods: pods.clone(),
        });
        Ok(pods)
    }
}

fn missing() -> FindError {
    FindError::Missing {
        what: "no process of the pod runs on this node".to_owned(),
        obstacle: Obstacle::NotFound,
    }
}

/// One that ends meanwhile is nobody's.
fn members(pids: impl IntoIterator<Item = i32>) -> Vec<Member> {
    let member = |pid| {
        let start_ticks = process::start_time(pid).ok()?;
        Some(Member { start_ticks, pid })
    };
    let mut members: Vec<Member> = pids.into_iter().filter_map(member).collect();
    members.sort_unstable();
    members
}

fn scan() -> io::Result<HashMap<String, Vec<Member>>> {
    let mut pids: HashMap<String, Vec<i32>> = HashMap::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        if let Some(uid) = pod_of(pid) {
            pids.entry(uid).or_default().push(pid);
        }
    }
    let pods = pids.into_iter().map(|(uid, pids)| (uid, members(pids)));
    Ok(pods.collect())
}

fn open_oldest(uid: &str, members: &[Member]) -> Result<Found, FindError> {
    let (mut what, mut obstacle) = (String::new(), Obstacle::NotFound);
    for member in members.iter().take(MAX_TRIED) {
        match open(uid, *member) {
            Ok(found) => return Ok(found),
            Err(MemberError::NetNs(error)) => return Err(FindError::NetNs(error)),
            Err(error @ MemberError::Sandboxed { .. }) => {
                let what = error.to_string();
                let obstacle = Obstacle::Sandboxed;
                return Err(FindError::Missing { what, obstacle });
            }
            Err(error) => {
                what = error.to_string();
                if matches!(error, MemberError::Host { .. }) {
                    obstacle = Obstacle::HostNetwork;
                }
            }
        }
    }
    Err(FindError::Missing { what, obstacle })
}

fn pod_of(pid: i32) -> Option<String> {
    pod_uid(&fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?)
}

/// Opens the member's namespace. What the scan said is read again afterwards, while the process is held by its pidfd:
/// then it was true when the namespace was opened.
fn open(uid: &str, member: Member) -> Result<Found, MemberError> {
    let Member { start_ticks, pid } = member;
    let ended = || MemberError::Ended { pid };
    let held = Process::open(pid).map_err(|_| ended())?;
    let netns = match NetNs::open(format!("/proc/{pid}/ns/net")) {
        Err(NetNsError::Open { .. }) if !held.is_alive() => return Err(ended()),
        opened => opened?,
    };
    let same = pod_of(pid).as_deref() == Some(uid)
        && process::start_time(pid).is_ok_and(|start| start == start_ticks)
        && held.is_alive();
    if !same {
        return Err(ended());
    }
    if let Some(program) = program(pid).filter(|program| is_sandbox(program)) {
        return Err(MemberError::Sandboxed { pid, program });
    }
    if is_hosts(netns.id())? {
        return Err(MemberError::Host { pid });
    }
    Ok(Found {
        netns: Arc::new(netns),
        anchor: Some(Arc::new(held)),
        by: By::Processes,
        addresses: Arc::default(),
    })
}

/// The file name of what the process runs.
fn program(pid: i32) -> Option<String> {
    let path = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
    Some(path.file_name()?.to_string_lossy().into_owned())
}

fn is_sandbox(program: &str) -> bool {
    SANDBOXES.iter().any(|name| program.starts_with(name))
}

/// Our own, or that of the machine's first process, which is another one where the node itself is a container. A first
/// process that may not be looked at is none of the node's: there we are in a container with the node.
pub fn is_hosts(id: NetNsId) -> Result<bool, NetNsError> {
    let first = NetNs::open("/proc/1/ns/net").ok();
    Ok(id == NetNs::current()?.id() || first.is_some_and(|first| first.id() == id))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;
    use std::process::{Child, Command};
    use std::time::Duration;

    /// A folder in the machine's cgroup2 hierarchy with a process in it, as a kubelet and a runtime leave them.
    struct Pod {
        uid: String,
        root: PathBuf,
        children: Vec<Child>,
    }

    impl Pod {
        fn new(uid: &str) -> Self {
            let root = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
                .map(Path::new)
                .into_iter()
                .find(|path| path.join("cgroup.controllers").exists())
                .unwrap()
                .join(format!("podveil-finder-{}-{uid}", std::process::id()));
            let pod = Self {
                uid: uid.to_owned(),
                root,
                children: Vec::new(),
            };
            fs::create_dir_all(pod.folder()).unwrap();
            pod
        }

        fn folder(&self) -> PathBuf {
            let pod = format!("kubepods/besteffort/pod{}/sandbox", self.uid);
            self.root.join(pod)
        }

        /// The process joins the folder before anything else, so that it is never seen elsewhere.
        fn start(&mut self, command: &str) -> i32 {
            let procs = self.folder().join("cgroup.procs");
            let script = format!("echo $$ > {} && exec {command}", procs.display());
            let child = Command::new("sh").args(["-c", &script]).spawn().unwrap();
            let pid = child.id() as i32;
            self.children.push(child);
            pid
        }

        fn kill(&mut self) {
            for mut child in self.children.drain(..) {
                child.kill().unwrap();
                child.wait().unwrap();
            }
        }
    }

    impl Drop for Pod {
        fn drop(&mut self) {
            self.kill();
            let mut folder = self.folder();
            while folder.starts_with(&self.root) {
                let _gone = fs::remove_dir(&folder);
                folder.pop();
            }
        }
    }

    /// Both ways of looking for it.
    fn both_ways(pod: &Pod) -> [Processes; 2] {
        let path = pod.folder();
        let (hierarchy, _) = path.to_str().unwrap().rsplit_once("/podveil-").unwrap();
        let line = format!(
            "0::{}",
            path.to_str().unwrap().strip_prefix(hierarchy).unwrap()
        );
        let by_folder = Processes {
            folders: Some(Folders::for_test(Path::new(hierarchy), &line)),
            ..Processes::default()
        };
        [Processes::default(), by_folder]
    }

    async fn eventually(processes: &Processes, uid: &Uid) -> Found {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match processes.find(uid).await {
                Ok(found) => return found,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
        }
    }

    #[tokio::test]
    #[ignore = "netns"]
    async fn a_pod_is_found_by_its_oldest_process() {
        let uid = "5a7e0b52-63d0-4a83-93a4-20b7a7e7ad01";
        let mut pod = Pod::new(uid);
        let uid = Uid::from(uid);
        for processes in both_ways(&pod) {
            assert!(matches!(
                processes.find(&uid).await,
                Err(FindError::Missing { .. })
            ));
            let sandbox = pod.start("unshare --net sleep 60");
            let found = eventually(&processes, &uid).await;
            let anchor = found.anchor.unwrap();
            assert_eq!(anchor.pid(), sandbox);
            assert_ne!(found.netns.id(), NetNs::current().unwrap().id());
            // A younger process with a namespace of its own does not take the pod over.
            pod.start("unshare --net sleep 60");
            let again = processes.find(&uid).await.unwrap();
            assert_eq!(again.netns.cookie().unwrap(), found.netns.cookie().unwrap());
            pod.kill();
            anchor.ended().await.unwrap();
            assert!(matches!(
                processes.find(&uid).await,
                Err(FindError::Missing { .. })
            ));
        }
    }

    #[tokio::test]
    #[ignore = "netns"]
    async fn a_process_in_the_nodes_namespace_is_no_pods() {
        let uid = "5a7e0b52-63d0-4a83-93a4-20b7a7e7ad02";
        let mut pod = Pod::new(uid);
        let pid = pod.start("sleep 60");
        let processes = Processes::default();
        let deadline = Instant::now() + Duration::from_secs(10);
        let expected = MemberError::Host { pid }.to_string();
        loop {
            match processes.find(&Uid::from(uid)).await {
                Err(FindError::Missing { what, obstacle }) if what == expected => {
                    assert_eq!(obstacle, Obstacle::HostNetwork);
                    return;
                }
                found => assert!(Instant::now() < deadline, "{found:?}"),
            }
        }
    }

    #[tokio::test]
    #[ignore = "netns"]
    async fn a_virtual_machine_is_named() {
        let uid = "5a7e0b52-63d0-4a83-93a4-20b7a7e7ad03";
        let folder = tempfile::tempdir().unwrap();
        let machine = folder.path().join("qemu-system-x86_64");
        fs::copy("/bin/sleep", &machine).unwrap();
        let mut pod = Pod::new(uid);
        let pid = pod.start(&format!("unshare --net {} 60", machine.display()));
        let processes = Processes::default();
        let deadline = Instant::now() + Duration::from_secs(10);
        let expected = format!("its sandbox is qemu-system-x86_64, process {pid}");
        loop {
            match processes.find(&Uid::from(uid)).await {
                Err(FindError::Missing { what, obstacle }) if what == expected => {
                    assert_eq!(obstacle, Obstacle::Sandboxed);
                    return;
                }
                found => assert!(Instant::now() < deadline, "{found:?}"),
            }
        }
    }

    #[tokio::test]
    async fn those_who_ask_together_share_a_scan() {
        let processes = Processes::default();
        let first = processes.pods().await.unwrap();
        // Nobody is served before all have asked.
        let held = processes.newest.lock().await;
        let (two, three, ()) =
            tokio::join!(processes.pods(), processes.pods(), async { drop(held) });
        let two = two.unwrap();
        assert!(!Arc::ptr_eq(&first, &two));
        assert!(Arc::ptr_eq(&two, &three.unwrap()));
    }
}
