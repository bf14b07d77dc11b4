// SPDX-License-Identifier: Apache-2.0
use crate::ask::AskError;
use crate::config::ConfigError;
use crate::environment::EnvironmentError;
use serde_json::json;
use std::error::Error;
use std::fmt;

/// What a CNI caller is told instead of a result: the kubelet shows the message in an event of the pod.
#[derive(Debug)]
pub struct Failure {
    cni_version: String,
    what: What,
}

/// Why a pod's network is not ready.
#[derive(Debug, thiserror::Error)]
pub(crate) enum What {
    #[error("podveil-cni cannot ask the node program whether this pod is enrolled")]
    Ask(#[source] AskError),
    #[error("podveil-cni cannot read its configuration")]
    Config(#[from] ConfigError),
    #[error("podveil-cni is called wrongly")]
    Environment(#[from] EnvironmentError),
    #[error("podveil-cni cannot read its standard input")]
    Input(#[source] std::io::Error),
    #[error("podveil-cni cannot open the pod's network namespace {path}")]
    NetNs {
        path: String,
        #[source]
        source: nix::errno::Errno,
    },
    #[error("the pod is to be captured by Podveil before it starts, and is not yet: {reason}")]
    Refused { reason: String },
}

impl Failure {
    pub(crate) fn new(cni_version: &str, what: impl Into<What>) -> Self {
        Self {
            cni_version: cni_version.to_owned(),
            what: what.into(),
        }
    }

    /// CNI specification, "Error".
    pub fn code(&self) -> u32 {
        const INCOMPATIBLE_VERSION: u32 = 1;
        const INVALID_ENVIRONMENT: u32 = 4;
        const IO: u32 = 5;
        const UNDECODABLE: u32 = 6;
        const INVALID_CONFIG: u32 = 7;
        const TRY_AGAIN_LATER: u32 = 11;
        match &self.what {
            What::Ask(_) | What::Refused { .. } => TRY_AGAIN_LATER,
            What::Config(ConfigError::Version(_)) => INCOMPATIBLE_VERSION,
            What::Config(ConfigError::Json(_) | ConfigError::TooLong) => UNDECODABLE,
            What::Config(_) => INVALID_CONFIG,
            What::Environment(_) => INVALID_ENVIRONMENT,
            What::Input(_) | What::NetNs { .. } => IO,
        }
    }

    /// What a person can do.
    fn details(&self) -> Option<&'static str> {
        match &self.what {
            What::Ask(_) => Some(
                "it is asked again; see the pods podveil-node of this node. Pods start without it with \
                 node.cni.failClosed=false or node.cni.enabled=false in the chart; a namespace is never asked about if it is in \
                 node.cni.exemptNamespaces",
            ),
            What::Refused { .. } => Some(
                "it is asked again; `podveilctl status` says more. A pod that cannot be captured starts with the label \
                 io.cilium/mtls-enabled=false",
            ),
            _ => None,
        }
    }
}

/// The error object of the CNI specification.
impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut message = self.what.to_string();
        let mut source = self.what.source();
        while let Some(cause) = source {
            message = format!("{message}: {cause}");
            source = cause.source();
        }
        let mut object = json!({
            "cniVersion": self.cni_version,
            "code": self.code(),
            "msg": message,
        });
        if let Some(details) = self.details() {
            object["details"] = details.into();
        }
        write!(f, "{object}")
    }
}
