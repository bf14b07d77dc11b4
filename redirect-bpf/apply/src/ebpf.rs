// SPDX-License-Identifier: Apache-2.0
mod fences;

use crate::BackEnd;
use crate::backend::{ApplyError, Backend, FenceCount, Observed, VerifyError};
use crate::connections::{Addresses, Connection, Connections};
use crate::routes::{self, Family, Sources};
use crate::sysctls::Sysctls;
use fences::Fences;
use podveil_bpf::layout::{Ip, Pod, PodAddress, PodConnection, PodListener, PodPort};
use podveil_bpf::{Attached, Layout, Node, NodeError, Table, TableError, pidfd_open};
use podveil_model::{INBOUND_PORT, OUTBOUND_PORT};
use podveil_netns::cgroup::CgroupPath;
use podveil_netns::{NetNs, process, sock_diag};
use podveil_plan::{Capture, Fence, FenceStep, Phase};
use std::collections::BTreeSet;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// Set in [`Pod::sysctls`] when the other bits are what the sysctls were before us.
const RECORDED: u32 = 1 << 31;

/// Capture without NAT and without conntrack, IPv4 and IPv6, by eBPF (`podveil-bpf`).
///
/// A new connection of the pod gets [`podveil_plan::MARK`] in `connect()`. The mark sends it over `lo`, where a program
/// in the pod's namespace picks the proxy's listener for it; the same program does that for what comes from outside. The
/// accepted socket's local address is the original destination. What the kernel was seen to do (6.18; `tests/netns.rs`
/// shows each), and what follows from it:
///
/// - A program in a namespace sees only SYNs for which there is no socket: what is open when capture begins or ends goes
///   on untouched, whoever carries it.
/// - A route over `lo` gives an unbound socket its destination as source. The route names the pod's own address
///   therefore, and verification looks whether it is still the one that the pod would choose.
/// - The proxy's own connection to the application, from its client's address, is told from the client's by its
///   addresses and ports, in a table that it stays in until its socket closes.
/// - The application's answers take the mark of the proxy's segments, by three sysctls; they are put back at the end.
///   An application that marks its *listening* socket itself keeps its own mark: its answers are stopped at the edge of
///   the pod, and counted.
/// - A socket's creator is known by the cgroup that it was made in; what it accepts is its own too.
/// - Listeners enter the programs' table by themselves when `listen()` is called. Those that are older than the programs
///   are looked for among the proxy's processes. They must be transparent (`IP_TRANSPARENT`), or nothing is answered
///   from an address that is not the pod's.
///
/// The fence's map is one for the node, so it holds what any pod's fence holds: an address that one pod has let go of
/// already stays until all have.
///
/// - Each path of a multipath TCP connection is opened past the hook in `connect()`. It is marked a moment before its SYN
///   is sent, and routed again.
///
/// What a program with another layout has captured goes on being captured by that until a pod is written anew, and by us
/// from then on; connections that are open notice nothing.
///
/// Known limit: a socket bound to a device (`SO_BINDTODEVICE`) cannot be sent over `lo`, and its `connect()` fails.
#[derive(Debug)]
pub struct Ebpf {
    node: Node,
    fences: Mutex<Fences>,
    sysctls: Sysctls,
}

impl Ebpf {
    /// Loads the programs, or takes over those that stand in `folder` (on a bpf file system, or where one can be
    /// mounted). `cgroup`: where every socket of the proxy is made; it must exist.
    /// # Errors
    /// [`NodeError`]: what this kernel or this machine lacks.
    pub fn open(folder: &Path, cgroup: CgroupPath) -> Result<Self, NodeError> {
        Self::open_as(Layout::default(), folder, cgroup)
    }

    /// As a program of another version, with another layout.
    /// # Errors
    /// As [`Ebpf::open`].
    pub fn open_as(layout: Layout, folder: &Path, cgroup: CgroupPath) -> Result<Self, NodeError> {
        let sysctls = Sysctls::open().map_err(NodeError::Sysctls)?;
        let node = Node::open(folder, cgroup, layout)?;
        let fences = Mutex::new(Fences::inherit(&node)?);
        let ebpf = Self {
            node,
            fences,
            sysctls,
        };
        ebpf.forget_left()?;
        Ok(ebpf)
    }

    /// Takes programs, maps and the folder away. Capture of whatever pod is left ends with them.
    /// # Errors
    /// [`NodeError::Folder`].
    pub fn purge(folder: &Path) -> Result<(), NodeError> {
        Node::purge(folder)
    }

