// SPDX-License-Identifier: Apache-2.0
//! What a tunnel does when the peer refuses, goes away, falls silent or ends streams in its own manner.

use bytes::Bytes;
use h2::Reason;
use http::{Response, StatusCode};
use podveil_hbone::{
    ConnectRequest, HboneStream, NoSlot, Server, Settings, StreamError, Tunnel, TunnelEnd,
};
use podveil_net::{Broken, Chunks, Duplex};
use std::future::poll_fn;
use std::task::Poll;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::task::JoinHandle;

/// An empty SETTINGS frame, and a GOAWAY that says: no stream was looked at.
const SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];
const GOAWAY_0: &[u8] = &[0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn request() -> ConnectRequest {
    ConnectRequest {
        authority: ([10, 0, 2, 7], 80).into(),
        baggage: Some("k8s.namespace.name=shop".try_into().unwrap()),
        forwarded: Some("for=\"10.0.1.5:4000\"".try_into().unwrap()),
        traceparent: Some(podveil_hbone::traceparent(1, 2)),
    }
}

async fn open(settings: &Settings) -> (Tunnel, JoinHandle<TunnelEnd>, DuplexStream) {
    let (near, far) = tokio::io::duplex(256 * 1024);
    let (tunnel, driver) = Tunnel::open(near, settings).await.unwrap();
    (tunnel, tokio::spawn(driver), far)
}

/// A tunnel to a server of ours that runs `answer` on each request.
async fn served<F>(settings: Settings, answer: F) -> (Tunnel, JoinHandle<TunnelEnd>)
where
    F: Fn(podveil_hbone::Incoming) + Send + 'static,
{
    let (tunnel, driver, far) = open(&Settings::default()).await;
    tokio::spawn(async move {
        let mut server = Server::handshake(far, &settings).await.unwrap();
        while let Ok(incoming) = server.accept().await {
            answer(incoming);
        }
    });
    (tunnel, driver)
}

async fn connect(tunnel: &Tunnel) -> Result<HboneStream, StreamError> {
    let slot = tunnel.reserve().await.unwrap();
    tunnel
        .connect(slot, request())
        .await
        .map(|(stream, _)| stream)
}

#[tokio::test]
async fn a_refusal_names_its_status() {
    let (tunnel, _driver) = served(Settings::default(), |incoming| {
        assert_eq!(incoming.method(), http::Method::CONNECT);
        assert_eq!(
            incoming.baggage().unwrap().namespace.as_deref(),
            Some("shop")
        );
        let source = incoming.forwarded().unwrap().source;
        assert_eq!(source, Some(([10, 0, 1, 5], 4000).into()));
        assert!(incoming.headers().contains_key("traceparent"));
        incoming.refuse(StatusCode::SERVICE_UNAVAILABLE);
    })
    .await;
    let error = connect(&tunnel).await.unwrap_err();
    let status = StatusCode::SERVICE_UNAVAILABLE;
    assert!(matches!(error, StreamError::Refused { status: found } if found == status));
    assert!(!error.may_move());
    assert_eq!(tunnel.streams(), 0);
}

#[tokio::test]
async fn a_refused_stream_may_move() {
    let (tunnel, _driver) = served(Settings::default(), |incoming| {
        incoming.reset(Reason::REFUSED_STREAM);
    })
    .await;
    let error = connect(&tunnel).await.unwrap_err();
    assert!(matches!(error, StreamError::NotTaken(_)), "{error:?}");
    assert!(error.may_move());
}

#[tokio::test]
async fn an_unanswered_request_is_reset() {
    let (tunnel, _driver) = served(Settings::default(), drop).await;
    let error = connect(&tunnel).await.unwrap_err();
    let StreamError::Reset(source) = &error else {
        panic!("{error:?}");
    };
    assert_eq!(source.reason(), Some(Reason::CONNECT_ERROR));
    assert!(!error.may_move());
}

#[tokio::test]
async fn a_stream_above_a_goaway_may_move() {
    let (tunnel, driver, mut far) = open(&Settings::default()).await;
    far.write_all(SETTINGS).await.unwrap();
    let connecting = tokio::spawn({
        let tunnel = tunnel.clone();
        async move { connect(&tunnel).await }
    });
    // HEADERS: type 1, stream 1.
    let mut seen = Vec::new();
    while !seen.windows(6).any(|w| w[0] == 1 && w[2..] == [0, 0, 0, 1]) {
        assert_ne!(far.read_buf(&mut seen).await.unwrap(), 0);
    }
    far.write_all(GOAWAY_0).await.unwrap();
    let error = connecting.await.unwrap().unwrap_err();
    assert!(matches!(error, StreamError::NotTaken(_)), "{error:?}");
    assert!(tunnel.is_closing());
    assert_eq!(tunnel.try_reserve().unwrap_err(), NoSlot::Closing);
    drop(tunnel);
    drop(far);
    driver.await.unwrap();
}

#[tokio::test]
async fn a_draining_server_lets_streams_end_and_takes_no_new_ones() {
    let (tunnel, driver, far) = open(&Settings::default()).await;
    let (drain, drained) = tokio::sync::oneshot::channel::<()>();
    let server = tokio::spawn(async move {
        let mut server = Server::handshake(far, &Settings::default()).await.unwrap();
        let mut stream = server.accept().await.unwrap().accept(None).unwrap();
        tokio::spawn(async move {
            // Echoes until the end.
            while let Some(bytes) = read(&mut stream).await.unwrap() {
                write(&mut stream, bytes).await.unwrap();
            }
            poll_fn(|cx| stream.poll_finish(cx)).await.unwrap();
        });
        let mut drained = Some(drained);
        loop {
            tokio::select! {
                outcome = server.accept() => return outcome.err(),
                _ = async { drained.as_mut().unwrap().await }, if drained.is_some() => {
                    drained = None;
                    server.drain();
                }
            }
        }
    });
    let mut stream = connect(&tunnel).await.unwrap();
    drain.send(()).unwrap();
    while !tunnel.is_closing() {
        tokio::task::yield_now().await;
    }
    write(&mut stream, Bytes::from_static(b"still here"))
        .await
        .unwrap();
    assert_eq!(read(&mut stream).await.unwrap().unwrap(), "still here");
    poll_fn(|cx| stream.poll_finish(cx)).await.unwrap();
    assert_eq!(read(&mut stream).await.unwrap(), None);
    drop(stream);
    assert!(matches!(server.await.unwrap(), Some(TunnelEnd::Closed)));
    assert!(matches!(driver.await.unwrap(), TunnelEnd::Closed));
}

#[tokio::test]
async fn the_peers_limit_is_waited_for_and_kept_to() {
    let settings = Settings {
        max_streams: 2,
        ..Settings::default()
    };
    let (tunnel, _driver, far) = open(&Settings::default()).await;
    // Nothing came from the peer: one stream may go ahead.
    let first = tunnel.try_reserve().unwrap();
    assert_eq!(tunnel.try_reserve().unwrap_err(), NoSlot::Settling);
    let waiting = tokio::spawn({
        let tunnel = tunnel.clone();
        async move { tunnel.reserve().await }
    });
    let server = tokio::spawn(async move {
        let mut server = Server::handshake(far, &settings).await.unwrap();
        while server.accept().await.is_ok() {}
    });
    let second = waiting.await.unwrap().unwrap();
    assert_eq!(tunnel.try_reserve().unwrap_err(), NoSlot::Full);
    assert_eq!(tunnel.streams(), 2);
    drop(second);
    drop(tunnel.try_reserve().unwrap());
    drop(first);
    assert_eq!(tunnel.streams(), 0);
    server.abort();
}

#[tokio::test(start_paused = true)]
async fn a_silent_peer_is_given_up() {
    let (tunnel, driver, mut far) = open(&Settings::default()).await;
    far.write_all(SETTINGS).await.unwrap();
    let begun = tokio::time::Instant::now();
    let error = connect(&tunnel).await.unwrap_err();
    assert!(matches!(error, StreamError::Lost(_)), "{error:?}");
    assert!(error.may_move());
    assert!(matches!(driver.await.unwrap(), TunnelEnd::PingTimeout));
    assert_eq!(begun.elapsed().as_secs(), 30);
    tunnel.ended().await;
}

#[tokio::test(start_paused = true)]
async fn an_idle_tunnel_lives_while_its_peer_answers() {
    let (tunnel, driver) = served(Settings::default(), drop).await;
    tokio::time::sleep(std::time::Duration::from_secs(3600)).await;
    assert!(!driver.is_finished());
    assert!(!tunnel.is_closing());
}

#[tokio::test]
async fn a_client_that_gives_up_is_noticed() {
    let (tunnel, _driver, far) = open(&Settings::default()).await;
    let (seen, gone) = tokio::sync::oneshot::channel();
    tokio::spawn(async move {
        let mut server = Server::handshake(far, &Settings::default()).await.unwrap();
        let mut incoming = server.accept().await.unwrap();
        let mut seen = Some(seen);
        tokio::spawn(async move {
            incoming.abandoned().await;
            seen.take().unwrap().send(()).unwrap();
        });
        while server.accept().await.is_ok() {}
    });
    let slot = tunnel.reserve().await.unwrap();
    let mut connecting = Box::pin(tunnel.connect(slot, request()));
    assert!(matches!(
        poll_fn(|cx| Poll::Ready(connecting.as_mut().poll(cx))).await,
        Poll::Pending
    ));
    drop(connecting);
    gone.await.unwrap();
    assert_eq!(tunnel.streams(), 0);
}

async fn read(stream: &mut HboneStream) -> Result<Option<Bytes>, Broken> {
    let bytes = poll_fn(|cx| stream.poll_read(cx)).await?;
    stream.consumed(bytes.as_ref().map_or(0, Bytes::len));
    Ok(bytes)
}

async fn write(stream: &mut HboneStream, bytes: Bytes) -> Result<(), Broken> {
    let mut chunks = Chunks::default();
    chunks.push(bytes);
    while !chunks.is_empty() {
        poll_fn(|cx| stream.poll_write(cx, &mut chunks)).await?;
    }
    Ok(())
}

/// A peer that answers 200, sends "hi" and then resets the stream, after END_STREAM or without.
async fn peer_that_resets(end_stream: bool, reason: Reason) -> (Tunnel, HboneStream) {
    let (tunnel, _driver, far) = open(&Settings::default()).await;
    tokio::spawn(async move {
        let mut server = h2::server::handshake(far).await.unwrap();
        let (_request, mut respond) = server.accept().await.unwrap().unwrap();
        let mut send = respond.send_response(Response::new(()), false).unwrap();
        send.send_data("hi".into(), end_stream).unwrap();
        let mut reset = Some(send);
        let mut turns = 0;
        poll_fn(|cx| {
            // The bytes go out before the reset, which would overtake them.
            turns += 1;
            if turns == 4
                && let Some(mut send) = reset.take()
            {
                send.send_reset(reason);
            }
            cx.waker().wake_by_ref();
            server.poll_closed(cx)
        })
        .await
        .unwrap();
    });
    let stream = connect(&tunnel).await.unwrap();
    (tunnel, stream)
}

#[tokio::test]
async fn a_reset_of_any_reason_breaks_a_stream_that_has_not_ended() {
    for reason in [
        Reason::CANCEL,
        Reason::CONNECT_ERROR,
        Reason::INTERNAL_ERROR,
        Reason::NO_ERROR,
        Reason::STREAM_CLOSED,
    ] {
        let (_tunnel, mut stream) = peer_that_resets(false, reason).await;
        assert_eq!(
            read(&mut stream).await.unwrap().unwrap(),
            "hi",
            "{reason:?}"
        );
        assert_eq!(read(&mut stream).await, Err(Broken::Reset), "{reason:?}");
        let broken = poll_fn(|cx| stream.poll_broken(cx)).await;
        assert_eq!(broken, Broken::Reset, "{reason:?}");
    }
}

#[tokio::test]
async fn a_peer_that_stops_listening_after_its_end_breaks_only_what_is_still_said() {
    for (reason, deaf) in [
        (Reason::CANCEL, true),
        (Reason::NO_ERROR, true),
        (Reason::CONNECT_ERROR, false),
    ] {
        let (_tunnel, mut stream) = peer_that_resets(true, reason).await;
        assert_eq!(read(&mut stream).await.unwrap().unwrap(), "hi");
        assert_eq!(read(&mut stream).await.unwrap(), None);
        // The reset arrives in its own time; a write meets it.
        let bytes = Bytes::from_static(b"more");
        while write(&mut stream, bytes.clone()).await.is_ok() {
            tokio::task::yield_now().await;
        }
        let broken = poll_fn(|cx| Poll::Ready(stream.poll_broken(cx))).await;
        let finished = poll_fn(|cx| stream.poll_finish(cx)).await;
        if deaf {
            assert!(broken.is_pending(), "{reason:?}");
            assert_eq!(finished, Ok(()), "{reason:?}");
        } else {
            assert_eq!(broken, Poll::Ready(Broken::Reset), "{reason:?}");
            assert_eq!(finished, Err(Broken::Reset), "{reason:?}");
        }
    }
}
