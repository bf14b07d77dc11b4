// SPDX-License-Identifier: Apache-2.0
//! Two namespaces and a veth between them, and sockets made in one or the other, in the proxy's cgroup or not.

use podveil_apply::{
    BackEnd, BackEndChoice, BackEnds, Backend, Ebpf, Flavour, Iptables, Nftables, VerifyError,
};
use podveil_bpf::{Table, layout};
use podveil_netns::cgroup::CgroupPath;
use podveil_netns::{NetNs, cgroup};
use socket2::{Domain, Protocol, Socket, Type};
use std::cell::Cell;
use std::collections::BTreeSet;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

/// A process is in one cgroup at a time, so that one test at a time may play the proxy.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
/// Long enough for a busy machine; only a test that waits for silence spends it.
const PATIENCE: Duration = Duration::from_secs(5);
const SILENCE: Duration = Duration::from_millis(300);

#[derive(Clone, Copy, Debug)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];
}

/// A back end and what breaks it.
pub trait Tested: Backend + Sized {
    const NAME: BackEnd;

    fn open(cgroup: &CgroupPath) -> Self;

    /// Takes everything of all pods away, when the test is over.
    fn close(cgroup: &CgroupPath);

    /// Takes capture away behind the back end's back, and leaves the fence.
    fn flush_capture(world: &World<Self>);

    /// Is this what a look at flushed capture ends with?
    fn names_capture(error: &VerifyError) -> bool;

    /// What is kept outside the namespaces, for all of them.
    fn kept(cgroup: &CgroupPath) -> Vec<String>;

    /// Lets the application's answers to the proxy go where their addresses say.
    fn lose_answers(world: &World<Self>);

    /// Lets a rule of somebody else's act before capture.
    fn divert(world: &World<Self>);
}

impl Tested for Nftables {
    const NAME: BackEnd = BackEnd::Nftables;

    fn open(cgroup: &CgroupPath) -> Self {
        Self::new(cgroup.clone())
    }

    fn close(_cgroup: &CgroupPath) {}

    fn flush_capture(world: &World<Self>) {
        for chain in ["capture_out", "capture_in"] {
            run(
                &world.pod,
                "nft",
                &["flush", "chain", "inet", "podveil", chain],
            );
        }
    }

    fn names_capture(error: &VerifyError) -> bool {
        matches!(
            error,
            VerifyError::Chain {
                chain: "capture_out",
                ..
            }
        )
    }

    fn kept(_cgroup: &CgroupPath) -> Vec<String> {
        Vec::new()
    }

    fn lose_answers(world: &World<Self>) {
        run(
            &world.pod,
            "nft",
            &["flush", "chain", "inet", "podveil", "local_replies"],
        );
    }

    fn divert(world: &World<Self>) {
        for line in [
            "add table ip other",
            "add chain ip other out { type nat hook output priority -190 ; }",
            "add rule ip other out ip daddr 192.0.2.1 tcp dport 15008 dnat to 10.9.0.2",
        ] {
            run(&world.pod, "nft", &[line]);
        }
    }
}

impl World<Nftables> {
    /// Puts `rule` in the place of the one of `chain` that has the same comment.
    pub fn rewrite(&self, chain: &str, rule: &str) {
        let comment = &rule[rule.find("comment").unwrap()..];
        let listing = run(
            &self.pod,
            "nft",
            &["-a", "list", "chain", "inet", "podveil", chain],
        );
        let line = listing.lines().find(|line| line.contains(comment)).unwrap();
        let handle = line.rsplit_once("handle ").unwrap().1;
        let text = format!("replace rule inet podveil {chain} handle {handle} {rule}");
        run(&self.pod, "nft", &[&text]);
    }
}