    /// Drops what a process before this one has left for namespaces that have ended, or that it had only begun with.
    fn forget_left(&self) -> Result<(), NodeError> {
        let node = &self.node;
        self.forget_former()?;
        for (cookie, attached) in node.pods_attached()? {
            if attached != Attached::Stands {
                self.forget(cookie)?;
            }
        }
        let known = node.pods.keys()?;
        let tables = [
            node.ports.netns(),
            node.older.netns(),
            node.addresses.netns(),
        ];
        for cookie in tables
            .iter()
            .flatten()
            .filter(|cookie| !known.contains(cookie))
        {
            self.forget(*cookie)?;
        }
        Ok(())
    }

    /// Lets go of what another layout has of namespaces that have ended, and of the layout behind its last pod.
    fn forget_former(&self) -> Result<(), NodeError> {
        let former = &self.node.former;
        for cookie in former.gone()? {
            former.forget(cookie)?;
            // What we have written of it already stays, or is let go as any other pod of ours.
            if self.node.pods.find(&cookie)?.is_none() {
                self.forget(cookie)?;
            }
        }
        former.remove_unused()
    }

    /// Empties every table of one namespace, the entry that says what was found there last.
    fn forget(&self, cookie: u64) -> Result<(), NodeError> {
        let node = &self.node;
        node.detach_pod(cookie)?;
        self.change_fences(|fences, map| fences.remove(map, cookie))?;
        node.ports.replace(cookie, BTreeSet::new())?;
        node.addresses.replace(cookie, BTreeSet::new())?;
        // Another layout's too, as long as that has the pod.
        if node.former.pod(cookie)?.is_none() {
            node.older.replace(cookie, BTreeSet::new())?;
            node.counts.remove(&cookie)?;
        }
        node.pods.remove(&cookie)?;
        Ok(())
    }

    /// What is written of this pod, by us or in another layout.
    fn written(&self, cookie: u64) -> Result<Option<Pod>, NodeError> {
        match self.node.pods.find(&cookie)? {
            Some(pod) => Ok(Some(pod)),
            None => self.node.former.pod(cookie),
        }
    }

    /// From now on no program of another layout acts for this pod.
    fn is_ours_alone(&self, cookie: u64) -> Result<(), NodeError> {
        self.node.former.forget(cookie)?;
        self.node.former.remove_unused()
    }

    fn change_fences<T>(
        &self,
        change: impl FnOnce(&mut Fences, &Table<Ip, u32>) -> Result<T, TableError>,
    ) -> Result<T, NodeError> {
        let mut fences = self.fences.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(change(&mut fences, &self.node.fence)?)
    }

    /// Makes our tables and links hold exactly this, whatever stands in another layout.
    fn write(
        &self,
        netns: &NetNs,
        cookie: u64,
        capture: &Capture,
        fence: &Arc<Fence>,
    ) -> Result<BTreeSet<Connection>, ApplyError> {
        let node = &self.node;
        let wanted = Wanted::of(netns, cookie, capture)?;
        let found = self.written(cookie)?.unwrap_or_default();
        let mut pod = Pod {
            flags: found.flags,
            sysctls: match found.sysctls & RECORDED {
                0 => self.sysctls.read(netns)? | RECORDED,
                _ => found.sysctls,
            },
        };
        let write = |pod: &Pod| node.pods.set(&cookie, pod).map_err(NodeError::from);
        // The ways first, then what needs them. What another layout captures is ours only when everything is there: our
        // programs run behind the others, and would undo what those have done.
        if node.former.pod(cookie)?.is_none() {
            write(&pod)?;
        }
        self.sysctls.switch_on(netns)?;
        routes::ensure(netns, wanted.sources)?;
        node.attach()?;
        (node.addresses.replace(cookie, wanted.addresses)).map_err(NodeError::from)?;
        (node.ports.replace(cookie, wanted.ports)).map_err(NodeError::from)?;
        if self.find(&node.counts, &cookie)?.is_none() {
            (node.counts.set(&cookie, &Default::default())).map_err(NodeError::from)?;
        }
        node.attach_pod(netns)?;
        if capture.phase == Phase::Releasing {
            pod.flags = wanted.flags;
            write(&pod)?;
            (node.older.replace(cookie, BTreeSet::new())).map_err(NodeError::from)?;
            self.change_fences(|fences, map| fences.remove(map, cookie))?;
            return Ok(BTreeSet::new());
        }
        self.adopt_listeners(netns, cookie)?;
        self.change_fences(|fences, map| fences.set(map, cookie, fence))?;
        if found.flags & Pod::FENCED != 0 {
            pod.flags = wanted.flags;
            write(&pod)?;
            return Ok((node.older.of(cookie).iter())
                .map(|key| Connection {
                    local: key.local(),
                    remote: key.remote(),
                })
                .collect());
        }
        // Capture first: from then on no connection is born past the proxy, so that those found afterwards are all
        // there will ever be. Then the fence, which knows them.
        pod.flags = wanted.flags & !(Pod::FENCED | Pod::REFUSES_PLAIN);
        write(&pod)?;
        let older = self.direct(netns, cookie)?;
        let keys = (older.iter())
            .map(|c| PodConnection::new(cookie, c.local, c.remote))
            .collect();
        (node.older.replace(cookie, keys)).map_err(NodeError::from)?;
        pod.flags = wanted.flags;
        write(&pod)?;
        Ok(older)
    }

