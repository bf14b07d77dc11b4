// SPDX-License-Identifier: Apache-2.0
//! Who a program is that has no SVID yet: by the token it shows.

mod files;
mod review;
mod stated;

pub use files::Tokens;
pub use review::{AUDIENCE, Reviews};

use crate::api::ApiError;
use podveil_identity::ProgramIdentity;
use std::io;
use std::path::PathBuf;
use tokio::time::Instant;

/// Where tokens are known.
#[derive(Debug)]
pub enum FirstContact {
    /// One file a program, put there by the operator.
    Files(Tokens),
    /// The API server, which issued them to pods.
    Review(Reviews),
}

/// Why a token is not taken.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    #[error("too many tokens are being reviewed")]
    Busy,
    #[error("the token has expired")]
    Expired,
    #[error("the token is not a ServiceAccount's")]
    Malformed,
    #[error("the pod that the token is bound to does not run on its node, by what the CA knows")]
    NoSuchPod,
    #[error("the API server does not take the token: revoked, forged, or of a deleted pod")]
    NotAuthenticated,
    #[error("the token is not bound to a pod on a node")]
    NotPodBound,
    #[error("the CA has not read the cluster yet")]
    NotReady,
    #[error("the token is of another audience than {AUDIENCE}")]
    OtherAudience,
    #[error("the token is not that of a ServiceAccount of Podveil's own programs")]
    OtherServiceAccount,
    #[error("reading the tokens in {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("reviewing the token")]
    Review(#[source] ApiError),
    #[error("{} holds more than {max} tokens", path.display())]
    TooMany { path: PathBuf, max: usize },
    #[error("no program has this token")]
    Unknown,
}

impl TokenError {
    /// Is the token at fault? Else it is ours or the API server's, and passes.
    pub fn is_denial(&self) -> bool {
        match self {
            Self::Busy
            | Self::NotReady
            | Self::Read { .. }
            | Self::Review(_)
            | Self::TooMany { .. } => false,
            Self::Expired
            | Self::Malformed
            | Self::NoSuchPod
            | Self::NotAuthenticated
            | Self::NotPodBound
            | Self::OtherAudience
            | Self::OtherServiceAccount
            | Self::Unknown => true,
        }
    }
}

impl FirstContact {
    /// Whose token this is.
    ///
    /// # Errors
    /// [`TokenError`]
    pub async fn program(&self, token: &str) -> Result<ProgramIdentity, TokenError> {
        match self {
            Self::Files(tokens) => tokens.program(token, Instant::now().into_std()),
            Self::Review(reviews) => reviews.program(token.trim()).await,
        }
    }
}
