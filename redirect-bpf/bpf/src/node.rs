// SPDX-License-Identifier: Apache-2.0
use crate::former::Former;
use crate::kernel::AttachType;
use crate::layout::{Ip, Layout, Pod, PodAddress, PodConnection, PodCounts, PodListener, PodPort};
use crate::links::{self, Loaded, Standing};
use crate::pod_links::{self, Attached};
use crate::pod_object::{self, PodObject};
use crate::table::{PodTable, Table, TableError};
use crate::{bpffs, layout::Plain};
use aya::programs::Program;
use aya::{Ebpf, EbpfLoader};
use nix::sys::stat::fstat;
use podveil_netns::cgroup::CgroupPath;
use podveil_netns::{NetNs, NetNsError};
use std::error::Error;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

const NODE_OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/node.bpf.o"));

/// Where a program of the node's stands.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Place {
    /// The proxy's cgroup.
    Proxy,
    /// The root of the hierarchy.
    Root,
}

/// In the order in which they are attached, which is the order in which they run.
const NODE_PROGRAMS: [(&str, AttachType, Place); 8] = [
    ("own_socket", AttachType::SockCreate, Place::Proxy),
    ("own_connections", AttachType::SockOps, Place::Proxy),
    ("capture_ipv4", AttachType::Connect4, Place::Root),
    ("capture_ipv6", AttachType::Connect6, Place::Root),
    ("capture_paths", AttachType::SockOps, Place::Root),
    ("fence_ipv4", AttachType::Connect4, Place::Root),
    ("fence_ipv6", AttachType::Connect6, Place::Root),
    ("fence_out", AttachType::Egress, Place::Root),
];
const POD_PROGRAMS: [&str; 2] = ["fence_in", "capture"];

/// Maps and programs of one node.
#[derive(Debug)]
pub struct Node {
    folder: PathBuf,
    cgroup: CgroupPath,
    programs: Vec<Loaded>,
    pub former: Former,
    pod_object: Mutex<PodObject>,
    pub pods: Table<u64, Pod>,
    pub counts: Table<u64, PodCounts>,
    pub addresses: PodTable<PodAddress>,
    pub ports: PodTable<PodPort>,
    pub older: PodTable<PodConnection>,
    pub proxy_connections: Table<PodConnection, u32>,
    pub fence: Table<Ip, u32>,
    /// The value of an update is a descriptor, of a look-up the socket's cookie.
    pub listeners: Table<PodListener, u64>,
    /// By descriptor.
    pub proxy_sockets: Table<u32, u32>,
}

