// SPDX-License-Identifier: Apache-2.0
//! Messages to and from the kernel's netfilter (nfnetlink), as far as they are asked for more often than a run of `nft`
//! would be worth.

use podveil_netns::NetNs;
use socket2::{Domain, Protocol, Socket, Type};
use std::io::{self, Read, Write};
use std::time::Duration;

// linux/netlink.h, linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h
const AF_NETLINK: i32 = 16;
const NETLINK_NETFILTER: i32 = 12;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
/// Of a removal: not what holds anything.
const NLM_F_NONREC: u16 = 0x100;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const TYPE_MASK: u16 = 0x3fff;
const NFT_NEWTABLE: u16 = 0xa00;
const NFT_GETTABLE: u16 = 0xa01;
const NFT_DELTABLE: u16 = 0xa02;
const NFT_DELCHAIN: u16 = 0xa05;
const NFT_NEWGEN: u16 = 0xa0f;
const NFT_GETGEN: u16 = 0xa10;
const NFTA_GEN_ID: u16 = 1;
pub const NFPROTO_IPV4: u8 = 2;
pub const NFPROTO_IPV6: u8 = 10;
const NFPROTO_INET: u8 = 1;
const NFTA_TABLE_NAME: u16 = 1;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const SUBSYSTEM: u16 = 10;
/// Of a netlink message, and with the part that netfilter adds.
pub const HEADER: usize = 16;
pub const HEADERS: usize = HEADER + 4;
/// The kernel fills messages of a dump up to this.
const BUFFER: usize = 64 * 1024;
/// The kernel answers at once.
const DEADLINE: Duration = Duration::from_secs(2);

/// A socket in one namespace.
pub struct Nfnetlink(Socket);

impl Nfnetlink {
    /// # Errors
    /// When the namespace cannot be entered, or as `socket(2)`.
    pub fn open(netns: &NetNs) -> io::Result<Self> {
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
        Ok(Self(socket))
    }

    /// # Errors
    /// As `send(2)`.
    pub fn tell(&self, message: &[u8]) -> io::Result<()> {
        (&self.0).write_all(message)
    }

    /// The payload of the one answer, which must be of this type.
    /// # Errors
    /// What the kernel says, or as `recv(2)`.
    fn ask(&self, question: &[u8], answer: u16) -> io::Result<Vec<u8>> {
        self.tell(question)?;
        let mut buffer = [0; 4096];
        let length = (&self.0).read(&mut buffer)?;
        match Messages(buffer.get(..length).unwrap_or_default()).next() {
            Some((kind, payload)) if kind == answer => Ok(payload.to_vec()),
            Some((NLMSG_ERROR, payload)) => Err(error(payload)),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// `each`: type, and what follows the header.
    /// # Errors
    /// What the kernel says, or as `recv(2)`.
    pub fn list(
        &self,
        question: u16,
        family: u8,
        mut each: impl FnMut(u16, &[u8]),
    ) -> io::Result<()> {
        self.tell(&message(question, NLM_F_DUMP, family, &[]))?;
        let mut buffer = vec![0; BUFFER];
        loop {
            let length = (&self.0).read(&mut buffer)?;
            for (kind, payload) in Messages(buffer.get(..length).unwrap_or_default()) {
                match kind {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => return Err(error(payload)),
                    _ => each(kind, payload),
                }
            }
        }
    }
}

/// Does this table of family `inet` stand?
/// # Errors
/// What the kernel says: `Unsupported` or another without nf_tables.
pub fn has_table(netns: &NetNs, name: &str) -> io::Result<bool> {
    let name = text(NFTA_TABLE_NAME, name);
    let question = message(NFT_GETTABLE, 0, NFPROTO_INET, &name);
    match Nfnetlink::open(netns)?.ask(&question, NFT_NEWTABLE) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Removes these chains and their table, all of it or nothing: nothing where a chain has a rule, or the table another chain.
/// `family`: the kernel's number. Says whether it is gone.
/// # Errors
/// What the kernel says.
pub fn remove_empty_table(
    netns: &NetNs,
    family: u8,
    table: &str,
    chains: &[&str],
) -> io::Result<bool> {
    let mut batch = bracket(BATCH_BEGIN);
    for chain in chains {
        let names = [text(NFTA_CHAIN_TABLE, table), text(NFTA_CHAIN_NAME, chain)].concat();
        batch.extend(message(NFT_DELCHAIN, NLM_F_NONREC, family, &names));
    }
    let name = text(NFTA_TABLE_NAME, table);
    let flags = NLM_F_NONREC | NLM_F_ACK;
    batch.extend(message(NFT_DELTABLE, flags, family, &name));
    batch.extend(bracket(BATCH_END));
    // An acknowledgement is an error of number 0.
    let outcome = error(&Nfnetlink::open(netns)?.ask(&batch, NLMSG_ERROR)?);
    match (outcome.raw_os_error(), outcome.kind()) {
        (Some(0), _) => Ok(true),
        (_, io::ErrorKind::ResourceBusy | io::ErrorKind::NotFound) => Ok(false),
        _ => Err(outcome),
    }
}

/// Begins or ends a transaction of nf_tables.
fn bracket(kind: u16) -> Vec<u8> {
    let mut bracket = message(kind, 0, 0, &[]);
    bracket[HEADERS - 2..].copy_from_slice(&SUBSYSTEM.to_be_bytes());
    bracket
}

/// An attribute that is a text.
fn text(kind: u16, value: &str) -> Vec<u8> {
    let length = 4 + value.len() + 1;
    let mut attribute = Vec::with_capacity(aligned(length));
    attribute.extend((length as u16).to_ne_bytes());
    attribute.extend(kind.to_ne_bytes());
    attribute.extend(value.as_bytes());
    // The zero that ends it, and padding.
    attribute.resize(aligned(length), 0);
    attribute
}

/// How many transactions of nf_tables this namespace has seen, modulo 2^32.
/// # Errors
/// What the kernel says.
pub fn generation(netns: &NetNs) -> io::Result<u32> {
    let question = message(NFT_GETGEN, 0, 0, &[]);
    let answer = Nfnetlink::open(netns)?.ask(&question, NFT_NEWGEN)?;
    let attributes = answer.get(HEADERS - HEADER..).unwrap_or_default();
    Attributes(attributes)
        .find(|attribute| attribute.kind == NFTA_GEN_ID)
        .and_then(|attribute| number(attribute.value))
        .ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Of a request: the flags beside that it is one.
pub fn message(kind: u16, flags: u16, family: u8, attributes: &[u8]) -> Vec<u8> {
    let length = (HEADERS + attributes.len()) as u32;
    let mut message = Vec::with_capacity(HEADERS + attributes.len());
    message.extend_from_slice(&length.to_ne_bytes());
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(&(NLM_F_REQUEST | flags).to_ne_bytes());
    // Sequence and port: one request at a time on a socket of its own.
    message.extend_from_slice(&[0; 8]);
    message.extend_from_slice(&[family, 0, 0, 0]);
    message.extend_from_slice(attributes);
    message
}

pub fn number(value: &[u8]) -> Option<u32> {
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

pub struct Attributes<'a>(pub &'a [u8]);

pub struct Attribute<'a> {
    pub kind: u16,
    pub value: &'a [u8],
    /// With header and padding.
    pub whole: &'a [u8],
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
