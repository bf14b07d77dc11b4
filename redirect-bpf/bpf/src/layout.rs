// SPDX-License-Identifier: Apache-2.0
//! The other half of `programs/layout.h`: what the programs and user space share, byte for byte.

use crate::table::PodKey;
use podveil_model::{HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT};
use podveil_plan::{MARK, VERIFY_MARK};
use std::ffi::OsStr;
use std::fmt;
use std::mem::{offset_of, size_of};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// Part of the path that maps and links are pinned under: a new number for every change of a layout or of a map.
///
/// What an older layout has left is taken over while pods are captured by it ([`crate::Node`]). For that, these stay as they
/// are in every layout, and what more is to be told goes into a map of its own:
///
/// - the folders `maps`, `node` and `pods/<cookie>`;
/// - [`Pod`], the meaning of its flags, and that a program leaves a pod alone which is not in the map `pods`;
/// - the maps of sockets and connections that are open: `listeners`, `older`, `pod_counts`, `proxy_connections`,
///   `proxy_sockets`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Layout(pub u32);

impl Layout {
    /// Whose folder has this name?
    pub fn of(name: &OsStr) -> Option<Self> {
        name.to_str()?.strip_prefix('v')?.parse().ok().map(Self)
    }
}

impl Default for Layout {
    fn default() -> Self {
        Self(1)
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "v{}", self.0)
    }
}

/// Types without padding of which every bit pattern is a value: what may cross into the kernel and back as bytes.
///
/// # Safety
/// The implementor vouches for exactly that.
#[expect(
    unsafe_code,
    reason = "a promise about layout that only a reader can check"
)]
pub unsafe trait Plain: Copy {}

macro_rules! plain {
    ($($type:ty),*) => {
        $(
            // SAFETY: integers, and `repr(C)` structs of integers whose sizes, asserted below, leave no room for padding.
            #[expect(unsafe_code, reason = "see the trait")]
            unsafe impl Plain for $type {}
        )*
    };
}
plain!(
    u32,
    u64,
    Ip,
    Pod,
    PodAddress,
    PodConnection,
    PodCounts,
    PodListener,
    PodPort
);

/// 16 bytes in network order, IPv4 as `::ffff:a.b.c.d`.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
#[repr(C, align(4))]
pub struct Ip(pub [u8; 16]);

impl From<IpAddr> for Ip {
    fn from(ip: IpAddr) -> Self {
        Self(match ip {
            IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
            IpAddr::V6(ip) => ip.octets(),
        })
    }
}

impl From<Ip> for IpAddr {
    fn from(ip: Ip) -> Self {
        Ipv6Addr::from(ip.0).to_canonical()
    }
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Pod {
    pub flags: u32,
    pub sysctls: u32,
}

impl Pod {
    pub const CAPTURING: u32 = 1;
    pub const FENCED: u32 = 2;
    pub const REFUSES_PLAIN: u32 = 4;
    pub const HAS_IPV4: u32 = 8;
    pub const HAS_IPV6: u32 = 16;
}

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
#[repr(C)]
pub struct PodAddress {
    pub netns: u64,
    pub ip: Ip,
}

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
#[repr(C)]
pub struct PodPort {
    pub netns: u64,
    pub port: u16,
    pub kind: u16,
    zero: u32,
}

impl PodPort {
    pub const EXCLUDED_OUTBOUND: u16 = 0;
    pub const EXCLUDED_INBOUND: u16 = 1;
    pub const PLAIN_INBOUND: u16 = 2;

    pub fn new(netns: u64, port: u16, kind: u16) -> Self {
        Self {
            netns,
            port,
            kind,
            zero: 0,
        }
    }
}

/// A connection as the socket sees it that it is about.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
#[repr(C)]
pub struct PodConnection {
    pub netns: u64,
    local_ip: Ip,
    remote_ip: Ip,
    local_port: u16,
    remote_port: u16,
    zero: u32,
}

impl PodConnection {
    pub fn new(netns: u64, local: SocketAddr, remote: SocketAddr) -> Self {
        Self {
            netns,
            local_ip: local.ip().into(),
            remote_ip: remote.ip().into(),
            local_port: local.port(),
            remote_port: remote.port(),
            zero: 0,
        }
    }

