// SPDX-License-Identifier: Apache-2.0
use anyhow::{Context, ensure};
use podveil_interop_tests::{shop, tcp::PATIENCE};
use podveil_sim::{in_netns, run};
use std::net::{SocketAddr, UdpSocket};

#[test]
#[ignore = "netns"]
fn udp_and_icmp_between_enrolled_pods_are_untouched() -> anyhow::Result<()> {
    let mesh = shop()?;
    for pod in ["near", "far"] {
        for address in mesh.pod(pod).net.addresses {
            let netns = format!("--net=/run/netns/{}", mesh.pod("client").net.namespace);
            run(
                "nsenter",
                [&netns, "ping", "-c", "1", "-W", "5", &address.to_string()],
            )?;
            let bind = |on, address| {
                in_netns(on, || {
                    UdpSocket::bind(SocketAddr::new(address, 0)).context("binding")
                })
            };
            let server = bind(mesh.netns(pod), address)?;
            let own = if address.is_ipv4() {
                mesh.v4("client")
            } else {
                mesh.v6("client")
            };
            let client = bind(mesh.netns("client"), own)?;
            server.set_read_timeout(Some(PATIENCE))?;
            client.send_to(b"datagram", server.local_addr()?)?;
            let mut buffer = [0; 64];
            let (count, from) = server.recv_from(&mut buffer)?;
            ensure!(
                &buffer[..count] == b"datagram" && from == client.local_addr()?,
                "{count} bytes from {from}"
            );
        }
    }
    Ok(())
}
