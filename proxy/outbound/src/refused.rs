// SPDX-License-Identifier: Apache-2.0
use crate::rules::PlainRefused;
use crate::tunnels::TunnelError;
use podveil_flow::{DropReason, Verdict};
use podveil_hbone::StreamError;
use podveil_model::{NotDialable, OriginalDst, PeerAddr, Uid, Unresolved};
use podveil_net::{ConnectError, NoOriginalDst};
use podveil_tls::HandshakeError;
use std::error::Error;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// Why a connection of the pod goes nowhere.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refused {
    #[error("the accepted socket failed")]
    Socket(#[source] io::Error),
    #[error("no original destination")]
    NoOriginalDst(#[source] NoOriginalDst),
    #[error("{peer} is not an address of this pod")]
    SourceNotOwn { peer: PeerAddr },
    #[error("{destination} is never dialled")]
    NotDialable {
        destination: OriginalDst,
        #[source]
        source: NotDialable,
    },
    #[error("this pod's workload {uid} is not known here")]
    WorkloadNotKnown { uid: Uid },
    #[error(transparent)]
    Unresolved(Unresolved),
    #[error(transparent)]
    Plain(PlainRefused),
    #[error("there is no certificate for this pod")]
    NoCertificate,
    #[error("this pod is at its bound of {what}")]
    Limit { what: &'static str },
    #[error("no tunnel")]
    Tunnel(#[source] Arc<TunnelError>),
    #[error("no tunnel within {after:?}")]
    NoTunnel { after: Duration },
    #[error("no stream in the tunnel")]
    Stream(#[source] StreamError),
    #[error("the other proxy did not answer within {after:?}")]
    NoAnswer { after: Duration },
    #[error("plain connection failed")]
    Connect(#[source] ConnectError),
    #[error("the proxy is stopping")]
    Stopping,
}

impl Refused {
    /// May the same be tried again, within the hold bound? What an application or its proxy has answered is an answer.
    pub fn may_change(&self) -> bool {
        match self {
            Self::Unresolved(Unresolved::Address { .. } | Unresolved::NotSynced { .. })
            | Self::Tunnel(_) => true,
            Self::Stream(error) => error.may_move(),
            _ => false,
        }
    }

    pub fn reason(&self) -> DropReason {
        match self {
            Self::NoOriginalDst(_) => DropReason::NoOriginalDestination,
            Self::SourceNotOwn { .. } => DropReason::SourceNotOwn,
            Self::NotDialable { .. } => DropReason::BadTarget,
            Self::WorkloadNotKnown { .. } => DropReason::WorkloadNotKnown,
            Self::Unresolved(Unresolved::Address { .. } | Unresolved::NotSynced { .. }) => {
                DropReason::NotKnown
            }
            Self::Unresolved(
                Unresolved::NoAddress { .. }
                | Unresolved::NoEndpoint { .. }
                | Unresolved::NoPort { .. },
            ) => DropReason::NoEndpoint,
            Self::Plain(PlainRefused::External { .. }) => DropReason::ExternalRefused,
            Self::Plain(PlainRefused::Strict { .. }) => DropReason::PlaintextStrict,
            Self::NoCertificate => DropReason::CertificateMissing,
            Self::Limit { .. } => DropReason::LimitReached,
            Self::NoTunnel { .. } => DropReason::TunnelFailed,
            Self::Tunnel(error) => match &**error {
                TunnelError::Tls {
                    source:
                        HandshakeError::PeerRefused(_)
                        | HandshakeError::PeerUnreadable(_)
                        | HandshakeError::NotAWorkload(_),
                    ..
                } => DropReason::PeerIdentity,
                _ => DropReason::TunnelFailed,
            },
            Self::Stream(StreamError::NotTaken(_) | StreamError::Lost(_)) | Self::Stopping => {
                DropReason::TunnelFailed
            }
            Self::Stream(StreamError::Refused { .. } | StreamError::Reset(_))
            | Self::NoAnswer { .. } => DropReason::UpstreamRefused,
            Self::Socket(_) | Self::Connect(_) => DropReason::ConnectFailed,
        }
    }

    pub fn verdict(&self) -> Verdict {
        Verdict::Dropped {
            reason: self.reason(),
            detail: self.detail(),
        }
    }

    /// The whole chain of causes as one sentence, with the hint that people search for.
    fn detail(&self) -> String {
        let mut text = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        if let Self::Tunnel(error) = self
            && matches!(**error, TunnelError::Connect(ConnectError::NoAnswer { .. }))
        {
            text.push_str(
                ": connection timed out, maybe a NetworkPolicy is blocking HBONE port 15008",
            );
        }
        text
    }
}