#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    #[error("cgroup {path} cannot be used")]
    Cgroup {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{path} cannot be a folder of a bpf file system")]
    Folder {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("program {program} cannot be attached or pinned")]
    Link {
        program: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("program {program} cannot be loaded into this kernel")]
    Load {
        program: &'static str,
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    #[error(transparent)]
    NetNs(#[from] NetNsError),
    #[error("the namespace's pins cannot be removed from {path}")]
    Remove {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the sysctls of pods cannot be written")]
    Sysctls(#[source] io::Error),
    #[error(transparent)]
    Table(#[from] TableError),
}

/// A program that does not stand where it should.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("program {program} does not stand")]
pub struct Fault {
    pub program: &'static str,
}

impl Node {
    /// Loads the node's programs, opens what is pinned in `folder` in this layout or makes it, and puts the programs in their
    /// places. `cgroup` is where every socket of the proxy is made; it must exist. What other layouts have left stays as long
    /// as pods depend on it: see [`Node::former`].
    /// # Errors
    /// [`NodeError`]: what this kernel or this machine lacks.
    pub fn open(folder: &Path, cgroup: CgroupPath, layout: Layout) -> Result<Self, NodeError> {
        let in_folder = |source| NodeError::Folder {
            path: folder.to_owned(),
            source,
        };
        bpffs::ensure(folder).map_err(in_folder)?;
        let former = Former::beside(layout, folder)?;
        let folder = folder.join(layout.to_string());
        for part in ["maps", "node", "pods"] {
            fs::create_dir_all(folder.join(part)).map_err(in_folder)?;
        }
        let maps = folder.join("maps");
        former.lend(&maps)?;
        let mut loader = EbpfLoader::new();
        pod_object::prepare(&mut loader, &maps);
        let mut object =
            (loader.load(NODE_OBJECT)).map_err(|error| not_loaded("node", error.into()))?;
        let pod_object = PodObject::open(&maps).map_err(|error| not_loaded("pod", error.into()))?;
        let programs = NODE_PROGRAMS
            .into_iter()
            .map(|(name, kind, _)| take(&mut object, name, kind))
            .collect::<Result<_, _>>()?;
        let node = Self {
            cgroup,
            programs,
            former,
            pod_object: pod_object.into(),
            pods: open(&maps, "pods")?,
            counts: open(&maps, "pod_counts")?,
            addresses: PodTable::open(&maps, "pod_addresses")?,
            ports: PodTable::open(&maps, "pod_ports")?,
            older: PodTable::open(&maps, "older")?,
            proxy_connections: open(&maps, "proxy_connections")?,
            fence: open(&maps, "fence")?,
            listeners: open(&maps, "listeners")?,
            proxy_sockets: open(&maps, "proxy_sockets")?,
            folder,
        };
        // Loaded once to see that this kernel takes them, before any pod depends on it.
        node.load_pod(0)?;
        // Behind those of every other layout, also where ours have stood before them.
        node.attach_in_order(!node.former.is_empty())?;
        Ok(node)
    }

    /// Does anything stand in `folder`, left by whatever version?
    pub fn stands(folder: &Path) -> bool {
        let is_layout = |entry: fs::DirEntry| Layout::of(&entry.file_name()).is_some();
        fs::read_dir(folder).is_ok_and(|entries| entries.flatten().any(is_layout))
    }

    /// Takes everything out: links, maps, the folder.
    /// # Errors
    /// [`NodeError::Folder`].
    pub fn purge(folder: &Path) -> Result<(), NodeError> {
        bpffs::remove(folder).map_err(|source| NodeError::Folder {
            path: folder.to_owned(),
            source,
        })
    }

    /// Puts the node's programs where they belong. Idempotent; also mends what somebody has taken away.
    /// # Errors
    /// [`NodeError`].
    pub fn attach(&self) -> Result<(), NodeError> {
        self.attach_in_order(false)
    }

    /// `anew`: also what stands, so that it runs last.
    fn attach_in_order(&self, mut anew: bool) -> Result<(), NodeError> {
        for (loaded, (name, _, place)) in self.programs.iter().zip(NODE_PROGRAMS) {
            let (cgroup, id) = self.cgroup(place)?;
            let pin = self.folder.join("node").join(name);
            let found = links::ensure(
                &pin,
                loaded,
                (cgroup.as_fd(), id),
                anew && place == Place::Root,
            )
            .map_err(|source| NodeError::Link {
                program: name,
                source,
            })?;
            // The fence's programs run behind those of capture, so what is attached again takes them along.
            anew |= found == Standing::Nothing && place == Place::Root;
        }
        Ok(())
    }

    /// Puts this pod's programs into its namespace.
    /// # Errors
    /// [`NodeError`].
    pub fn attach_pod(&self, netns: &NetNs) -> Result<(), NodeError> {
        let cookie = netns.cookie()?;
        let folder = pod_links::folder(&self.folder, cookie);
        fs::create_dir_all(&folder).map_err(|source| NodeError::Folder {
            path: folder.clone(),
            source,
        })?;
        let target = (netns.as_fd(), netns.id().inode);
        for loaded in self.load_pod(cookie)? {
            let program = loaded.name;
            links::ensure(&folder.join(program), &loaded, target, false)
                .map_err(|source| NodeError::Link { program, source })?;
        }
        Ok(())
    }

    /// The copies of one namespace.
    fn load_pod(&self, cookie: u64) -> Result<Vec<Loaded>, NodeError> {
        let loaded = (self.pod_object.lock())
            .unwrap_or_else(PoisonError::into_inner)
            .load(cookie);
        let mut object = loaded.map_err(|error| not_loaded("pod", error.into()))?;
        (POD_PROGRAMS.into_iter())
            .map(|name| take(&mut object, name, AttachType::SkLookup))
            .collect()
    }

    /// # Errors
    /// [`NodeError`]; a pod that has none is no error.
    pub fn detach_pod(&self, cookie: u64) -> Result<(), NodeError> {
        pod_links::remove(&self.folder, cookie)
    }

    /// The first program that does not stand.
    /// # Errors
    /// [`NodeError`] when that cannot be told.
    pub fn fault(&self, netns: &NetNs) -> Result<Option<Fault>, NodeError> {
        for (loaded, (program, _, place)) in self.programs.iter().zip(NODE_PROGRAMS) {
            let (_, id) = self.cgroup(place)?;
            let pin = self.folder.join("node").join(program);
            let found = links::standing(&pin, loaded, id)
                .map_err(|source| NodeError::Link { program, source })?;
            if found != Standing::Exactly {
                return Ok(Some(Fault { program }));
            }
        }
        let folder = pod_links::folder(&self.folder, netns.cookie()?);
        for program in POD_PROGRAMS {
            let info = pod_links::info(&folder.join(program));
            if !info.is_ok_and(|info| info.target == netns.id().inode) {
                return Ok(Some(Fault { program }));
            }
        }
        Ok(None)
    }

    /// The namespaces that have a folder of ours.
    /// # Errors
    /// [`NodeError::Folder`].
    pub fn pods_attached(&self) -> Result<Vec<(u64, Attached)>, NodeError> {
        pod_links::all(&self.folder)
    }

    /// Enters a listening socket that the proxy made before our programs stood.
    /// # Errors
    /// [`NodeError::Table`].
    pub fn adopt_listener(
        &self,
        key: &PodListener,
        socket: BorrowedFd<'_>,
    ) -> Result<(), NodeError> {
        use std::os::fd::AsRawFd;
        let fd = socket.as_raw_fd().cast_unsigned();
        self.proxy_sockets.set(&fd, &1)?;
        self.listeners.set(key, &fd.into())?;
        Ok(())
    }

    /// The processes of the proxy's cgroup.
    /// # Errors
    /// [`NodeError::Cgroup`].
    pub fn proxy_processes(&self) -> Result<Vec<i32>, NodeError> {
        let path = self.cgroup.absolute().join("cgroup.procs");
        let text =
            fs::read_to_string(&path).map_err(|source| NodeError::Cgroup { path, source })?;
        Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
    }

    fn cgroup(&self, place: Place) -> Result<(File, u64), NodeError> {
        let mut path = self.cgroup.absolute();
        if place == Place::Root {
            for _ in 0..self.cgroup.level {
                path.pop();
            }
        }
        let open = || {
            let file = File::open(&path)?;
            // The number of a cgroup is that of its folder.
            let id = fstat(&file)?.st_ino;
            Ok((file, id))
        };
        open().map_err(|source| NodeError::Cgroup { path, source })
    }
}

fn open<K: Plain, V: Plain>(maps: &Path, name: &'static str) -> Result<Table<K, V>, NodeError> {
    Ok(Table::open(maps, name)?)
}

fn not_loaded(program: &'static str, source: Box<dyn Error + Send + Sync>) -> NodeError {
    NodeError::Load { program, source }
}

fn take(object: &mut Ebpf, name: &'static str, kind: AttachType) -> Result<Loaded, NodeError> {
    let failed = |source: Box<dyn Error + Send + Sync>| not_loaded(name, source);
    let program = object
        .program_mut(name)
        .ok_or_else(|| failed("it is not in the object".into()))?;
    let loaded = match program {
        Program::CgroupSkb(program) => program.load(),
        Program::CgroupSock(program) => program.load(),
        Program::CgroupSockAddr(program) => program.load(),
        Program::SkLookup(program) => program.load(),
        Program::SockOps(program) => program.load(),
        _ => return Err(failed("it is of another type".into())),
    };
    loaded.map_err(|error| failed(error.into()))?;
    let fd = program
        .fd()
        .and_then(|fd| Ok(fd.try_clone()?))
        .map_err(|error| failed(error.into()))?;
    Ok(Loaded {
        name,
        kind,
        fd: fd
            .as_fd()
            .try_clone_to_owned()
            .map_err(|error| failed(error.into()))?,
    })
}
