// SPDX-License-Identifier: Apache-2.0
use podveil_model::Uid;
use podveil_netns::seqpacket::Packet;
use podveil_proto::istio::workload::zds as wire;
use prost::Message;
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use wire::workload_request::Payload;

/// Longer than any uid of a pod, short enough for a log line.
const MAX_UID_BYTES: usize = 253;
/// A pod has one of each family.
const MAX_ADDRESSES: usize = 8;

/// What the agent says on one connection.
///
/// ```text
/// Snapshot (add, keep, del) -- snapshot sent --> Live (add, del)
/// ```
///
/// In `Snapshot` the uids that were named are collected; at its end every other pod is gone.
#[derive(Debug, Default)]
pub struct Session {
    named: BTreeSet<Uid>,
    live: bool,
}

/// What one packet asks for.
#[derive(Debug)]
pub enum Request {
    Add(AddedWorkload),
    /// The agent knows the pod but lost its network namespace: leave it as it is.
    Keep(Uid),
    Delete(Uid),
    /// Every pod that is not in this set is gone.
    SnapshotSent(BTreeSet<Uid>),
}

/// A pod and the network namespace it lives in.
#[derive(Debug)]
pub struct AddedWorkload {
    pub uid: Uid,
    pub info: WorkloadInfo,
    pub netns: OwnedFd,
}

/// What the agent tells about a pod before xDS does.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct WorkloadInfo {
    pub name: String,
    pub namespace: String,
    pub service_account: String,
    /// Its addresses, where the agent knows them before xDS does.
    pub addresses: Vec<IpAddr>,
}

/// Why a packet was refused: always the agent's fault.
#[derive(Debug, thiserror::Error)]
pub enum PacketError {
    #[error("the uid of a pod is 1 to {MAX_UID_BYTES} visible ASCII characters")]
    BadUid,
    #[error("{request} with {count} descriptors instead of {wanted}")]
    Descriptors {
        request: &'static str,
        count: usize,
        wanted: usize,
    },
    #[error("a keep came after the snapshot")]
    KeepAfterSnapshot,
    #[error("an add without workload information")]
    NoInfo,
    #[error("the packet is not a WorkloadRequest")]
    NotDecodable(#[source] prost::DecodeError),
    #[error("a second snapshot on one connection")]
    SecondSnapshot,
    #[error("a request that this version does not know")]
    Unknown,
}

impl PacketError {
    /// After these the two sides no longer agree on which pods there are: only a new snapshot mends that.
    pub fn ends_connection(&self) -> bool {
        matches!(self, Self::NotDecodable(_) | Self::SecondSnapshot)
    }
}

impl Session {
    /// Bytes of the proxy's first packet. `take_over` is ours; peers' agents pass over it.
    pub fn hello(take_over: bool) -> Vec<u8> {
        wire::ZdsHello {
            version: wire::Version::V1.into(),
            take_over,
        }
        .encode_to_vec()
    }

    /// Bytes of the answer to a packet; an empty error is success.
    pub fn ack(error: &str) -> Vec<u8> {
        // What the agent reads is bounded like what we read.
        let end = error.floor_char_boundary(super::MAX_PACKET_BYTES - 64);
        let ack = wire::Ack {
            error: error.get(..end).unwrap_or_default().to_owned(),
        };
        wire::WorkloadResponse {
            payload: Some(wire::workload_response::Payload::Ack(ack)),
        }
        .encode_to_vec()
    }

    /// True once the agent has told all pods it has.
    pub fn is_live(&self) -> bool {
        self.live
    }

    /// Takes one packet. Its descriptors are owned from the start, so those that are not wanted are closed.
    ///
    /// # Errors
    /// [`PacketError`], to be told to the agent.
    pub fn receive(&mut self, packet: Packet) -> Result<Request, PacketError> {
        let Packet { bytes, fds } = packet;
        let request =
            wire::WorkloadRequest::decode(bytes.as_slice()).map_err(PacketError::NotDecodable)?;
        match request.payload.ok_or(PacketError::Unknown)? {
            Payload::Add(add) => {
                let count = fds.len();
                let [netns] =
                    <[OwnedFd; 1]>::try_from(fds).map_err(|_| PacketError::Descriptors {
                        request: "add",
                        count,
                        wanted: 1,
                    })?;
                let uid = uid(&add.uid)?;
                let info = add.workload_info.ok_or(PacketError::NoInfo)?;
                if !self.live {
                    self.named.insert(uid.clone());
                }
                let info = WorkloadInfo {
                    name: info.name,
                    namespace: info.namespace,
                    service_account: info.service_account,
                    addresses: (info.addresses.iter().take(MAX_ADDRESSES))
                        .filter_map(|text| text.parse().ok())
                        .collect(),
                };
                Ok(Request::Add(AddedWorkload { uid, info, netns }))
            }
            Payload::Keep(keep) => {
                no_descriptor("keep", &fds)?;
                let uid = uid(&keep.uid)?;
                if self.live {
                    return Err(PacketError::KeepAfterSnapshot);
                }
                self.named.insert(uid.clone());
                Ok(Request::Keep(uid))
            }
            Payload::Del(delete) => {
                no_descriptor("delete", &fds)?;
                let uid = uid(&delete.uid)?;
                self.named.remove(&uid);
                Ok(Request::Delete(uid))
            }
            Payload::SnapshotSent(wire::SnapshotSent {}) => {
                no_descriptor("snapshot end", &fds)?;
                if std::mem::replace(&mut self.live, true) {
                    return Err(PacketError::SecondSnapshot);
                }
                Ok(Request::SnapshotSent(std::mem::take(&mut self.named)))
            }
        }
    }
}

fn no_descriptor(request: &'static str, fds: &[OwnedFd]) -> Result<(), PacketError> {
    match fds.len() {
        0 => Ok(()),
        count => Err(PacketError::Descriptors {
            request,
            count,
            wanted: 0,
        }),
    }
}

fn uid(text: &str) -> Result<Uid, PacketError> {
    let legal =
        (1..=MAX_UID_BYTES).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic());
    if legal {
        Ok(Uid::from(text))
    } else {
        Err(PacketError::BadUid)
    }
}
