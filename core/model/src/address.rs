// SPDX-License-Identifier: Apache-2.0
//! Typed addresses, so that two ends of a connection cannot be swapped by accident, and the rules about which of
//! them the proxy may ever dial.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Captured outbound connections arrive here, in the pod's own network namespace.
pub const OUTBOUND_PORT: u16 = 15001;
/// Captured plain inbound connections arrive here.
pub const INBOUND_PORT: u16 = 15006;
/// HBONE tunnels arrive here.
pub const HBONE_PORT: u16 = 15008;

/// Ports in a pod's network namespace that are the proxy's own and never a destination.
pub fn is_own_port(port: u16) -> bool {
    matches!(port, OUTBOUND_PORT | INBOUND_PORT | HBONE_PORT)
}

/// Where verification of capture connects to: an address of nobody's (RFC 5737, RFC 3849), at one of the proxy's own ports.
/// Whoever takes such a connection is the proxy, which resets it.
pub const VERIFICATION_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
pub const VERIFICATION_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);

/// Is it a connection that verifies capture, and nothing else?
pub fn is_verification(to: SocketAddr) -> bool {
    is_own_port(to.port())
        && matches!(
            to.ip(),
            IpAddr::V4(VERIFICATION_V4) | IpAddr::V6(VERIFICATION_V6)
        )
}

macro_rules! typed_address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
        pub struct $name(pub SocketAddr);

        impl $name {
            pub fn ip(self) -> IpAddr {
                self.0.ip()
            }

            pub fn port(self) -> u16 {
                self.0.port()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

typed_address! {
    /// Who connected to us, as the kernel saw it.
    PeerAddr
}
typed_address! {
    /// Our own end of an accepted connection.
    LocalAddr
}
typed_address! {
    /// What the application dialled before capture.
    OriginalDst
}

/// Where an HBONE tunnel goes and what its CONNECT names.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct HboneTarget {
    /// The TCP destination of the tunnel: the workload's address and [`HBONE_PORT`].
    pub tunnel: SocketAddr,
    /// The `:authority`: the workload's address and its own port.
    pub authority: SocketAddr,
}

impl HboneTarget {
    pub fn direct(workload: SocketAddr) -> Self {
        Self {
            tunnel: SocketAddr::new(workload.ip(), HBONE_PORT),
            authority: workload,
        }
    }
}

/// Why an address that a peer or an application named is never dialled.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq, thiserror::Error)]
pub enum NotDialable {
    #[error("link-local address")]
    LinkLocal,
    #[error("loopback address")]
    Loopback,
    #[error("IPv4-mapped IPv6 address")]
    Mapped,
    #[error("multicast or broadcast address")]
    Multicast,
    #[error("one of the proxy's own ports")]
    OwnPort,
    #[error("unspecified address")]
    Unspecified,
    #[error("IPv6 zone id")]
    Zone,
    #[error("port 0")]
    ZeroPort,
}

/// The rule about addresses from outside: which are refused, by name, before anything is looked up.
///
/// # Errors
/// The first rule that the address breaks.
pub fn check_target(address: SocketAddr) -> Result<(), NotDialable> {
    if address.port() == 0 {
        return Err(NotDialable::ZeroPort);
    }
    if is_own_port(address.port()) {
        return Err(NotDialable::OwnPort);
    }
    if let SocketAddr::V6(v6) = address {
        if v6.ip().to_ipv4_mapped().is_some() {
            return Err(NotDialable::Mapped);
        }
        if v6.scope_id() != 0 {
            return Err(NotDialable::Zone);
        }
    }
    let ip = address.ip();
    if ip.is_unspecified() {
        return Err(NotDialable::Unspecified);
    }
    if ip.is_loopback() {
        return Err(NotDialable::Loopback);
    }
    let link_local = match ip {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    if link_local {
        return Err(NotDialable::LinkLocal);
    }
    if ip.is_multicast() || matches!(ip, IpAddr::V4(v4) if v4.is_broadcast()) {
        return Err(NotDialable::Multicast);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_forbidden_target_is_refused_by_name() {
        for (text, reason) in [
            ("127.0.0.1:80", NotDialable::Loopback),
            ("[::1]:80", NotDialable::Loopback),
            ("0.0.0.0:80", NotDialable::Unspecified),
            ("[::]:80", NotDialable::Unspecified),
            ("169.254.169.254:80", NotDialable::LinkLocal),
            ("[fe80::1]:80", NotDialable::LinkLocal),
            ("[::ffff:10.0.0.1]:80", NotDialable::Mapped),
            ("[fd00::1%3]:80", NotDialable::Zone),
            ("224.0.0.1:80", NotDialable::Multicast),
            ("10.0.0.1:0", NotDialable::ZeroPort),
            ("10.0.0.1:15001", NotDialable::OwnPort),
            ("10.0.0.1:15006", NotDialable::OwnPort),
            ("[fd00::1]:15008", NotDialable::OwnPort),
        ] {
            assert_eq!(check_target(text.parse().unwrap()), Err(reason), "{text}");
        }
        assert_eq!(check_target("10.0.0.1:80".parse().unwrap()), Ok(()));
        assert_eq!(check_target("[fd00::1]:80".parse().unwrap()), Ok(()));
    }
}
