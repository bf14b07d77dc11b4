// SPDX-License-Identifier: Apache-2.0
use crate::NetNs;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader,
    NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};
use netlink_sys::{Socket, SocketAddr};
use std::fmt::Debug;
use std::io;
use std::marker::PhantomData;

/// The kernel has answered, or begun to, when a request has been sent: nobody is waited for.
const DO_NOT_WAIT: i32 = nix::libc::MSG_DONTWAIT;
/// The kernel fills no more than this at once.
const ANSWER_BYTES: usize = 32 * 1024;
/// A list that changes under its reader is asked for again, so often.
const LISTS: usize = 8;

/// A way to ask the kernel about one network namespace (netlink(7)), in messages `M`.
#[derive(Debug)]
pub struct Netlink<M> {
    socket: Socket,
    messages: PhantomData<fn(M) -> M>,
}

impl<M> Netlink<M>
where
    M: NetlinkSerializable + NetlinkDeserializable + Debug,
{
    /// `protocol` is one of [`netlink_sys::protocols`]. A socket stays in the namespace that it was made in.
    /// # Errors
    /// When the namespace cannot be entered, or as `socket(2)`.
    pub fn open(netns: &NetNs, protocol: isize) -> io::Result<Self> {
        netns
            .run(|| Self::here(protocol))
            .map_err(io::Error::other)?
    }

    /// In the calling thread's namespace.
    /// # Errors
    /// As `socket(2)`.
    pub fn here(protocol: isize) -> io::Result<Self> {
        let socket = Socket::new(protocol)?;
        // A list is then of what was asked for; of routes it would be every table's.
        socket.set_netlink_get_strict_chk(true)?;
        Ok(Self {
            socket,
            messages: PhantomData,
        })
    }

    /// `flags` are more than that an answer is wanted: whether to make, to replace.
    /// # Errors
    /// What the kernel says to it.
    pub fn change(&self, request: M, flags: u16) -> io::Result<()> {
        self.ask(request, NLM_F_ACK | flags).map(drop)
    }

    /// # Errors
    /// What the kernel says to it; `InvalidData` for an answer of another shape.
    pub fn get(&self, question: M) -> io::Result<M> {
        let mut answers = self.ask(question, NLM_F_ACK)?.messages;
        answers.pop().ok_or(io::ErrorKind::InvalidData.into())
    }

    /// # Errors
    /// As [`Netlink::get`]; `Interrupted` if it has changed each time while it was read.
    pub fn list(&self, question: M) -> io::Result<Vec<M>>
    where
        M: Clone,
    {
        for _ in 0..LISTS {
            let answers = self.ask(question.clone(), NLM_F_DUMP)?;
            if !answers.are_inconsistent {
                return Ok(answers.messages);
            }
        }
        Err(io::ErrorKind::Interrupted.into())
    }

    fn ask(&self, request: M, flags: u16) -> io::Result<Answers<M>> {
        let payload = NetlinkPayload::InnerMessage(request);
        let mut request = NetlinkMessage::new(NetlinkHeader::default(), payload);
        request.header.flags = NLM_F_REQUEST | flags;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        let kernel = SocketAddr::new(0, 0);
        self.socket.send_to(&bytes, &kernel, DO_NOT_WAIT)?;
        let mut answers = Answers::default();
        let mut bytes = Vec::with_capacity(ANSWER_BYTES);
        loop {
            bytes.clear();
            self.socket.recv(&mut bytes, DO_NOT_WAIT)?;
            if read(&bytes, &mut answers)? == Part::Last {
                return Ok(answers);
            }
        }
    }
}

#[derive(Debug)]
struct Answers<M> {
    messages: Vec<M>,
    /// What was listed has changed meanwhile: something may be missing.
    are_inconsistent: bool,
}

impl<M> Default for Answers<M> {
    fn default() -> Self {
        Self {
            messages: Vec::new(),
            are_inconsistent: false,
        }
    }
}

#[derive(Debug, Eq, PartialEq)]
enum Part {
    Last,
    More,
}

fn read<M>(mut bytes: &[u8], answers: &mut Answers<M>) -> io::Result<Part>
where
    M: NetlinkDeserializable + Debug,
{
    let broken = |text| io::Error::new(io::ErrorKind::InvalidData, text);
    while !bytes.is_empty() {
        let answer =
            NetlinkMessage::<M>::deserialize(bytes).map_err(|error| broken(error.to_string()))?;
        answers.are_inconsistent |= answer.header.flags & NLM_F_DUMP_INTR != 0;
        match answer.payload {
            NetlinkPayload::InnerMessage(message) => answers.messages.push(message),
            NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
            NetlinkPayload::Done(done) if done.code < 0 => {
                return Err(io::Error::from_raw_os_error(-done.code));
            }
            NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => return Ok(Part::Last),
            other => {
                return Err(broken(format!(
                    "an answer that nobody asked for: {other:?}"
                )));
            }
        }
        // A length below a header's own has been refused above.
        let length = usize::try_from(answer.header.length).unwrap_or(usize::MAX - 3);
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(Part::More)
}

#[cfg(test)]
mod tests {
    use super::*;
    use netlink_packet_route::RouteNetlinkMessage;

    type Answers = super::Answers<RouteNetlinkMessage>;

    #[test]
    fn an_answer_of_another_shape_is_an_error() {
        for length in 1..16 {
            let short = vec![0xff; length];
            assert!(read(&short, &mut Answers::default()).is_err(), "{length}");
        }
        let noop = [16, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        assert!(read(&noop, &mut Answers::default()).is_err());
    }

    #[test]
    fn the_last_part_and_a_refusal_are_told_apart() {
        let mut done = [
            20u8, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        ];
        let mut answers = Answers::default();
        assert_eq!(read(&done, &mut answers).unwrap(), Part::Last);
        assert!(!answers.are_inconsistent);
        done[6] = 0x10;
        assert_eq!(read(&done, &mut answers).unwrap(), Part::Last);
        assert!(answers.are_inconsistent);
        done[16..].copy_from_slice(&(-nix::libc::ENOENT).to_ne_bytes());
        let refused = read(&done, &mut Answers::default()).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::NotFound);
        assert_eq!(read(&[], &mut Answers::default()).unwrap(), Part::More);
    }
}
