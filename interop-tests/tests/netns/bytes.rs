// SPDX-License-Identifier: Apache-2.0
use anyhow::{Context, ensure};
use podveil_interop_tests::{shop, tcp};
use std::net::{Shutdown, TcpStream};
use std::time::Instant;

const PORT: u16 = 9000;

#[test]
#[ignore = "netns"]
fn bytes_arrive_whole_in_both_directions() -> anyhow::Result<()> {
    let mesh = shop()?;
    let near = tcp::listen(mesh.netns("near"), PORT)?;
    let far = tcp::listen(mesh.netns("far"), PORT)?;
    for way in mesh.ways(PORT) {
        let listener = if way.ip() == mesh.v4("near") || way.ip() == mesh.v6("near") {
            &near
        } else {
            &far
        };
        for length in [0, 1, 1023, 16_384, 65_537, 1 << 20, 64 << 20] {
            let (client, server) = tcp::pair(mesh.netns("client"), listener, way)?;
            std::thread::scope(|scope| {
                let serving = scope.spawn(|| tcp::exchange(&server, length));
                tcp::exchange(&client, length)
                    .with_context(|| format!("client of {way}, {length} bytes"))?;
                serving
                    .join()
                    .expect("the server does not panic")
                    .with_context(|| format!("server of {way}, {length} bytes"))
            })?;
        }
    }
    Ok(())
}

#[test]
#[ignore = "netns"]
fn two_hundred_connections_at_once_each_get_their_own_bytes() -> anyhow::Result<()> {
    let mesh = shop()?;
    let listener = tcp::listen(mesh.netns("far"), PORT)?;
    let to = mesh.address("far", PORT);
    let clients: Vec<TcpStream> = (0..200)
        .map(|_| tcp::connect(mesh.netns("client"), to))
        .collect::<Result<_, _>>()?;
    let servers: Vec<TcpStream> = (0..200)
        .map(|_| tcp::accept(&listener))
        .collect::<Result<_, _>>()?;
    std::thread::scope(|scope| {
        let ends: Vec<_> = clients
            .iter()
            .chain(&servers)
            .map(|end| scope.spawn(move || tcp::exchange(end, 256 * 1024)))
            .collect();
        ends.into_iter()
            .try_for_each(|end| end.join().expect("an end does not panic"))
    })
}

#[test]
#[ignore = "netns"]
fn ninety_nine_stalled_readers_do_not_slow_the_hundredth() -> anyhow::Result<()> {
    const STALLED_BYTES: u64 = 32 << 20;
    const BYTES: u64 = 64 << 20;
    let mesh = shop()?;
    let listener = tcp::listen(mesh.netns("far"), PORT)?;
    let to = mesh.address("far", PORT);
    let speed_alone = download(&mesh, &listener, to, BYTES)?;
    let mut stalled = Vec::new();
    for _ in 0..99 {
        let (client, server) = tcp::pair(mesh.netns("client"), &listener, to)?;
        // More than every buffer on the way together: the sender stands still before its end.
        let writer = std::thread::spawn(move || {
            let result = tcp::send(&server, STALLED_BYTES);
            (server, result)
        });
        stalled.push((client, writer));
    }
    let speed_beside = download(&mesh, &listener, to, BYTES)?;
    ensure!(
        stalled.iter().all(|(_, writer)| !writer.is_finished()),
        "a stalled sender could send everything"
    );
    // Wide, because the machine is shared: without isolation it would stand still, not be four times slower.
    ensure!(
        speed_beside > speed_alone / 4.0,
        "alone {speed_alone:.0} MiB/s, beside stalled readers {speed_beside:.0} MiB/s"
    );
    for (client, writer) in stalled {
        tcp::reset(client)?;
        let (_server, result) = writer.join().expect("the writer does not panic");
        ensure!(
            result.is_err(),
            "a sender whose reader reset was told nothing"
        );
    }
    Ok(())
}

/// MiB per second of one download.
fn download(
    mesh: &podveil_interop_tests::Mesh,
    listener: &std::net::TcpListener,
    to: std::net::SocketAddr,
    bytes: u64,
) -> anyhow::Result<f64> {
    let (client, server) = tcp::pair(mesh.netns("client"), listener, to)?;
    let began = Instant::now();
    std::thread::scope(|scope| {
        let serving = scope.spawn(|| {
            tcp::send(&server, bytes)?;
            server.shutdown(Shutdown::Write).context("ending")
        });
        tcp::receive(&client, bytes)?;
        tcp::expect_end(&client)?;
        serving.join().expect("the server does not panic")
    })?;
    Ok((bytes >> 20) as f64 / began.elapsed().as_secs_f64())
}