fn keys<K, V>(maps: &Path, name: &'static str) -> Vec<String>
where
    K: layout::Plain + Ord + std::fmt::Debug,
    V: layout::Plain,
{
    let table = Table::<K, V>::open(maps, name).unwrap();
    let keys = table.keys().unwrap();
    keys.iter().map(|key| format!("{name}: {key:?}")).collect()
}

impl Tested for Ebpf {
    const NAME: BackEnd = BackEnd::Ebpf;

    fn open(cgroup: &CgroupPath) -> Self {
        Self::open(&pins(cgroup), cgroup.clone()).unwrap()
    }

    fn close(cgroup: &CgroupPath) {
        Self::purge(&pins(cgroup)).unwrap();
    }

    fn flush_capture(world: &World<Self>) {
        let node = pins(&world.cgroup).join("v1");
        let cookie = world.pod.cookie().unwrap().to_string();
        for pin in ["node/capture_ipv4", "node/capture_ipv6"] {
            std::fs::remove_file(node.join(pin)).unwrap();
        }
        std::fs::remove_file(node.join("pods").join(cookie).join("capture")).unwrap();
        // The kernel lets go of a link a moment after its last holder has. From then on the fence refuses.
        let deadline = std::time::Instant::now() + PATIENCE;
        for family in Family::BOTH {
            let refused = || {
                let connected = world.app_connects((world.peer_ip(family), 8080));
                connected.is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
            };
            while !refused() {
                assert!(
                    std::time::Instant::now() < deadline,
                    "capture is still there"
                );
            }
        }
    }

    fn names_capture(error: &VerifyError) -> bool {
        matches!(error, VerifyError::Program(fault) if fault.program == "capture_ipv4")
    }

    fn kept(cgroup: &CgroupPath) -> Vec<String> {
        let mut layouts = std::fs::read_dir(pins(cgroup)).unwrap();
        let node = layouts.next().unwrap().unwrap().path();
        let pods = std::fs::read_dir(node.join("pods")).unwrap();
        let folders = pods.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let maps = node.join("maps");
        folders
            .chain(keys::<u64, layout::Pod>(&maps, "pods"))
            .chain(keys::<u64, layout::PodCounts>(&maps, "pod_counts"))
            .chain(keys::<layout::PodAddress, u32>(&maps, "pod_addresses"))
            .chain(keys::<layout::PodPort, u32>(&maps, "pod_ports"))
            .chain(keys::<layout::PodConnection, u32>(&maps, "older"))
            .chain(keys::<layout::Ip, u32>(&maps, "fence"))
            .collect()
    }

    fn lose_answers(world: &World<Self>) {
        for family in ["-4", "-6"] {
            run(&world.pod, "ip", &[family, "rule", "del", "pref", "1338"]);
        }
    }

    fn divert(world: &World<Self>) {
        run(
            &world.pod,
            "ip",
            &["rule", "add", "pref", "1", "lookup", "main"],
        );
    }
}

thread_local! {
    /// Which iptables a test of this thread means.
    pub static FLAVOUR: Cell<Flavour> = const { Cell::new(Flavour::Nft) };
}

impl World<Iptables> {
    /// One line for the iptables of both address families.
    fn iptables(&self, line: &str) {
        let flavour = match FLAVOUR.get() {
            Flavour::Legacy => "legacy",
            Flavour::Nft => "nft",
        };
        for program in ["iptables", "ip6tables"] {
            let arguments: Vec<&str> = line.split(' ').collect();
            run(&self.pod, &format!("{program}-{flavour}"), &arguments);
        }
    }
}

impl Tested for Iptables {
    const NAME: BackEnd = BackEnd::Iptables;

    fn open(cgroup: &CgroupPath) -> Self {
        Self::new(cgroup.clone(), FLAVOUR.get())
    }

    fn close(_cgroup: &CgroupPath) {}

    fn flush_capture(world: &World<Self>) {
        world.iptables("-t nat -F PODVEIL_CAPTURE");
        world.iptables("-t nat -F PODVEIL_CAPTURE_IN");
    }

    fn names_capture(error: &VerifyError) -> bool {
        matches!(error, VerifyError::IptablesChain { chain, .. } if chain == "PODVEIL_CAPTURE")
    }

    fn kept(_cgroup: &CgroupPath) -> Vec<String> {
        Vec::new()
    }

    fn lose_answers(world: &World<Self>) {
        world.iptables("-t mangle -F PODVEIL_MARKS");
    }

    fn divert(world: &World<Self>) {
        world.iptables("-t nat -I OUTPUT -p tcp --dport 15008 -j REDIRECT --to-ports 9");
    }
}

fn pins(cgroup: &CgroupPath) -> std::path::PathBuf {
    let name = cgroup.absolute();
    std::path::Path::new("/run").join(name.file_name().unwrap())
}

/// The proxy's, in the tests of one process.
pub fn cgroup_of(process: u32) -> CgroupPath {
    cgroup::locate(&format!("podveil-test-{process}")).unwrap()
}

pub struct World<B: Tested> {
    pub pod: NetNs,
    pub peer: NetNs,
    pub backend: B,
    cgroup: CgroupPath,
    _turn: MutexGuard<'static, ()>,
}

pub struct Listening(TcpListener);

impl<B: Tested> World<B> {
    pub fn new() -> Self {
        let turn = ONE_AT_A_TIME
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        let cgroup = cgroup_of(std::process::id());
        std::fs::create_dir_all(cgroup.absolute()).unwrap();
        let world = Self {
            pod: new_netns(),
            peer: new_netns(),
            backend: B::open(&cgroup),
            cgroup,
            _turn: turn,
        };
        use std::os::fd::{AsFd, AsRawFd};
        let peer = format!(
            "/proc/{}/fd/{}",
            std::process::id(),
            world.peer.as_fd().as_raw_fd()
        );
        for line in [
            "link set lo up".to_owned(),
            format!("link add eth0 type veth peer name eth0 netns {peer}"),
            // Without link-local addresses, which come when the test has begun.
            "link set eth0 addrgenmode none up".into(),
            "addr add 10.9.0.1/24 dev eth0".into(),
            "addr add fd09::1/64 dev eth0 nodad".into(),
        ] {
            run(&world.pod, "ip", &line.split(' ').collect::<Vec<_>>());
        }
        for line in [
            "link set lo up",
            "link set eth0 addrgenmode none up",
            "addr add 10.9.0.2/24 dev eth0",
            "addr add fd09::2/64 dev eth0 nodad",
            "route add 10.77.0.1 via 10.9.0.1",
            "route add fd77::1 via fd09::1",
        ] {
            run(&world.peer, "ip", &line.split(' ').collect::<Vec<_>>());
        }
        // A link comes up in its own time, and a neighbour that was asked too early is asked again after a second.
        let deadline = std::time::Instant::now() + PATIENCE;
        for family in Family::BOTH {
            let _listening = world.peer_listens(family, 7);
            loop {
                match world.app_connects((world.peer_ip(family), 7)) {
                    Ok(stream) => break reset(stream),
                    Err(error) => assert!(std::time::Instant::now() < deadline, "{error}"),
                }
            }
        }
        world
    }

    pub fn pod_ip(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => "10.9.0.1".parse().unwrap(),
            Family::V6 => "fd09::1".parse().unwrap(),
        }
    }

    pub fn peer_ip(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => "10.9.0.2".parse().unwrap(),
            Family::V6 => "fd09::2".parse().unwrap(),
        }
    }

    /// An address that the peer routes to the pod and nobody has.
    pub fn foreign_ip(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => "10.77.0.1".parse().unwrap(),
            Family::V6 => "fd77::1".parse().unwrap(),
        }
    }

    fn as_proxy<T>(&self, work: impl FnOnce() -> T) -> T {
        let enter = |folder: &std::path::Path| {
            std::fs::write(folder.join("cgroup.procs"), std::process::id().to_string()).unwrap();
        };
        let folder = self.cgroup.absolute();
        enter(&folder);
        let result = work();
        enter(folder.parent().unwrap());
        result
    }

    pub fn proxy_listens(&self, family: Family, port: u16) -> Listening {
        let listening = self.as_proxy(|| listen(&self.pod, family, port));
        let socket = socket2::SockRef::from(&listening.0);
        match family {
            Family::V4 => socket.set_ip_transparent_v4(true).unwrap(),
            Family::V6 => socket.set_ip_transparent_v6(true).unwrap(),
        }
        listening
    }

    pub fn app_listens(&self, family: Family, port: u16) -> Listening {
        listen(&self.pod, family, port)
    }

    pub fn peer_listens(&self, family: Family, port: u16) -> Listening {
        listen(&self.peer, family, port)
    }

    pub fn app_connects(&self, to: (IpAddr, u16)) -> io::Result<TcpStream> {
        connect(&self.pod, None, to.into())
    }

    pub fn app_connects_from(&self, port: u16, to: (IpAddr, u16)) -> io::Result<TcpStream> {
        let any = match to.0 {
            IpAddr::V4(_) => IpAddr::from([0; 4]),
            IpAddr::V6(_) => IpAddr::from([0; 16]),
        };
        connect(&self.pod, Some(SocketAddr::new(any, port)), to.into())
    }

    pub fn app_connects_marked(&self, mark: u32, to: (IpAddr, u16)) -> io::Result<TcpStream> {
        let set = |socket: &Socket| socket.set_mark(mark);
        connect_with(&self.pod, None, to.into(), set)
    }

    pub fn app_connects_by_mptcp(&self, to: (IpAddr, u16)) -> io::Result<TcpStream> {
        self.pod
            .run(|| {
                let to = SocketAddr::from(to);
                let (domain, protocol) = (Domain::for_address(to), Some(Protocol::MPTCP));
                let socket = Socket::new(domain, Type::STREAM, protocol)?;
                socket.connect_timeout(&to.into(), SILENCE)?;
                let stream = TcpStream::from(socket);
                stream.set_read_timeout(Some(PATIENCE))?;
                Ok(stream)
            })
            .unwrap()
    }

    /// Connects and sends with the SYN, where a cookie allows it.
    pub fn app_fast_opens(&self, to: (IpAddr, u16), data: &[u8]) -> TcpStream {
        use nix::sys::socket::{setsockopt, sockopt};
        let set = |socket: &Socket| Ok(setsockopt(socket, sockopt::TcpFastOpenConnect, &true)?);
        let mut stream = connect_with(&self.pod, None, to.into(), set).unwrap();
        stream.write_all(data).unwrap();
        stream
    }

    pub fn peer_connects_from(&self, port: u16, to: (IpAddr, u16)) -> io::Result<TcpStream> {
        let source = match to.0 {
            IpAddr::V4(_) => self.peer_ip(Family::V4),
            IpAddr::V6(_) => self.peer_ip(Family::V6),
        };
        connect(&self.peer, Some(SocketAddr::new(source, port)), to.into())
    }

    pub fn peer_connects(&self, to: (IpAddr, u16)) -> io::Result<TcpStream> {
        connect(&self.peer, None, to.into())
    }

    pub fn proxy_connects(&self, to: (IpAddr, u16)) -> io::Result<TcpStream> {
        self.as_proxy(|| connect(&self.pod, None, to.into()))
    }

    pub fn proxy_connects_as(&self, source: IpAddr, to: (IpAddr, u16)) -> io::Result<TcpStream> {
        self.as_proxy(|| connect(&self.pod, Some(SocketAddr::new(source, 0)), to.into()))
    }

    pub fn cgroup(&self) -> &CgroupPath {
        &self.cgroup
    }

    /// All back ends, with the same folder and cgroup.
    pub async fn back_ends(&self, choice: BackEndChoice) -> BackEnds {
        BackEnds::open(choice, &pins(&self.cgroup), self.cgroup.clone())
            .await
            .unwrap()
    }

    /// A process that starts anew takes over.
    pub fn restart(&mut self) {
        self.backend = B::open(&self.cgroup);
    }

    /// Where eBPF's maps and links are.
    pub fn pins(&self) -> std::path::PathBuf {
        pins(&self.cgroup)
    }

    pub fn kept(&self) -> Vec<String> {
        B::kept(&self.cgroup)
    }

    /// How many this process has open.
    pub fn descriptors(&self) -> usize {
        std::fs::read_dir("/proc/self/fd").unwrap().count()
    }

    pub fn sysctl(&self, setting: &str) {
        run(&self.pod, "sysctl", &["-q", setting]);
    }

    /// The peer is the way to everywhere.
    pub fn default_routes(&self) {
        for family in Family::BOTH {
            let via = self.peer_ip(family).to_string();
            run(&self.pod, "ip", &["route", "add", "default", "via", &via]);
        }
    }

    /// Another link between the two; their addresses on it.
    pub fn second_interface(&self) -> (IpAddr, IpAddr) {
        use std::os::fd::{AsFd, AsRawFd};
        let peer = format!(
            "/proc/{}/fd/{}",
            std::process::id(),
            self.peer.as_fd().as_raw_fd()
        );
        for (netns, line) in [
            (
                &self.pod,
                format!("link add eth1 type veth peer name eth1 netns {peer}"),
            ),
            (&self.pod, "link set eth1 up".to_owned()),
            (&self.peer, "link set eth1 up".to_owned()),
            (&self.pod, "addr add 10.8.0.1/24 dev eth1".to_owned()),
            (&self.peer, "addr add 10.8.0.2/24 dev eth1".to_owned()),
        ] {
            run(netns, "ip", &line.split(' ').collect::<Vec<_>>());
        }
        ("10.8.0.1".parse().unwrap(), "10.8.0.2".parse().unwrap())
    }

    /// Does a node beside this one take the pod for its own?
    pub async fn is_anothers(&self) -> bool {
        let name = format!("podveil-test-another-{}", std::process::id());
        let cgroup = cgroup::locate(&name).unwrap();
        std::fs::create_dir_all(cgroup.absolute()).unwrap();
        let owns = B::open(&cgroup).owns(&self.pod).await.unwrap();
        B::close(&cgroup);
        std::fs::remove_dir(cgroup.absolute()).unwrap();
        owns
    }

    pub fn datagrams_pass(&self, family: Family) {
        let bind = |netns: &NetNs, ip| {
            let socket = netns
                .run(|| UdpSocket::bind(SocketAddr::new(ip, 0)))
                .unwrap()
                .unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket
        };
        let pod = bind(&self.pod, self.pod_ip(family));
        let peer = bind(&self.peer, self.peer_ip(family));
        let mut buffer = [0; 8];
        pod.send_to(b"ping", peer.local_addr().unwrap()).unwrap();
        let (length, from) = peer.recv_from(&mut buffer).unwrap();
        assert_eq!(
            (&buffer[..length], from),
            (&b"ping"[..], pod.local_addr().unwrap())
        );
        peer.send_to(b"pong", from).unwrap();
        assert_eq!(pod.recv(&mut buffer).unwrap(), 4);
    }

    pub async fn until_nothing_is_captured(&self) {
        let wait = async {
            let mut older = BTreeSet::new();
            while self
                .backend
                .observe(&self.pod, &mut older)
                .await
                .unwrap()
                .captured
                > 0
            {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.unwrap();
    }

    /// Rules, routes and sysctls that anybody could have left.
    pub fn everything(&self) -> String {
        let rules = run(&self.pod, "nft", &["list", "ruleset"]);
        // A warning of whose table it is.
        let rules: Vec<&str> = (rules.lines())
            .filter(|line| !line.starts_with("# "))
            .collect();
        [
            rules.join("\n"),
            ["iptables-legacy-save", "ip6tables-legacy-save"]
                .map(|program| run(&self.pod, program, &[]).contains("PODVEIL").to_string())
                .concat(),
            run(&self.pod, "ipset", &["save"]),
            run(&self.pod, "ip", &["rule"]),
            run(&self.pod, "ip", &["-6", "rule"]),
            run(&self.pod, "ip", &["route", "show", "table", "all"]),
            run(&self.pod, "ip", &["-6", "route", "show", "table", "all"]),
            run(&self.pod, "ip", &["addr"]),
            run(&self.pod, "sysctl", &["-a", "-r", "fwmark"]),
        ]
        .concat()
    }
}

impl<B: Tested> Drop for World<B> {
    fn drop(&mut self) {
        // A failed test fails by its own words.
        if !std::thread::panicking() {
            B::close(&self.cgroup);
        }
        let _ = std::fs::remove_dir(self.cgroup.absolute());
    }
}

impl Listening {
    pub fn accept(&self) -> TcpStream {
        let deadline = std::time::Instant::now() + PATIENCE;
        loop {
            match self.0.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false).unwrap();
                    stream.set_read_timeout(Some(PATIENCE)).unwrap();
                    return stream;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    assert!(std::time::Instant::now() < deadline, "nobody connected");
                    std::thread::yield_now();
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    pub fn is_idle(&self) -> bool {
        matches!(self.0.accept(), Err(error) if error.kind() == ErrorKind::WouldBlock)
    }
}

pub fn both_ways(one: &TcpStream, two: &TcpStream) {
    for (mut from, mut to, word) in [(one, two, b"ping"), (two, one, b"pong")] {
        from.write_all(word).unwrap();
        let mut buffer = [0; 4];
        to.read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, word);
    }
}

/// Ends a connection cleanly, `first` first.
pub fn ended(first: TcpStream, mut second: TcpStream) {
    drop(first);
    assert_eq!(second.read(&mut [0]).unwrap(), 0);
}

/// Ends a connection without TIME-WAIT.
pub fn reset(stream: TcpStream) {
    let socket = socket2::SockRef::from(&stream);
    socket.set_linger(Some(Duration::ZERO)).unwrap();
}

/// As the proxy finds it out: a socket that NAT brought has the listener's port, one that was assigned has its own.
pub fn original_dst(stream: &TcpStream) -> SocketAddr {
    let local = stream.local_addr().unwrap();
    if !matches!(local.port(), 15001 | 15006) {
        return local;
    }
    let socket = socket2::SockRef::from(stream);
    let address = match local.is_ipv4() {
        true => socket.original_dst_v4(),
        false => socket.original_dst_v6(),
    };
    address.unwrap().as_socket().unwrap()
}

pub fn new_netns() -> NetNs {
    std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        NetNs::current().unwrap()
    })
    .join()
    .unwrap()
}