    /// Enters the proxy's listeners that are older than our programs. One that nobody of the proxy's cgroup has stays
    /// out, and what would come to it is dropped.
    fn adopt_listeners(&self, netns: &NetNs, cookie: u64) -> Result<(), ApplyError> {
        let mut missing = Vec::new();
        for family in Family::of(netns)? {
            for port in [OUTBOUND_PORT, INBOUND_PORT] {
                let ip: IpAddr = match family {
                    Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
                    Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
                };
                let address = SocketAddr::new(ip, port);
                let key = PodListener::new(cookie, address);
                if self.find(&self.node.listeners, &key)?.is_none() {
                    missing.push((address, key));
                }
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        let listeners = sock_diag::listeners(netns).map_err(ApplyError::Connections)?;
        missing.retain(|(address, _)| listeners.contains_key(address));
        if missing.is_empty() {
            return Ok(());
        }
        for pid in self.node.proxy_processes()? {
            // A process that has ended has no sockets either.
            let (Ok(sockets), Ok(pidfd)) = (process::sockets(pid), pidfd_open(pid)) else {
                continue;
            };
            for (address, key) in &missing {
                let inode = listeners[address];
                if let Some(fd) = sockets.get(&inode)
                    && let Ok(socket) = process::duplicate(pidfd.as_fd(), *fd, inode)
                {
                    self.node.adopt_listener(key, socket.as_fd())?;
                }
            }
        }
        Ok(())
    }

    fn find<K, V>(&self, table: &podveil_bpf::Table<K, V>, key: &K) -> Result<Option<V>, ApplyError>
    where
        K: podveil_bpf::layout::Plain,
        V: podveil_bpf::layout::Plain,
    {
        Ok(table.find(key).map_err(NodeError::from)?)
    }

    /// Connections past the proxy: the proxy's own look the same in `/proc`.
    fn direct(&self, netns: &NetNs, cookie: u64) -> Result<BTreeSet<Connection>, ApplyError> {
        let mut direct = BTreeSet::new();
        for connection in Connections::list(netns)?.direct() {
            let key = PodConnection::new(cookie, connection.local, connection.remote);
            if self.find(&self.node.proxy_connections, &key)?.is_none() {
                direct.insert(connection);
            }
        }
        Ok(direct)
    }
}

/// What the tables say of one pod, apart from its fence.
struct Wanted {
    flags: u32,
    addresses: BTreeSet<PodAddress>,
    ports: BTreeSet<PodPort>,
    sources: Sources,
}

impl Wanted {
    fn of(netns: &NetNs, cookie: u64, capture: &Capture) -> Result<Self, ApplyError> {
        let addresses = Addresses::of(netns)?;
        let sources = Sources::of(netns, &addresses)?;
        let mut flags = 0;
        for (has, flag) in [
            (sources.v4.is_some(), Pod::HAS_IPV4),
            (sources.v6.is_some(), Pod::HAS_IPV6),
        ] {
            flags |= if has { flag } else { 0 };
        }
        let mut wanted = Self {
            flags,
            addresses: (addresses.iter())
                .filter(|ip| !ip.is_loopback())
                .map(|ip| PodAddress {
                    netns: cookie,
                    ip: ip.into(),
                })
                .collect(),
            ports: BTreeSet::new(),
            sources,
        };
        if capture.phase == Phase::Capturing {
            wanted.flags |= Pod::CAPTURING | Pod::FENCED;
            if capture.refuses_plain {
                wanted.flags |= Pod::REFUSES_PLAIN;
            }
            for (list, kind) in [
                (&capture.exclude_outbound_ports, PodPort::EXCLUDED_OUTBOUND),
                (&capture.exclude_inbound_ports, PodPort::EXCLUDED_INBOUND),
                (&capture.plain_inbound_ports, PodPort::PLAIN_INBOUND),
            ] {
                let ports = list.iter().map(|port| PodPort::new(cookie, *port, kind));
                wanted.ports.extend(ports);
            }
        }
        Ok(wanted)
    }
}

impl Backend for Ebpf {
    async fn apply(
        &self,
        netns: &NetNs,
        capture: &Capture,
        fence: &Arc<Fence>,
    ) -> Result<BTreeSet<Connection>, ApplyError> {
        let cookie = netns.cookie()?;
        let older = self.write(netns, cookie, capture, fence)?;
        self.is_ours_alone(cookie)?;
        Ok(older)
    }

    async fn change_fence(&self, netns: &NetNs, step: &FenceStep) -> Result<(), ApplyError> {
        let cookie = netns.cookie()?;
        Ok(self.change_fences(|fences, map| fences.step(map, cookie, step))?)
    }

    async fn verify(&self, netns: &NetNs, capture: &Capture) -> Result<(), VerifyError> {
        let cookie = netns.cookie().map_err(ApplyError::from)?;
        let node = &self.node;
        if let Some(fault) = node.fault(netns).map_err(ApplyError::from)? {
            return Err(fault.into());
        }
        let wanted = Wanted::of(netns, cookie, capture)?;
        let found = self.find(&node.pods, &cookie)?;
        if found.is_none_or(|pod| pod.flags != wanted.flags) {
            return Err(VerifyError::Map { map: "pods" });
        }
        let failed = |error| ApplyError::from(NodeError::from(error));
        // A pod may get another address at any time: that is followed, not mended.
        (node.addresses.replace(cookie, wanted.addresses)).map_err(failed)?;
        if node.ports.of(cookie) != wanted.ports || !node.ports.stands(cookie).map_err(failed)? {
            return Err(VerifyError::Map { map: "pod_ports" });
        }
        self.sysctls.verify(netns)?;
        routes::verify(netns, wanted.sources)?;
        Ok(self.adopt_listeners(netns, cookie)?)
    }

    async fn stands(&self, netns: &NetNs) -> Result<bool, ApplyError> {
        Ok(self.owns(netns).await? || routes::stand(netns)?)
    }

    async fn owns(&self, netns: &NetNs) -> Result<bool, ApplyError> {
        Ok(self.written(netns.cookie()?)?.is_some())
    }

    async fn observe(
        &self,
        netns: &NetNs,
        older: &mut BTreeSet<Connection>,
    ) -> Result<Observed, ApplyError> {
        let cookie = netns.cookie()?;
        let node = &self.node;
        for ended in Connections::list(netns)?.ended(older) {
            let key = PodConnection::new(cookie, ended.local, ended.remote);
            node.older.remove(&key).map_err(NodeError::from)?;
            older.remove(&ended);
        }
        let counts = self.find(&node.counts, &cookie)?.unwrap_or_default();
        Ok(Observed {
            captured: usize::try_from(counts.carried).unwrap_or_default(),
            older: older.len(),
            fence: FenceCount {
                out_packets: counts.fence_out,
                in_packets: counts.fence_in,
                lost_reply_packets: counts.lost_reply,
            },
            no_listener_syns: counts.no_listener,
            back_end: Some(BackEnd::Ebpf),
        })
    }

    fn forget_gone(&self) -> Result<(), ApplyError> {
        self.forget_former()?;
        for (cookie, attached) in self.node.pods_attached()? {
            // One that stands partly is being captured.
            if attached == Attached::Gone {
                self.forget(cookie)?;
            }
        }
        Ok(())
    }

    async fn remove(&self, netns: &NetNs) -> Result<(), ApplyError> {
        let cookie = netns.cookie()?;
        if let Some(pod) = self.written(cookie)? {
            // Capture and fence end here; the entry stays until everything that it tells of has been put back.
            let idle = Pod { flags: 0, ..pod };
            (self.node.pods.set(&cookie, &idle)).map_err(NodeError::from)?;
            self.is_ours_alone(cookie)?;
            self.node.detach_pod(cookie)?;
            routes::remove(netns)?;
            if pod.sysctls & RECORDED != 0 {
                self.sysctls.write(netns, pod.sysctls)?;
            }
            self.forget(cookie)?;
        }
        routes::remove(netns)
    }
}
