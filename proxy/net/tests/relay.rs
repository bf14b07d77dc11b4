// SPDX-License-Identifier: Apache-2.0
//! The relay between two TCP connections over loopback: `client` and `server` are the applications.

use podveil_net::{Broken, Counters, Ended, Side, TcpEnd, prepare_application, relay};
use std::future::{Future, pending};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

const MIB: usize = 1024 * 1024;

struct Fixture {
    client: TcpStream,
    server: TcpStream,
    counters: Arc<Counters>,
    relay: JoinHandle<Ended<()>>,
    stop: oneshot::Sender<()>,
}

async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (near, far) = tokio::join!(
        TcpStream::connect(listener.local_addr().unwrap()),
        listener.accept()
    );
    (near.unwrap(), far.unwrap().0)
}

async fn fixture() -> Fixture {
    let (client, a) = pair().await;
    let (b, server) = pair().await;
    prepare_application(&a).unwrap();
    prepare_application(&b).unwrap();
    let counters = Arc::new(Counters::default());
    let (stop, stopped) = oneshot::channel();
    let relay = tokio::spawn({
        let counters = counters.clone();
        async move {
            relay(TcpEnd::new(a), TcpEnd::new(b), &counters, async {
                if stopped.await.is_err() {
                    pending::<()>().await;
                }
            })
            .await
        }
    });
    Fixture {
        client,
        server,
        counters,
        relay,
        stop,
    }
}

fn pattern(length: usize, seed: usize) -> Vec<u8> {
    (0..length)
        .map(|at| ((at + seed) ^ (at >> 9)) as u8)
        .collect()
}

/// Sends `bytes`, ends the direction, and reads to the end of the other one.
async fn exchange(mut stream: TcpStream, bytes: Vec<u8>) -> std::io::Result<Vec<u8>> {
    let (mut read, mut write) = stream.split();
    let send = async {
        write.write_all(&bytes).await?;
        write.shutdown().await
    };
    let mut received = Vec::new();
    let (sent, read) = tokio::join!(send, read.read_to_end(&mut received));
    sent?;
    read?;
    Ok(received)
}

