// SPDX-License-Identifier: Apache-2.0
use podveil_inbound::Kubelet;
use podveil_netns::{seqpacket, sock_diag};
use podveil_proto::podveil::node::v1::{ListenersRequest, ListenersResponse};
use prost::Message;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// The other module is on this node and answers in a millisecond; a probe that waits longer fails anyhow.
const ANSWER_BOUND: Duration = Duration::from_millis(200);
const MAX_ANSWER_BYTES: usize = 1024;

/// Recognises the kubelet by its socket: one with exactly this connection must be in the node's own network namespace,
/// where this process runs, and the `redirect` module, which may look into other processes, must find it among the
/// kubelet's descriptors. A source address alone proves nothing.
#[derive(Debug)]
pub struct NodeKubelet {
    /// Socket of the listeners' holder.
    pub holder: PathBuf,
}

impl Kubelet for NodeKubelet {
    fn is_probe(&self, peer: SocketAddr, local: SocketAddr) -> bool {
        match sock_diag::established(peer, local) {
            Ok(Some(socket)) => match self.holds(socket) {
                Ok(held) => held,
                Err(error) => {
                    tracing::warn!(%peer, %error, "the kubelet cannot be recognised: no answer from the redirect module");
                    false
                }
            },
            Ok(None) => false,
            Err(error) => {
                tracing::warn!(%peer, %error, "the kubelet cannot be recognised: the kernel does not tell");
                false
            }
        }
    }
}

impl NodeKubelet {
    fn holds(&self, kubelet_socket: u64) -> io::Result<bool> {
        let request = ListenersRequest {
            kubelet_socket,
            ..ListenersRequest::default()
        };
        let answer = seqpacket::ask(
            &self.holder,
            &request.encode_to_vec(),
            MAX_ANSWER_BYTES,
            ANSWER_BOUND,
        )?;
        let answer = ListenersResponse::decode(&*answer).map_err(io::Error::other)?;
        Ok(answer.is_kubelets)
    }
}
