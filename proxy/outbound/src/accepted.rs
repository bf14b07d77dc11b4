// SPDX-License-Identifier: Apache-2.0
use crate::refused::Refused;
use podveil_model::{OUTBOUND_PORT, OriginalDst, PeerAddr, Workload, check_target};
use podveil_net::{TcpEnd, original_dst, prepare_application};
use std::net::SocketAddr;
use tokio::net::TcpStream;
use tokio::time::Instant;

/// A captured connection, with what the kernel says about it. From here on dropping it is a reset.
#[derive(Debug)]
pub(crate) struct Accepted {
    pub end: TcpEnd,
    pub facts: Facts,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Facts {
    pub peer: PeerAddr,
    pub original: OriginalDst,
    pub at: Instant,
}

impl Accepted {
    /// # Errors
    /// [`Refused::NoOriginalDst`]: where it was going is never guessed.
    pub fn from_listener(stream: TcpStream, peer: SocketAddr) -> Result<Self, Refused> {
        prepare_application(&stream).map_err(Refused::Socket)?;
        let original = original_dst(&stream, OUTBOUND_PORT).map_err(Refused::NoOriginalDst)?;
        Ok(Self::new(stream, PeerAddr(peer), original))
    }

    /// `stream` is prepared.
    pub fn new(stream: TcpStream, peer: PeerAddr, original: OriginalDst) -> Self {
        Self {
            end: TcpEnd::new(stream),
            facts: Facts {
                peer,
                original,
                at: Instant::now(),
            },
        }
    }
}

impl Facts {
    /// The rule about addresses: from one of the pod's own, to one that may be dialled at all.
    ///
    /// # Errors
    /// [`Refused::SourceNotOwn`], [`Refused::NotDialable`].
    pub fn check(&self, workload: &Workload) -> Result<(), Refused> {
        if !workload.addresses.contains(&self.peer.ip()) {
            return Err(Refused::SourceNotOwn { peer: self.peer });
        }
        check_target(self.original.0).map_err(|source| Refused::NotDialable {
            destination: self.original,
            source,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use podveil_flow::DropReason;
    use podveil_testing::workload;

    #[tokio::test]
    async fn only_our_own_connections_to_what_may_be_dialled() {
        let own = workload("us")
            .address("10.0.0.1")
            .address("fd00::1")
            .build();
        for (peer, original, reason) in [
            ("10.0.0.1:40000", "10.0.0.2:80", None),
            ("[fd00::1]:40000", "[fd00::2]:80", None),
            ("10.0.0.1:40000", "1.1.1.1:443", None),
            (
                "10.0.0.2:40000",
                "10.0.0.3:80",
                Some(DropReason::SourceNotOwn),
            ),
            (
                "127.0.0.1:40000",
                "10.0.0.3:80",
                Some(DropReason::SourceNotOwn),
            ),
            (
                "10.0.0.1:40000",
                "127.0.0.1:80",
                Some(DropReason::BadTarget),
            ),
            (
                "10.0.0.1:40000",
                "10.0.0.1:15001",
                Some(DropReason::BadTarget),
            ),
            (
                "10.0.0.1:40000",
                "10.0.0.2:15008",
                Some(DropReason::BadTarget),
            ),
            (
                "10.0.0.1:40000",
                "10.0.0.2:15006",
                Some(DropReason::BadTarget),
            ),
            (
                "10.0.0.1:40000",
                "169.254.169.254:80",
                Some(DropReason::BadTarget),
            ),
            (
                "[fd00::1]:40000",
                "[::ffff:10.0.0.2]:80",
                Some(DropReason::BadTarget),
            ),
            (
                "[fd00::1]:40000",
                "[fe80::1%3]:80",
                Some(DropReason::BadTarget),
            ),
        ] {
            let facts = Facts {
                peer: PeerAddr(peer.parse().unwrap()),
                original: OriginalDst(original.parse().unwrap()),
                at: Instant::now(),
            };
            let refused = facts.check(&own).err().map(|refused| refused.reason());
            assert_eq!(refused, reason, "{peer} to {original}");
        }
    }
}