fn reset(stream: TcpStream) {
    socket2::SockRef::from(&stream)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
    drop(stream);
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_arrive_whole_in_both_directions() {
    for (forth, back) in [
        (0, 0),
        (1, 0),
        (0, 1),
        (100, 20_000),
        (MIB + 1, 3),
        (64 * MIB, 64 * MIB),
    ] {
        let fixture = fixture().await;
        let (up, down) = (pattern(forth, 1), pattern(back, 2));
        let (at_client, at_server) = tokio::join!(
            exchange(fixture.client, up.clone()),
            exchange(fixture.server, down.clone())
        );
        assert!(at_server.unwrap() == up, "{forth} bytes forth");
        assert!(at_client.unwrap() == down, "{back} bytes back");
        assert_eq!(fixture.relay.await.unwrap(), Ended::Clean);
        assert_eq!(fixture.counters.a_to_b(), forth as u64);
        assert_eq!(fixture.counters.b_to_a(), back as u64);
    }
}

#[tokio::test]
async fn a_half_close_stays_a_half_close() {
    for client_first in [true, false] {
        let fixture = fixture().await;
        let (mut first, mut second) = if client_first {
            (fixture.client, fixture.server)
        } else {
            (fixture.server, fixture.client)
        };
        first.write_all(b"question").await.unwrap();
        first.shutdown().await.unwrap();
        let mut question = Vec::new();
        second.read_to_end(&mut question).await.unwrap();
        assert_eq!(question, b"question");
        for part in [&b"an"[..], b"sw", b"er"] {
            second.write_all(part).await.unwrap();
            let mut echo = vec![0; part.len()];
            first.read_exact(&mut echo).await.unwrap();
            assert_eq!(echo, part);
        }
        drop(second);
        assert_eq!(first.read(&mut [0]).await.unwrap(), 0);
        assert_eq!(fixture.relay.await.unwrap(), Ended::Clean);
    }
}

#[tokio::test]
async fn a_reset_is_passed_on_as_a_reset() {
    for (client_first, half_closed) in [(true, false), (false, false), (true, true), (false, true)]
    {
        let fixture = fixture().await;
        let (mut first, mut second, side) = if client_first {
            (fixture.client, fixture.server, Side::A)
        } else {
            (fixture.server, fixture.client, Side::B)
        };
        first.write_all(b"x").await.unwrap();
        second.read_exact(&mut [0]).await.unwrap();
        if half_closed {
            // Nobody reads from this side any more; the reset must be noticed all the same.
            first.shutdown().await.unwrap();
            assert_eq!(second.read(&mut [0]).await.unwrap(), 0);
        }
        reset(first);
        let cause = Broken::Reset;
        assert_eq!(fixture.relay.await.unwrap(), Ended::Broken { side, cause });
        let error = if half_closed {
            second.write_all(b"y").await.and(second.flush().await).err()
        } else {
            second.read(&mut [0]).await.err()
        };
        let kind = error.map(|error| error.kind());
        assert!(
            matches!(
                kind,
                Some(std::io::ErrorKind::ConnectionReset | std::io::ErrorKind::BrokenPipe)
            ),
            "{kind:?}"
        );
    }
}

/// Writes until nothing more is taken; returns how much was.
async fn fill(stream: &mut TcpStream) -> usize {
    let block = vec![7; 64 * 1024];
    let mut written = 0;
    while let Ok(count) =
        tokio::time::timeout(Duration::from_millis(500), stream.write(&block)).await
    {
        written += count.unwrap();
    }
    written
}

#[tokio::test]
async fn a_stalled_reader_stops_the_writer() {
    let mut fixture = fixture().await;
    let written = fill(&mut fixture.client).await;
    // What the kernel's buffers hold is not ours; beyond it there is one read at most.
    assert!(written < 32 * MIB, "{written} bytes were taken");
    let mut received = 0;
    let mut block = vec![0; 64 * 1024];
    fixture.client.shutdown().await.unwrap();
    loop {
        match fixture.server.read(&mut block).await.unwrap() {
            0 => break,
            count => received += count,
        }
    }
    assert_eq!(received, written);
    drop(fixture.server);
    assert_eq!(fixture.relay.await.unwrap(), Ended::Clean);
}

#[tokio::test]
async fn a_reset_behind_a_stalled_reader_ends_the_connection() {
    let mut fixture = fixture().await;
    fill(&mut fixture.client).await;
    reset(fixture.client);
    tokio::time::pause();
    assert_eq!(
        fixture.relay.await.unwrap(),
        Ended::Broken {
            side: Side::A,
            cause: Broken::Reset
        }
    );
    drop(fixture.server);
}

#[tokio::test]
async fn stopped_from_outside_both_sides_are_reset() {
    let mut fixture = fixture().await;
    fixture.stop.send(()).unwrap();
    assert_eq!(fixture.relay.await.unwrap(), Ended::Stopped(()));
    for stream in [&mut fixture.client, &mut fixture.server] {
        let error = stream.read(&mut [0]).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }
}

#[tokio::test]
async fn an_idle_connection_costs_little() {
    let (a, b) = pair().await;
    let counters = Counters::default();
    let future = relay(TcpEnd::new(a), TcpEnd::new(b), &counters, pending::<()>());
    let size = size_of_val(&future);
    assert!(size <= 640, "the relay's future has {size} bytes");
}

#[tokio::test]
async fn a_connection_that_was_not_redirected_is_refused() {
    let (_near, far) = pair().await;
    assert!(matches!(
        podveil_net::original_dst(&far, far.local_addr().unwrap().port()),
        Err(podveil_net::NoOriginalDst::NotRedirected)
    ));
}

#[tokio::test]
async fn sockets_of_a_namespace_listen_and_connect() {
    use podveil_net::{ConnectError, Family, PodSockets};
    let netns = Arc::new(podveil_netns::NetNs::current().unwrap());
    let sockets = PodSockets::new(netns, None);
    let listener = sockets.listen(0, Family::V4, 8).unwrap();
    let port = listener.local_addr().unwrap().port();
    let timeout = Duration::from_secs(5);
    let stream = sockets
        .connect(([127, 0, 0, 1], port).into(), timeout)
        .await
        .unwrap();
    let (_far, peer) = listener.accept().await.unwrap();
    assert_eq!(peer, stream.local_addr().unwrap());
    drop(listener);
    assert!(matches!(
        sockets
            .connect(([127, 0, 0, 1], port).into(), timeout)
            .await,
        Err(ConnectError::Refused { .. })
    ));
}

#[tokio::test]
async fn a_connect_given_up_in_the_moment_it_succeeds_is_a_reset() {
    use std::io::Read;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let netns = Arc::new(podveil_netns::NetNs::current().unwrap());
    let sockets = podveil_net::PodSockets::new(netns, None);
    let destination = listener.local_addr().unwrap();
    let mut connecting = Box::pin(sockets.connect(destination, Duration::from_secs(5)));
    // One poll dials. The runtime, which alone could tell that it succeeded, does not run before the connection is
    // accepted.
    let first = std::future::poll_fn(|cx| Poll::Ready(connecting.as_mut().poll(cx))).await;
    assert!(first.is_pending());
    let (mut server, _) = listener.accept().unwrap();
    drop(connecting);
    let error = server.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}
