// SPDX-License-Identifier: Apache-2.0
//! Makes the kernel forget connections that conntrack knows and nothing translates.
//!
//! Conntrack sees a namespace only while a table stands there. A connection that outlives the table leaves an entry
//! behind that nobody ends, for days. A later SYN with the same addresses and ports then belongs to that entry instead of
//! being new, no nat chain sees it, and it goes past the proxy. A live connection that is forgotten is taken up again
//! with its next packet.

use crate::nfnetlink::{Attributes, HEADER, HEADERS, Nfnetlink, message, number};
use podveil_netns::NetNs;
use podveil_plan::{MARK, OWN_MARK};
use std::fs;
use std::io;

// linux/netfilter/nfnetlink_conntrack.h, nf_conntrack_common.h
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
const TCP: u8 = 6;
const EVERY_FAMILY: u8 = 0;

/// Forgets TCP connections without translation, both families. Those that carry one of our marks need it: they are
/// forgotten only if `ours`, which is right when no table of ours stands.
/// # Errors
/// As `socket(2)` and `recv(2)`; a kernel without `nf_conntrack_netlink` is one.
pub fn forget_untranslated(netns: &NetNs, ours: bool) -> io::Result<usize> {
    if knows_none(netns) {
        return Ok(0);
    }
    let netlink = Nfnetlink::open(netns)?;
    let mut found = Vec::new();
    netlink.list(CT_GET, EVERY_FAMILY, |kind, payload| {
        if kind == CT_NEW {
            found.extend(Entry::parse(payload));
        }
    })?;
    let idle = found.iter().filter(|entry| entry.is_idle(ours));
    let mut forgotten = 0;
    for entry in idle {
        // Without acknowledgement: an entry that has ended meanwhile is as good as forgotten.
        netlink.tell(&message(CT_DELETE, 0, entry.family, &entry.name))?;
        forgotten += 1;
    }
    Ok(forgotten)
}

/// A list takes the kernel a walk through what the whole machine has, its number none.
fn knows_none(netns: &NetNs) -> bool {
    let count = netns.run(|| fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count"));
    matches!(count, Ok(Ok(count)) if count.trim() == "0")
}

/// One connection of a dump.
struct Entry {
    family: u8,
    /// The attributes that name it, as they came.
    name: Vec<u8>,
    is_tcp: bool,
    status: u32,
    mark: u32,
}

impl Entry {
    fn parse(payload: &[u8]) -> Option<Self> {
        let mut entry = Self {
            family: *payload.first()?,
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
