// SPDX-License-Identifier: Apache-2.0
//! What needs the kernel's help: redirected connections and foreign source addresses. Each test runs on a thread of its
//! own in a fresh network namespace, which goes away with the thread.

use nix::sched::{CloneFlags, unshare};
use podveil_net::{Family, KEPT_SOURCE_PORTS, MARK, NoOriginalDst, PodSockets, original_dst};
use podveil_netns::NetNs;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

const TIMEOUT: Duration = Duration::from_secs(5);

fn sh(script: &str) {
    let status = Command::new("sh")
        .args(["-e", "-c", script])
        .stdin(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success(), "{script}");
}

fn in_namespace(setup: &'static str, test: impl AsyncFnOnce(PodSockets) + Send + 'static) {
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        sh(
            "ip link set lo up; ip address add 10.9.0.1/32 dev lo; ip address add fd00:9::1/128 dev lo nodad",
        );
        sh(setup);
        let sockets = PodSockets::new(Arc::new(NetNs::current().unwrap()), Some(MARK));
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(test(sockets));
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

#[test]
#[ignore = "netns"]
fn a_redirected_connection_tells_what_was_dialled() {
    in_namespace(
        "nft 'table inet t { chain out { type nat hook output priority -100; tcp dport 80 redirect to :15001; }; }'",
        async |sockets| {
            for (family, dialled) in [(Family::V4, "10.9.0.1:80"), (Family::V6, "[fd00:9::1]:80")] {
                let dialled: SocketAddr = dialled.parse().unwrap();
                let listener = sockets.listen(15001, family, 16).unwrap();
                let _near = sockets.connect(dialled, TIMEOUT).await.unwrap();
                let (far, _) = listener.accept().await.unwrap();
                assert_eq!(original_dst(&far, 15001).unwrap().0, dialled);

                let direct = SocketAddr::new(dialled.ip(), 15001);
                let _near = sockets.connect(direct, TIMEOUT).await.unwrap();
                let (far, _) = listener.accept().await.unwrap();
                let refused = original_dst(&far, 15001).unwrap_err();
                assert!(
                    matches!(refused, NoOriginalDst::NotRedirected),
                    "{refused:?}"
                );
            }
        },
    );
}

#[test]
#[ignore = "netns"]
fn a_foreign_source_address_is_kept() {
    in_namespace(
        "ip route add local default dev lo table 77; ip rule add from 10.9.0.1 lookup 77
         ip -6 route add local default dev lo table 77; ip -6 rule add from fd00:9::1 lookup 77",
        async |sockets| {
            for (family, source, destination) in [
                (Family::V4, "10.9.0.5", "10.9.0.1:8080"),
                (Family::V6, "fd00:9::5", "[fd00:9::1]:8080"),
            ] {
                let destination: SocketAddr = destination.parse().unwrap();
                let listener = sockets.listen(8080, family, 16).unwrap();
                let source = source.parse().unwrap();
                let near = sockets
                    .connect_as(source, destination, TIMEOUT)
                    .await
                    .unwrap();
                let (_far, peer) = listener.accept().await.unwrap();
                assert_eq!(peer.ip(), source);
                assert_eq!(peer, near.local_addr().unwrap());
                assert!(KEPT_SOURCE_PORTS.contains(&peer.port()), "{peer}");
            }
        },
    );
}

#[test]
#[ignore = "netns"]
fn taken_source_ports_are_passed_over() {
    const CONNECTIONS: usize = 2000;
    in_namespace(
        "ip route add local default dev lo table 77; ip rule add from 10.9.0.1 lookup 77",
        async |sockets| {
            let destination: SocketAddr = "10.9.0.1:8080".parse().unwrap();
            let listener = sockets.listen(8080, Family::V4, 16).unwrap();
            let source = "10.9.0.5".parse().unwrap();
            let (mut open, mut ports) = (Vec::new(), BTreeSet::new());
            for _ in 0..CONNECTIONS {
                let near = sockets.connect_as(source, destination, TIMEOUT);
                let (near, far) = tokio::join!(near, listener.accept());
                let (far, peer) = far.unwrap();
                assert!(ports.insert(peer.port()), "port {} twice", peer.port());
                open.push((near.unwrap(), far));
            }
        },
    );
}

#[test]
#[ignore = "netns"]
fn a_destination_that_does_not_answer_is_given_up() {
    in_namespace(
        "nft 'table inet t { chain in { type filter hook input priority 0; tcp dport 81 drop; }; }'",
        async |sockets| {
            let destination = "10.9.0.1:81".parse().unwrap();
            let error = sockets
                .connect(destination, Duration::from_millis(50))
                .await
                .unwrap_err();
            assert!(
                matches!(error, podveil_net::ConnectError::NoAnswer { .. }),
                "{error:?}"
            );
        },
    );
}
