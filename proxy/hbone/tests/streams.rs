// SPDX-License-Identifier: Apache-2.0
//! Whole connections: application, relay, tunnel in memory, relay, application.

use bytes::Bytes;
use podveil_hbone::{ConnectRequest, HboneStream, Server, Settings, Tunnel, TunnelEnd};
use podveil_net::{
    Broken, Chunks, Counters, Duplex, Ended, Side, TcpEnd, prepare_application, relay,
};
use std::future::{pending, poll_fn};
use std::io;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

const MIB: usize = 1024 * 1024;

struct Pair {
    tunnel: Tunnel,
    /// Streams that the server accepted, in order.
    accepted: mpsc::Receiver<HboneStream>,
    client: JoinHandle<TunnelEnd>,
    server: JoinHandle<TunnelEnd>,
}

fn request() -> ConnectRequest {
    ConnectRequest {
        authority: ([10, 0, 2, 7], 80).into(),
        baggage: None,
        forwarded: None,
        traceparent: None,
    }
}

async fn serve(
    io: DuplexStream,
    settings: Settings,
    accepted: mpsc::Sender<HboneStream>,
) -> TunnelEnd {
    let mut server = match Server::handshake(io, &settings).await {
        Ok(server) => server,
        Err(end) => return end,
    };
    loop {
        match server.accept().await {
            Ok(incoming) => {
                assert_eq!(incoming.authority().unwrap().to_string(), "10.0.2.7:80");
                if let Some(stream) = incoming.accept(None) {
                    accepted.try_send(stream).unwrap();
                }
            }
            Err(end) => return end,
        }
    }
}

async fn pair() -> Pair {
    let settings = Settings::default();
    let (near, far) = tokio::io::duplex(256 * 1024);
    let (sender, accepted) = mpsc::channel(200);
    let server = tokio::spawn(serve(far, settings, sender));
    let (tunnel, driver) = Tunnel::open(near, &settings).await.unwrap();
    Pair {
        tunnel,
        accepted,
        client: tokio::spawn(driver),
        server,
    }
}

impl Pair {
    async fn stream(&mut self) -> (HboneStream, HboneStream) {
        let slot = self.tunnel.reserve().await.unwrap();
        let (near, _) = self.tunnel.connect(slot, request()).await.unwrap();
        (near, self.accepted.recv().await.unwrap())
    }

    /// Both applications of one connection and the relays between.
    async fn connection(&mut self) -> Connection {
        let (near, far) = self.stream().await;
        let (client, a) = tcp_pair().await;
        let (b, server) = tcp_pair().await;
        Connection {
            client,
            server,
            outbound: relayed(TcpEnd::new(a), near),
            inbound: relayed(far, TcpEnd::new(b)),
        }
    }
}

struct Connection {
    client: TcpStream,
    server: TcpStream,
    outbound: JoinHandle<Ended<()>>,
    inbound: JoinHandle<Ended<()>>,
}

fn relayed<A: Duplex + 'static, B: Duplex + 'static>(a: A, b: B) -> JoinHandle<Ended<()>> {
    tokio::spawn(async move { relay(a, b, &Counters::default(), pending()).await })
}

async fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (near, far) = tokio::join!(
        TcpStream::connect(listener.local_addr().unwrap()),
        listener.accept()
    );
    let (near, far) = (near.unwrap(), far.unwrap().0);
    prepare_application(&near).unwrap();
    prepare_application(&far).unwrap();
    (near, far)
}

fn pattern(length: usize, seed: usize) -> Vec<u8> {
    (0..length)
        .map(|at| ((at + seed) ^ (at >> 9)) as u8)
        .collect()
}