pub fn run(netns: &NetNs, program: &str, arguments: &[&str]) -> String {
    let output = netns
        .run(|| Command::new(program).args(arguments).output())
        .unwrap()
        .unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

fn listen(netns: &NetNs, family: Family, port: u16) -> Listening {
    let (domain, any) = match family {
        Family::V4 => (Domain::IPV4, "0.0.0.0"),
        Family::V6 => (Domain::IPV6, "::"),
    };
    netns
        .run(|| {
            let socket = Socket::new(domain, Type::STREAM, None).unwrap();
            if domain == Domain::IPV6 {
                socket.set_only_v6(true).unwrap();
            }
            socket.set_reuse_address(true).unwrap();
            let address = SocketAddr::new(any.parse().unwrap(), port);
            socket.bind(&address.into()).unwrap();
            socket.listen(16).unwrap();
            socket.set_nonblocking(true).unwrap();
            Listening(socket.into())
        })
        .unwrap()
}

fn connect(netns: &NetNs, source: Option<SocketAddr>, to: SocketAddr) -> io::Result<TcpStream> {
    connect_with(netns, source, to, |_| Ok(()))
}

fn connect_with(
    netns: &NetNs,
    source: Option<SocketAddr>,
    to: SocketAddr,
    set: impl FnOnce(&Socket) -> io::Result<()>,
) -> io::Result<TcpStream> {
    netns
        .run(|| {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
            set(&socket)?;
            if let Some(source) = source {
                match to.is_ipv4() {
                    true => socket.set_ip_transparent_v4(true)?,
                    false => socket.set_ip_transparent_v6(true)?,
                }
                socket.set_reuse_address(true)?;
                socket.bind(&source.into())?;
            }
            // Silence is an answer here: a SYN that nobody may see.
            socket.connect_timeout(&to.into(), SILENCE)?;
            let stream = TcpStream::from(socket);
            stream.set_read_timeout(Some(PATIENCE))?;
            Ok(stream)
        })
        .unwrap()
}