    pub fn local(&self) -> SocketAddr {
        SocketAddr::new(self.local_ip.into(), self.local_port)
    }

    pub fn remote(&self) -> SocketAddr {
        SocketAddr::new(self.remote_ip.into(), self.remote_port)
    }
}

impl PodKey for PodAddress {
    fn netns(&self) -> u64 {
        self.netns
    }
}

impl PodKey for PodPort {
    fn netns(&self) -> u64 {
        self.netns
    }
}

impl PodKey for PodConnection {
    fn netns(&self) -> u64 {
        self.netns
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct PodListener {
    pub netns: u64,
    port: u16,
    is_ipv6: u16,
    zero: u32,
}

impl PodListener {
    pub fn new(netns: u64, address: SocketAddr) -> Self {
        Self {
            netns,
            port: address.port(),
            is_ipv6: address.is_ipv6().into(),
            zero: 0,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct PodCounts {
    pub fence_out: u64,
    pub fence_in: u64,
    pub lost_reply: u64,
    pub no_listener: u64,
    pub carried: i64,
    pub captured: u64,
}

/// Values of the fence's map.
pub const ENROLLED: u32 = 1;
pub const MANDATORY: u32 = 2;

const _: () = assert!(size_of::<Ip>() == 16);
const _: () = assert!(size_of::<Pod>() == 8);
const _: () = assert!(size_of::<PodAddress>() == 24);
const _: () = assert!(size_of::<PodPort>() == 16);
const _: () = assert!(offset_of!(PodPort, kind) == 10);
const _: () = assert!(size_of::<PodConnection>() == 48);
const _: () = assert!(offset_of!(PodConnection, local_port) == 40);
const _: () = assert!(size_of::<PodListener>() == 16);
const _: () = assert!(offset_of!(PodListener, is_ipv6) == 10);
const _: () = assert!(size_of::<PodCounts>() == 48);
const _: () = assert!(offset_of!(PodCounts, carried) == 32);
// `layout.h` has these as numbers.
const _: () = assert!(OUTBOUND_PORT == 15001 && INBOUND_PORT == 15006 && HBONE_PORT == 15008);
const _: () = assert!(MARK == 0x53a && VERIFY_MARK == 0x53c);

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    #[test]
    fn an_address_comes_back_as_it_was() {
        for text in ["10.0.0.1", "fd00::1", "::1", "0.0.0.0"] {
            let ip: IpAddr = text.parse().unwrap();
            assert_eq!(IpAddr::from(Ip::from(ip)), ip);
        }
        assert_eq!(
            Ip::from(IpAddr::from(Ipv4Addr::new(10, 0, 0, 1))).0,
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 1]
        );
    }

    #[test]
    fn the_header_has_the_same_numbers() {
        let header = include_str!("../programs/layout.h");
        for (name, value) in [
            ("CAPTURING", Pod::CAPTURING),
            ("FENCED", Pod::FENCED),
            ("REFUSES_PLAIN", Pod::REFUSES_PLAIN),
            ("HAS_IPV4", Pod::HAS_IPV4),
            ("HAS_IPV6", Pod::HAS_IPV6),
            ("ENROLLED", ENROLLED),
            ("MANDATORY", MANDATORY),
        ] {
            let line = format!("#define {name} {value}u\n");
            assert!(header.contains(&line), "{line}");
        }
        for (name, value) in [
            ("EXCLUDED_OUTBOUND", PodPort::EXCLUDED_OUTBOUND),
            ("EXCLUDED_INBOUND", PodPort::EXCLUDED_INBOUND),
            ("PLAIN_INBOUND", PodPort::PLAIN_INBOUND),
        ] {
            let line = format!("#define {name} {value}\n");
            assert!(header.contains(&line), "{line}");
        }
    }
}