async fn exchange(stream: &mut TcpStream, bytes: &[u8]) -> io::Result<Vec<u8>> {
    let (mut read, mut write) = stream.split();
    let send = async {
        write.write_all(bytes).await?;
        write.shutdown().await
    };
    let mut received = Vec::new();
    let (sent, read) = tokio::join!(send, read.read_to_end(&mut received));
    sent?;
    read?;
    Ok(received)
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_arrive_whole_in_both_directions() {
    let mut pair = pair().await;
    for (forth, back) in [
        (0, 0),
        (1, 0),
        (0, 1),
        (300, 20_000),
        (MIB + 1, 3),
        (64 * MIB, 64 * MIB),
    ] {
        let mut connection = pair.connection().await;
        let (up, down) = (pattern(forth, 1), pattern(back, 2));
        let (at_client, at_server) = tokio::join!(
            exchange(&mut connection.client, &up),
            exchange(&mut connection.server, &down)
        );
        assert!(at_server.unwrap() == up, "{forth} bytes forth");
        assert!(at_client.unwrap() == down, "{back} bytes back");
        assert_eq!(connection.outbound.await.unwrap(), Ended::Clean);
        assert_eq!(connection.inbound.await.unwrap(), Ended::Clean);
    }
    assert_eq!(pair.tunnel.streams(), 0);
    drop(pair.tunnel);
    assert!(matches!(pair.client.await.unwrap(), TunnelEnd::Closed));
    assert!(matches!(pair.server.await.unwrap(), TunnelEnd::Closed));
}

#[tokio::test]
async fn a_half_close_stays_a_half_close() {
    let mut pair = pair().await;
    for client_first in [true, false] {
        let connection = pair.connection().await;
        let (mut first, mut second) = if client_first {
            (connection.client, connection.server)
        } else {
            (connection.server, connection.client)
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
        second.shutdown().await.unwrap();
        assert_eq!(first.read(&mut [0]).await.unwrap(), 0);
        assert_eq!(connection.outbound.await.unwrap(), Ended::Clean);
        assert_eq!(connection.inbound.await.unwrap(), Ended::Clean);
    }
}

#[tokio::test]
async fn a_reset_crosses_the_tunnel_as_a_reset() {
    let mut pair = pair().await;
    for (client_first, half_closed) in [(true, false), (false, false), (true, true), (false, true)]
    {
        let connection = pair.connection().await;
        let (mut first, mut second) = if client_first {
            (connection.client, connection.server)
        } else {
            (connection.server, connection.client)
        };
        first.write_all(b"x").await.unwrap();
        second.read_exact(&mut [0]).await.unwrap();
        if half_closed {
            first.shutdown().await.unwrap();
            assert_eq!(second.read(&mut [0]).await.unwrap(), 0);
        }
        // SO_LINGER {on, 0}: this is a reset.
        drop(first);
        let (side, cause) = (if client_first { Side::A } else { Side::B }, Broken::Reset);
        assert_eq!(
            connection.outbound.await.unwrap(),
            Ended::Broken { side, cause }
        );
        assert_eq!(
            connection.inbound.await.unwrap(),
            Ended::Broken { side, cause }
        );
        let error = if half_closed {
            second.write_all(b"y").await.and(second.flush().await)
        } else {
            second.read(&mut [0]).await.map(drop)
        };
        let kind = error.unwrap_err().kind();
        assert!(
            matches!(
                kind,
                io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
            ),
            "{kind:?}"
        );
    }
    // The tunnel lives on.
    pair.stream().await;
}

#[tokio::test]
async fn a_lost_tunnel_is_a_reset_for_both_applications() {
    let mut pair = pair().await;
    let mut connection = pair.connection().await;
    pair.tunnel.terminate();
    assert!(matches!(pair.client.await.unwrap(), TunnelEnd::Terminated));
    pair.tunnel.ended().await;
    assert!(pair.tunnel.is_closing());
    let lost = |side| Ended::Broken {
        side,
        cause: Broken::TunnelLost,
    };
    assert_eq!(connection.outbound.await.unwrap(), lost(Side::B));
    assert_eq!(connection.inbound.await.unwrap(), lost(Side::A));
    for stream in [&mut connection.client, &mut connection.server] {
        let error = stream.read(&mut [0]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }
}

/// Writes until the stream takes no more for a moment; says how much it took.
async fn fill(stream: &mut HboneStream) -> usize {
    let block = Bytes::from(vec![7; 64 * 1024]);
    let mut written = 0;
    loop {
        let mut chunks = Chunks::default();
        chunks.push(block.clone());
        while !chunks.is_empty() {
            let write = poll_fn(|cx| stream.poll_write(cx, &mut chunks));
            match tokio::time::timeout(Duration::from_millis(200), write).await {
                Ok(count) => written += count.unwrap(),
                Err(_) => return written,
            }
        }
    }
}

async fn read(stream: &mut HboneStream) -> Option<Bytes> {
    let bytes = poll_fn(|cx| stream.poll_read(cx)).await.unwrap();
    stream.consumed(bytes.as_ref().map_or(0, Bytes::len));
    bytes
}

#[tokio::test]
async fn ninety_nine_stalled_readers_do_not_stall_the_hundredth() {
    let mut pair = pair().await;
    let mut streams = Vec::new();
    for _ in 0..100 {
        streams.push(pair.stream().await);
    }
    assert!(pair.tunnel.try_reserve().is_err(), "a hundred is the limit");
    let (mut near, mut far) = streams.pop().unwrap();
    let settings = Settings::default();
    let bound = settings.stream_window as usize;
    // Nobody reads at the far end of these.
    let filled = streams.iter_mut().map(|(near, _)| fill(near));
    for written in join_all(filled).await {
        assert!(written <= bound, "{written} bytes wait for one reader");
    }
    let total = 64 * MIB;
    let receive = async {
        let mut received = 0;
        while let Some(bytes) = read(&mut far).await {
            received += bytes.len();
        }
        received
    };
    let send = async {
        let mut chunks = Chunks::default();
        let block = Bytes::from(vec![7; 128 * 1024]);
        for _ in 0..total / block.len() {
            chunks.push(block.clone());
            while !chunks.is_empty() {
                poll_fn(|cx| near.poll_write(cx, &mut chunks))
                    .await
                    .unwrap();
            }
        }
        poll_fn(|cx| near.poll_finish(cx)).await.unwrap();
    };
    let transfer = async { tokio::join!(receive, send).0 };
    let received = tokio::time::timeout(Duration::from_secs(30), transfer).await;
    assert_eq!(received.unwrap(), total);
}

async fn join_all<T: Send + 'static>(
    futures: impl Iterator<Item = impl Future<Output = T>>,
) -> Vec<T> {
    // All at once: each waits for its own silence.
    let mut pending: Vec<_> = futures.map(Box::pin).collect();
    let mut done: Vec<Option<T>> = pending.iter().map(|_| None).collect();
    poll_fn(|cx| {
        for (future, slot) in pending.iter_mut().zip(&mut done) {
            if slot.is_none()
                && let std::task::Poll::Ready(value) = future.as_mut().poll(cx)
            {
                *slot = Some(value);
            }
        }
        if done.iter().all(Option::is_some) {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
    done.into_iter().flatten().collect()
}

#[tokio::test]
async fn many_small_frames_for_a_stalled_reader_do_not_end_the_tunnel() {
    let mut pair = pair().await;
    let (mut near, far) = pair.stream().await;
    let (_application, b) = tcp_pair().await;
    // The application never reads: everything waits in the relay.
    let inbound = relayed(far, TcpEnd::new(b));
    let one = Bytes::from_static(b"x");
    let flood = async {
        for _ in 0..300_000 {
            let mut chunks = Chunks::default();
            chunks.push(one.clone());
            poll_fn(|cx| near.poll_write(cx, &mut chunks))
                .await
                .unwrap();
        }
    };
    flood.await;
    assert!(!inbound.is_finished());
    // Another stream is alive.
    let mut other = pair.connection().await;
    other.client.write_all(b"x").await.unwrap();
    other.server.read_exact(&mut [0]).await.unwrap();
    assert!(!pair.client.is_finished() && !pair.server.is_finished());
}

#[tokio::test]
async fn futures_are_small() {
    let mut pair = pair().await;
    let (near, _far) = pair.stream().await;
    let (_client, a) = tcp_pair().await;
    let counters = Counters::default();
    let size = size_of_val(&relay(TcpEnd::new(a), near, &counters, pending::<()>()));
    assert!(size <= 640, "a relay has {size} bytes");
    let slot = pair.tunnel.reserve().await.unwrap();
    let size = size_of_val(&pair.tunnel.connect(slot, request()));
    assert!(size <= 1536, "a CONNECT has {size} bytes");
}
