// SPDX-License-Identifier: Apache-2.0
//! SYNs of a shape that no stack sends by itself.

use crate::world::Tested;
use crate::world::{Family, World};
use podveil_netns::NetNs;
use socket2::{Domain, Protocol, Socket, Type};
use std::io::Read;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

const SOURCE_PORT: u16 = 45_678;
const DESTINATION_OPTIONS: i32 = 60;
const SYN: u8 = 2;
const SYN_ACK: u8 = 0x12;
const SILENCE: Duration = Duration::from_millis(500);

impl<B: Tested> World<B> {
    /// Sends a SYN, by IPv4 in two fragments, by IPv6 behind an extension header, and says whether it was taken.
    pub fn odd_syn_is_taken(&self, family: Family, from_pod: bool, port: u16) -> bool {
        let (netns, source, to) = match from_pod {
            true => (&self.pod, self.pod_ip(family), self.peer_ip(family)),
            false => (&self.peer, self.peer_ip(family), self.pod_ip(family)),
        };
        let mut answers = raw(netns, family, 6);
        let segment = segment(source, to, port);
        match (source, to) {
            (IpAddr::V4(source), IpAddr::V4(to)) => {
                let socket = raw(netns, family, 255);
                socket.set_header_included_v4(true).unwrap();
                // Offsets count eight bytes; the highest flag but one says that more follow.
                for (offset, more, part) in
                    [(0u16, 0x2000u16, &segment[..8]), (1, 0, &segment[8..])]
                {
                    let mut packet = vec![0x45, 0, 0, 0, 0x12, 0x34, 0, 0, 64, 6, 0, 0];
                    packet[6..8].copy_from_slice(&(more | offset).to_be_bytes());
                    packet.extend(source.octets());
                    packet.extend(to.octets());
                    packet.extend(part);
                    send(&socket, &packet, to.into());
                }
            }
            _ => {
                let socket = raw(netns, family, DESTINATION_OPTIONS);
                // Next header, length, and four bytes of padding.
                let packet = [&[6, 0, 1, 4, 0, 0, 0, 0][..], &segment].concat();
                send(&socket, &packet, to);
            }
        }
        let deadline = Instant::now() + SILENCE;
        let mut buffer = [0; 2048];
        while Instant::now() < deadline {
            let Ok(length) = answers.read(&mut buffer) else {
                continue;
            };
            // IPv4 gives its header too.
            let header = if matches!(family, Family::V4) { 20 } else { 0 };
            let answer = &buffer[header.min(length)..length];
            if answer.len() >= 20
                && answer[0..2] == port.to_be_bytes()
                && answer[2..4] == SOURCE_PORT.to_be_bytes()
            {
                return answer[13] == SYN_ACK;
            }
        }
        false
    }
}

fn raw(netns: &NetNs, family: Family, protocol: i32) -> Socket {
    let domain = match family {
        Family::V4 => Domain::IPV4,
        Family::V6 => Domain::IPV6,
    };
    let make = || Socket::new(domain, Type::RAW, Some(Protocol::from(protocol)));
    let socket = netns.run(make).unwrap().unwrap();
    socket
        .set_read_timeout(Some(Duration::from_millis(20)))
        .unwrap();
    socket
}

fn send(socket: &Socket, packet: &[u8], to: IpAddr) {
    // Whoever refuses it may say so at once.
    let _sent_or_refused = socket.send_to(packet, &SocketAddr::new(to, 0).into());
}

/// A SYN with its checksum.
fn segment(source: IpAddr, to: IpAddr, port: u16) -> [u8; 20] {
    let mut segment = [0; 20];
    segment[0..2].copy_from_slice(&SOURCE_PORT.to_be_bytes());
    segment[2..4].copy_from_slice(&port.to_be_bytes());
    segment[4..8].copy_from_slice(&1u32.to_be_bytes());
    segment[12] = 5 << 4;
    segment[13] = SYN;
    segment[14..16].copy_from_slice(&1024u16.to_be_bytes());
    let octets = |ip| match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let summed = [&octets(source)[..], &octets(to), &[0, 6, 0, 20], &segment].concat();
    let mut sum: u32 = summed
        .chunks_exact(2)
        .map(|two| u32::from(u16::from_be_bytes([two[0], two[1]])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    segment[16..18].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    segment
}
