// SPDX-License-Identifier: Apache-2.0
//! Makes the kernel forget connections that conntrack knows and nothing translates.
//!
//! Conntrack sees a namespace only while a table stands there. A connection that outlives the table leaves an entry
//! behind that nobody ends, for days. A later SYN with the same addresses and ports then belongs to that entry instead of
//! being new, no nat chain sees it, and it goes past the proxy. A live connection that is forgotten is taken up again
//! with its next packet.

use podveil_netns::NetNs;
use podveil_plan::{MARK, OWN_MARK};
use socket2::{Domain, Protocol, Socket, Type};
use std::io::{self, Read, Write};
use std::time::Duration;

// linux/netlink.h, linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h, nf_conntrack_common.h
const AF_NETLINK: i32 = 16;
const NETLINK_NETFILTER: i32 = 12;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const CT_NEW: u16 = 0x100;
const CT_GET: u16 = 0x101;
const CT_DELETE: u16 = 0x102;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_STATUS: u16 = 3;
const CTA_MARK: u16 = 8;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_PROTO_NUM: u16 = 1;
const IPS_NAT: u32 = 0x30;
const TYPE_MASK: u16 = 0x3fff;
const TCP: u8 = 6;
/// Of a netlink message, and with the part that conntrack adds.
const HEADER: usize = 16;
const HEADERS: usize = HEADER + 4;
/// The kernel fills messages of a dump up to this.
const BUFFER: usize = 64 * 1024;
/// The kernel answers at once.
const DEADLINE: Duration = Duration::from_secs(2);

/// Forgets TCP connections without translation, both families. Those that carry one of our marks need it: they are
/// forgotten only if `ours`, which is right when no table of ours stands.
/// # Errors
/// As `socket(2)` and `recv(2)`; a kernel without `nf_conntrack_netlink` is one.
pub fn forget_untranslated(netns: &NetNs, ours: bool) -> io::Result<usize> {
    let socket = netns
        .run(|| {
            Socket::new(
                Domain::from(AF_NETLINK),
                Type::RAW,
                Some(Protocol::from(NETLINK_NETFILTER)),
            )
        })
        .map_err(io::Error::other)??;
    socket.set_read_timeout(Some(DEADLINE))?;
    let mut forgotten = 0;
    for family in [nix::libc::AF_INET as u8, nix::libc::AF_INET6 as u8] {
        let mut socket = &socket;
        socket.write_all(&message(CT_GET, NLM_F_REQUEST | NLM_F_DUMP, family, &[]))?;
        let mut found = Vec::new();
        let mut buffer = vec![0; BUFFER];
        'dump: loop {
            let length = socket.read(&mut buffer)?;
            for (kind, payload) in Messages(buffer.get(..length).unwrap_or_default()) {
                match kind {
                    CT_NEW => found.extend(Entry::parse(payload)),
                    NLMSG_DONE => break 'dump,
                    NLMSG_ERROR => return Err(error(payload)),
                    _ => {}
                }
            }
        }
        for entry in found.iter().filter(|entry| entry.is_idle(ours)) {
            // Without acknowledgement: an entry that has ended meanwhile is as good as forgotten.
            socket.write_all(&message(CT_DELETE, NLM_F_REQUEST, family, &entry.name))?;
            forgotten += 1;
        }
    }
    Ok(forgotten)
}

/// One connection of a dump.
struct Entry {
    /// The attributes that name it, as they came.
    name: Vec<u8>,
    is_tcp: bool,
    status: u32,
    mark: u32,
}

impl Entry {
    fn parse(payload: &[u8]) -> Option<Self> {
        let mut entry = Self {
            name: Vec::new(),
            is_tcp: false,
            status: 0,
            mark: 0,
        };
        for attribute in Attributes(payload.get(HEADERS - HEADER..)?) {
            match attribute.kind {
                CTA_TUPLE_ORIG => {
                    let protocol = Attributes(attribute.value)
                        .find(|part| part.kind == CTA_TUPLE_PROTO)
                        .and_then(|part| {
                            Attributes(part.value).find(|part| part.kind == CTA_PROTO_NUM)
                        })?;
                    entry.is_tcp = protocol.value.first() == Some(&TCP);
                    entry.name.extend_from_slice(attribute.whole);
                }
                CTA_ID | CTA_ZONE => entry.name.extend_from_slice(attribute.whole),
                CTA_STATUS => entry.status = number(attribute.value)?,
                CTA_MARK => entry.mark = number(attribute.value)?,
                _ => {}
            }
        }
        Some(entry)
    }

    fn is_idle(&self, ours: bool) -> bool {
        self.is_tcp
            && self.status & IPS_NAT == 0
            && (ours || ![MARK, OWN_MARK].contains(&self.mark))
    }
}

fn message(kind: u16, flags: u16, family: u8, attributes: &[u8]) -> Vec<u8> {
    let length = (HEADERS + attributes.len()) as u32;
    let mut message = Vec::with_capacity(HEADERS + attributes.len());
    message.extend_from_slice(&length.to_ne_bytes());
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(&flags.to_ne_bytes());
    // Sequence and port: one request at a time on a socket of its own.
    message.extend_from_slice(&[0; 8]);
    message.extend_from_slice(&[family, 0, 0, 0]);
    message.extend_from_slice(attributes);
    message
}

fn number(value: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(value.try_into().ok()?))
}

fn error(payload: &[u8]) -> io::Error {
    let code = payload.get(..4).and_then(|code| code.try_into().ok());
    match code.map(i32::from_ne_bytes) {
        Some(code) => io::Error::from_raw_os_error(-code),
        None => io::ErrorKind::InvalidData.into(),
    }
}

/// The messages of one datagram: type, and what follows the header.
struct Messages<'a>(&'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let length = u32::from_ne_bytes(self.0.get(..4)?.try_into().ok()?) as usize;
        let kind = u16::from_ne_bytes(self.0.get(4..6)?.try_into().ok()?);
        let payload = self.0.get(HEADER..length)?;
        self.0 = self.0.get(aligned(length)..).unwrap_or_default();
        Some((kind, payload))
    }
}

struct Attributes<'a>(&'a [u8]);

struct Attribute<'a> {
    kind: u16,
    value: &'a [u8],
    /// With header and padding.
    whole: &'a [u8],
}

impl<'a> Iterator for Attributes<'a> {
    type Item = Attribute<'a>;

    fn next(&mut self) -> Option<Self::Item> {
        let length = u16::from_ne_bytes(self.0.get(..2)?.try_into().ok()?) as usize;
        let kind = u16::from_ne_bytes(self.0.get(2..4)?.try_into().ok()?) & TYPE_MASK;
        let value = self.0.get(4..length)?;
        let (whole, rest) = self.0.split_at_checked(aligned(length))?;
        self.0 = rest;
        Some(Attribute { kind, value, whole })
    }
}

fn aligned(length: usize) -> usize {
    length.next_multiple_of(4)
}
