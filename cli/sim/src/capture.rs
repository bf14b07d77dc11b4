// SPDX-License-Identifier: Apache-2.0
//! What really crosses a namespace's links: every frame, read from a packet socket.

use anyhow::Context;
use podveil_netns::NetNs;
use socket2::{Domain, Protocol, Socket, Type};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const HBONE_PORT: u16 = 15008;
const ETH_P_ALL: u16 = 0x0003;
const FRAME_BYTES: usize = 256 * 1024;
/// How long a read waits before it looks whether it should end.
const POLL: Duration = Duration::from_millis(20);
/// Room for a burst, so that a busy machine does not lose the one frame that matters.
const KERNEL_BUFFER_BYTES: usize = 64 << 20;

/// What was seen.
#[derive(Clone, Debug, Default)]
pub struct Captured {
    /// TCP segments between addresses that the filter took.
    pub segments: u64,
    /// Those with payload.
    pub payload_segments: u64,
    /// For each connection seen, the lower of its two ports: the server's.
    pub server_ports: BTreeSet<u16>,
    /// Frames in which the marker was found.
    pub marker_frames: u64,
    /// Payload segments on each server port other than 15008, for a reader who wonders.
    pub plain_payload_segments: u64,
}

/// A capture that is under way on all links of a namespace.
#[derive(Debug)]
pub struct Capture {
    stop: Arc<AtomicBool>,
    tunnelled: Arc<Mutex<BTreeMap<IpAddr, Instant>>>,
    reader: JoinHandle<anyhow::Result<Captured>>,
}

impl Capture {
    /// Begins: frames that arrive after this returns are seen. `takes` chooses by source and destination.
    ///
    /// # Errors
    /// If the packet socket cannot be made.
    pub fn start(
        netns: &NetNs,
        marker: &[u8],
        takes: impl Fn(IpAddr, IpAddr) -> bool + Send + 'static,
    ) -> anyhow::Result<Self> {
        let mut socket = netns.run(packet_socket)??;
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, marker) = (stop.clone(), marker.to_vec());
        let tunnelled = Arc::default();
        let noted = Arc::clone(&tunnelled);
        let reader = std::thread::Builder::new()
            .name("capture".into())
            .spawn(move || {
                let mut captured = Captured::default();
                let mut frame = vec![0; FRAME_BYTES];
                loop {
                    match socket.read(&mut frame) {
                        Ok(length) => captured.take(&frame[..length], &marker, &takes, &noted),
                        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                            // Only when the socket is empty, so that nothing seen before `finish` is left unread.
                            if stopped.load(Ordering::Acquire) {
                                return Ok(captured);
                            }
                        }
                        Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                        Err(error) => return Err(error).context("reading captured frames"),
                    }
                }
            })?;
        Ok(Self {
            stop,
            tunnelled,
            reader,
        })
    }

    /// When the first payload for port 15008 of this address was seen; `None`: there was none yet.
    pub fn tunnelled(&self, to: IpAddr) -> Option<Instant> {
        let tunnelled = self.tunnelled.lock();
        tunnelled
            .unwrap_or_else(PoisonError::into_inner)
            .get(&to)
            .copied()
    }

    /// Ends and tells what was seen.
    ///
    /// # Errors
    /// If reading failed meanwhile.
    pub fn finish(self) -> anyhow::Result<Captured> {
        self.stop.store(true, Ordering::Release);
        match self.reader.join() {
            Ok(result) => result,
            Err(_) => anyhow::bail!("the capture thread panicked"),
        }
    }
}

fn packet_socket() -> anyhow::Result<Socket> {
    let protocol = Protocol::from(i32::from(ETH_P_ALL.to_be()));
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(protocol))
        .context("opening a packet socket")?;
    socket.set_recv_buffer_size(KERNEL_BUFFER_BYTES)?;
    socket.set_read_timeout(Some(POLL))?;
    Ok(socket)
}

impl Captured {
    fn take(
        &mut self,
        frame: &[u8],
        marker: &[u8],
        takes: &impl Fn(IpAddr, IpAddr) -> bool,
        tunnelled: &Mutex<BTreeMap<IpAddr, Instant>>,
    ) {
        let Some(segment) = Segment::parse(frame) else {
            return;
        };
        if !takes(segment.source, segment.destination) {
            return;
        }
        let server = segment.ports.0.min(segment.ports.1);
        self.segments += 1;
        self.server_ports.insert(server);
        if !segment.payload.is_empty() {
            self.payload_segments += 1;
            if segment.ports.1 == HBONE_PORT {
                let mut tunnelled = tunnelled.lock().unwrap_or_else(PoisonError::into_inner);
                tunnelled
                    .entry(segment.destination)
                    .or_insert_with(Instant::now);
            }
            self.plain_payload_segments += u64::from(server != HBONE_PORT);
        }
        if !marker.is_empty()
            && segment
                .payload
                .windows(marker.len())
                .any(|window| window == marker)
        {
            self.marker_frames += 1;
        }
    }
}

struct Segment<'a> {
    source: IpAddr,
    destination: IpAddr,
    ports: (u16, u16),
    payload: &'a [u8],
}

impl<'a> Segment<'a> {
    /// Ethernet, IPv4 or IPv6 without extension headers, TCP: what the simulation's pods send.
    fn parse(frame: &'a [u8]) -> Option<Self> {
        let (ethernet, packet) = frame.split_at_checked(14)?;
        let (source, destination, segment): (IpAddr, IpAddr, &[u8]) = match ethernet[12..] {
            [0x08, 0x00] => {
                let header = usize::from(packet.first()? & 0x0f) * 4;
                let total = usize::from(u16::from_be_bytes(packet.get(2..4)?.try_into().ok()?));
                if *packet.get(9)? != 6 {
                    return None;
                }
                let address = |at: usize| -> Option<IpAddr> {
                    Some(Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?).into())
                };
                // Short frames are padded; oversized ones (segmentation offload) say 0.
                let end = if total == 0 {
                    packet.len()
                } else {
                    total.min(packet.len())
                };
                (address(12)?, address(16)?, packet.get(header..end)?)
            }
            [0x86, 0xdd] => {
                if *packet.get(6)? != 6 {
                    return None;
                }
                let address = |at: usize| -> Option<IpAddr> {
                    Some(
                        Ipv6Addr::from(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?).into(),
                    )
                };
                (address(8)?, address(24)?, packet.get(40..)?)
            }
            _ => return None,
        };
        let port = |at: usize| {
            Some(u16::from_be_bytes(
                segment.get(at..at + 2)?.try_into().ok()?,
            ))
        };
        let offset = usize::from(segment.get(12)? >> 4) * 4;
        Some(Self {
            source,
            destination,
            ports: (port(0)?, port(2)?),
            payload: segment.get(offset..)?,
        })
    }
}
