// SPDX-License-Identifier: Apache-2.0
use nix::sys::stat::fstat;
use podveil_model::Uid;
use podveil_netns::seqpacket::Connection;
use podveil_proto::podveil::node::v1::{ListenersRequest, ListenersResponse, listener::Kind};
use prost::Message;
use std::collections::BTreeSet;
use std::io;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

const MAX_RESPONSE_BYTES: usize = 1024;
/// The holder answers from memory; a longer wait means that it hangs.
const ANSWER_BOUND: Duration = Duration::from_secs(5);

/// A pod's listening sockets by what arrives at them; usually one for each address family.
#[derive(Debug, Default)]
pub struct PodListeners {
    pub outbound: Vec<TcpListener>,
    pub inbound_plain: Vec<TcpListener>,
    pub inbound_hbone: Vec<TcpListener>,
}

impl PodListeners {
    /// The kernel's numbers of the sockets: the same as long as a socket lives, through whatever descriptor.
    pub fn sockets(&self) -> BTreeSet<u64> {
        let all = [&self.outbound, &self.inbound_plain, &self.inbound_hbone];
        all.into_iter()
            .flatten()
            .filter_map(|listener| fstat(listener).ok())
            .map(|stat| stat.st_ino)
            .collect()
    }

    /// What a pod cannot be served without.
    fn missing(&self) -> Option<Kind> {
        [
            (Kind::Outbound, &self.outbound),
            (Kind::InboundPlain, &self.inbound_plain),
            (Kind::InboundHbone, &self.inbound_hbone),
        ]
        .into_iter()
        .find(|(_, listeners)| listeners.is_empty())
        .map(|(kind, _)| kind)
    }
}

/// Why the holder's listeners could not be had.
#[derive(Debug, thiserror::Error)]
pub enum ListenersError {
    #[error("the holder closed the connection")]
    Closed,
    #[error("cannot connect to the listeners' holder")]
    Connect(#[source] io::Error),
    #[error("the holder sent {descriptors} descriptors for {listeners} listeners")]
    Count {
        descriptors: usize,
        listeners: usize,
    },
    #[error("the holder sent no listener of kind {}", .0.as_str_name())]
    Missing(Kind),
    #[error("the holder's answer is not a ListenersResponse")]
    NotDecodable(#[source] prost::DecodeError),
    #[error("cannot speak to the holder")]
    Packet(#[source] io::Error),
    #[error("the holder refused: {0}")]
    Refused(String),
    #[error("the holder did not answer within {ANSWER_BOUND:?}")]
    TooSlow,
}

/// Asks the holder at `path` for the listeners of one pod.
///
/// # Errors
/// [`ListenersError`]; descriptors that came are closed.
pub async fn fetch(path: &Path, uid: &Uid) -> Result<PodListeners, ListenersError> {
    let connection = Connection::connect(path).map_err(ListenersError::Connect)?;
    tokio::time::timeout(ANSWER_BOUND, ask(&connection, uid))
        .await
        .map_err(|_| ListenersError::TooSlow)?
}

pub(super) async fn ask(
    connection: &Connection,
    uid: &Uid,
) -> Result<PodListeners, ListenersError> {
    let request = ListenersRequest {
        uid: uid.to_string(),
        ..ListenersRequest::default()
    };
    connection
        .send(&request.encode_to_vec(), &[])
        .await
        .map_err(ListenersError::Packet)?;
    let packet = connection
        .recv(MAX_RESPONSE_BYTES)
        .await
        .map_err(ListenersError::Packet)?
        .ok_or(ListenersError::Closed)?;
    let response =
        ListenersResponse::decode(packet.bytes.as_slice()).map_err(ListenersError::NotDecodable)?;
    if !response.error.is_empty() {
        return Err(ListenersError::Refused(response.error));
    }
    sort(&response, packet.fds)
}

/// Gives each descriptor to the kind that the answer names in its place.
fn sort(response: &ListenersResponse, fds: Vec<OwnedFd>) -> Result<PodListeners, ListenersError> {
    if fds.len() != response.listeners.len() {
        return Err(ListenersError::Count {
            descriptors: fds.len(),
            listeners: response.listeners.len(),
        });
    }
    let mut sorted = PodListeners::default();
    for (listener, fd) in response.listeners.iter().zip(fds) {
        let place = match listener.kind() {
            Kind::Outbound => &mut sorted.outbound,
            Kind::InboundPlain => &mut sorted.inbound_plain,
            Kind::InboundHbone => &mut sorted.inbound_hbone,
            // A kind of a newer holder: not ours to serve.
            Kind::Unspecified => continue,
        };
        place.push(TcpListener::from(fd));
    }
    match sorted.missing() {
        Some(kind) => Err(ListenersError::Missing(kind)),
        None => Ok(sorted),
    }
}
