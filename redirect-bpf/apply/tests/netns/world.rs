// SPDX-License-Identifier: Apache-2.0
//! Two namespaces and a veth between them, and sockets made in one or the other, in the proxy's cgroup or not.

use podveil_apply::{Backend, Nftables};
use podveil_netns::{NetNs, cgroup};
use socket2::{Domain, Socket, Type};
use std::collections::BTreeSet;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
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

pub struct World {
    pub pod: NetNs,
    pub peer: NetNs,
    pub backend: Nftables,
    cgroup: cgroup::CgroupPath,
    _turn: MutexGuard<'static, ()>,
}

pub struct Listening(TcpListener);

impl World {
    pub fn new() -> Self {
        let turn = ONE_AT_A_TIME
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        let name = format!("podveil-test-{}", std::process::id());
        let cgroup = cgroup::locate(&name).unwrap();
        std::fs::create_dir_all(cgroup.absolute()).unwrap();
        let world = Self {
            pod: new_netns(),
            peer: new_netns(),
            backend: Nftables::new(cgroup.clone()),
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
            "link set eth0 up".into(),
            "addr add 10.9.0.1/24 dev eth0".into(),
            "addr add fd09::1/64 dev eth0 nodad".into(),
        ] {
            run(&world.pod, "ip", &line.split(' ').collect::<Vec<_>>());
        }
        for line in [
            "link set lo up",
            "link set eth0 up",
            "addr add 10.9.0.2/24 dev eth0",
            "addr add fd09::2/64 dev eth0 nodad",
            "route add 10.77.0.1 via 10.9.0.1",
            "route add fd77::1 via fd09::1",
        ] {
            run(&world.peer, "ip", &line.split(' ').collect::<Vec<_>>());
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
        self.as_proxy(|| listen(&self.pod, family, port))
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

    pub fn peer_connects(&self, to: (IpAddr, u16)) -> io::Result<TcpStream> {
        connect(&self.peer, None, to.into())
    }

    pub fn proxy_connects(&self, to: (IpAddr, u16)) -> io::Result<TcpStream> {
        self.as_proxy(|| connect(&self.pod, None, to.into()))
    }

    pub fn proxy_connects_as(&self, source: IpAddr, to: (IpAddr, u16)) -> io::Result<TcpStream> {
        self.as_proxy(|| connect(&self.pod, Some(SocketAddr::new(source, 0)), to.into()))
    }

    pub fn nft(&self, script: &str) {
        for line in script.lines() {
            run(&self.pod, "nft", &line.split(' ').collect::<Vec<_>>());
        }
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
        [
            run(&self.pod, "nft", &["list", "ruleset"]),
            run(&self.pod, "ip", &["rule"]),
            run(&self.pod, "ip", &["-6", "rule"]),
            run(&self.pod, "ip", &["route", "show", "table", "all"]),
            run(&self.pod, "ip", &["-6", "route", "show", "table", "all"]),
            run(&self.pod, "ip", &["addr"]),
        ]
        .concat()
    }
}

impl Drop for World {
    fn drop(&mut self) {
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

/// Ends a connection without TIME-WAIT.
pub fn reset(stream: TcpStream) {
    let socket = socket2::SockRef::from(&stream);
    socket.set_linger(Some(Duration::ZERO)).unwrap();
}

pub fn original_dst(stream: &TcpStream) -> SocketAddr {
    let socket = socket2::SockRef::from(stream);
    let address = match stream.local_addr().unwrap().is_ipv4() {
        true => socket.original_dst_v4(),
        false => socket.original_dst_v6(),
    };
    address.unwrap().as_socket().unwrap()
}

fn new_netns() -> NetNs {
    std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        NetNs::current().unwrap()
    })
    .join()
    .unwrap()
}

fn run(netns: &NetNs, program: &str, arguments: &[&str]) -> String {
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
    netns
        .run(|| {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
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
