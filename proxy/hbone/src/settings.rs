// SPDX-License-Identifier: Apache-2.0
use std::time::Duration;

/// Streams that one tunnel carries at once: announced as a server, kept to as a client.
pub const MAX_STREAMS: u32 = 100;

/// Streams that were opened and reset before the server looked at them; at one more it ends the tunnel, and with it
/// everybody's streams. HTTP/2's own bound, 20, is reached by an application that gives up many connections at once (a
/// health check, a scan, a killed process); this one is reached by a peer that means harm.
pub(crate) const MAX_RESET_UNSEEN: usize = 1024;

/// HTTP/2 settings, the same on both sides.
///
/// A stream's window is what one stalled reader can make us hold. 1 MiB carries 8 Gbit/s over 1 ms of round trip.
///
/// INVARIANT: the connection's window is larger than the windows of all its streams together, so that 99 stalled
/// readers never take the 100th one's share. The price is a bound and not a use: a tunnel holds
/// `max_streams * stream_window` only if every reader on it stalls in the middle of a large transfer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Settings {
    pub max_streams: u32,
    pub stream_window: u32,
    /// The largest DATA frame we take. HTTP/2 hands a frame on when it is whole, and meanwhile no other stream gets
    /// anything: larger frames would save little and cost latency and memory.
    pub max_frame_size: u32,
    pub max_header_list_size: u32,
    /// Bytes that one stream may have waiting for the tunnel's socket.
    pub send_buffer: usize,
    /// A ping is sent this often, whether or not bytes flow.
    pub ping_interval: Duration,
    /// Without an answer to it the tunnel is lost.
    pub ping_timeout: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            max_streams: MAX_STREAMS,
            stream_window: 1024 * 1024,
            max_frame_size: 128 * 1024,
            max_header_list_size: 16 * 1024,
            send_buffer: 256 * 1024,
            ping_interval: Duration::from_secs(10),
            ping_timeout: Duration::from_secs(20),
        }
    }
}

impl Settings {
    pub(crate) fn connection_window(&self) -> u32 {
        /// Of HTTP/2 itself (RFC 9113 §6.9.1).
        const MAX: u32 = (1 << 31) - 1;
        self.stream_window
            .saturating_mul(self.max_streams.saturating_add(1))
            .min(MAX)
    }
}
