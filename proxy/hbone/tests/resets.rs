// SPDX-License-Identifier: Apache-2.0
//! Connections that are given up, many at once, do no harm to others of the same tunnel. Each end runs only when a test
//! lets it.

use bytes::Bytes;
use podveil_hbone::{ConnectRequest, HboneStream, Server, Settings, Tunnel, TunnelEnd};
use podveil_net::{Chunks, Duplex};
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::Poll;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::task::unconstrained;

fn request() -> ConnectRequest {
    ConnectRequest {
        authority: ([10, 0, 2, 7], 80).into(),
        baggage: None,
        forwarded: None,
        traceparent: None,
    }
}

/// Polls once.
async fn once<F: Future + ?Sized>(mut future: Pin<&mut F>) -> Poll<F::Output> {
    // Unconstrained: the runtime, which nothing here goes back to, would let no task read any more.
    unconstrained(poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx)))).await
}

/// What the wire holds in each direction.
const WIRE: usize = 16 << 20;

type Asked = Pin<Box<dyn Future<Output = HboneStream>>>;
type Driver<'s> = Pin<Box<dyn Future<Output = TunnelEnd> + 's>>;

/// A tunnel over a wire on which bytes move when a test says so.
struct World<'s> {
    tunnel: Tunnel,
    driver: Driver<'s>,
    server: Server<DuplexStream>,
    /// The wire's ends: the client's, the server's.
    wire: [DuplexStream; 2],
}

impl World<'_> {
    async fn new(settings: &Settings) -> World<'_> {
        let (client, mut near) = tokio::io::duplex(WIRE);
        let (server, mut far) = tokio::io::duplex(WIRE);
        let opened = async {
            tokio::join!(
                Tunnel::open(client, settings),
                Server::handshake(server, settings)
            )
        };
        let (opened, server) = tokio::select! {
            opened = opened => opened,
            ended = tokio::io::copy_bidirectional(&mut near, &mut far) => panic!("{ended:?}"),
        };
        let (tunnel, driver) = opened.unwrap();
        World {
            tunnel,
            driver: Box::pin(driver),
            server: server.unwrap(),
            wire: [near, far],
        }
    }

    async fn run_client(&mut self) {
        assert!(once(self.driver.as_mut()).await.is_pending());
    }

    /// Gives the streams that the client has opened.
    async fn run_server(&mut self) -> Vec<HboneStream> {
        let mut streams = Vec::new();
        while let Poll::Ready(incoming) = once(pin!(self.server.accept())).await {
            streams.extend(incoming.unwrap().accept(None));
        }
        streams
    }

    async fn deliver(&mut self) {
        let [near, far] = &mut self.wire;
        carry(near, far).await;
        carry(far, near).await;
    }

    async fn run(&mut self) -> Vec<HboneStream> {
        self.run_client().await;
        self.deliver().await;
        let streams = self.run_server().await;
        self.deliver().await;
        self.run_client().await;
        streams
    }

    /// Asks for a stream and lets nothing run.
    async fn ask(&self) -> Option<Asked> {
        let (slot, tunnel) = (self.tunnel.try_reserve().ok()?, self.tunnel.clone());
        let mut asked: Asked =
            Box::pin(async move { tunnel.connect(slot, request()).await.unwrap().0 });
        assert!(once(asked.as_mut()).await.is_pending());
        Some(asked)
    }

    async fn stream(&mut self) -> (HboneStream, HboneStream) {
        let mut asked = self.ask().await.unwrap();
        let far = self.run().await.pop().unwrap();
        match once(asked.as_mut()).await {
            Poll::Ready(near) => (near, far),
            Poll::Pending => panic!("no answer"),
        }
    }
}

/// What has arrived at one end of the wire leaves at the other.
async fn carry(from: &mut DuplexStream, to: &mut DuplexStream) {
    let mut buffer = vec![0; WIRE];
    while let Poll::Ready(read) = once(pin!(from.read(&mut buffer))).await {
        to.write_all(&buffer[..read.unwrap()]).await.unwrap();
    }
}

async fn write(stream: &mut HboneStream, bytes: usize) {
    let mut chunks = Chunks::default();
    chunks.push(vec![7; bytes].into());
    let written = once(pin!(poll_fn(|cx| stream.poll_write(cx, &mut chunks)))).await;
    assert!(matches!(written, Poll::Ready(Ok(all)) if all == bytes));
}

async fn read(stream: &mut HboneStream) -> Bytes {
    match once(pin!(poll_fn(|cx| stream.poll_read(cx)))).await {
        Poll::Ready(Ok(Some(bytes))) => bytes,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn connections_given_up_before_the_server_looks_break_no_other() {
    let settings = Settings::default();
    let mut world = World::new(&settings).await;
    world.run().await;
    let (mut near, mut far) = world.stream().await;
    // The server does not run meanwhile; connections that were given up leave room for others.
    for _ in 0..8 {
        let mut given_up = Vec::new();
        while let Some(asked) = world.ask().await {
            given_up.push(asked);
        }
        assert_eq!(given_up.len(), 99);
        world.run_client().await;
        drop(given_up);
        world.run_client().await;
        world.deliver().await;
    }
    world.run().await;
    write(&mut far, 1000).await;
    world.run().await;
    assert_eq!(read(&mut near).await.len(), 1000);
}

#[tokio::test]
async fn bytes_under_way_to_connections_given_up_break_no_other() {
    const FRAMES: usize = 64;
    let settings = Settings::default();
    let mut world = World::new(&settings).await;
    world.run().await;
    let (mut near, mut far) = world.stream().await;
    let mut others = Vec::new();
    for _ in 0..99 {
        others.push(world.stream().await);
    }
    for _ in 0..FRAMES {
        for stream in others.iter_mut().map(|(_, far)| far).chain([&mut far]) {
            write(stream, 1000).await;
        }
        world.run_server().await;
    }
    // The client has said that it gives up before it sees any of that.
    let (given_up, _others): (Vec<_>, Vec<_>) = others.into_iter().unzip();
    drop(given_up);
    world.run_client().await;
    world.run().await;
    let mut received = 0;
    while received < FRAMES * 1000 {
        received += read(&mut near).await.len();
    }
    write(&mut near, 1).await;
    world.run().await;
    assert_eq!(read(&mut far).await.len(), 1);
}
