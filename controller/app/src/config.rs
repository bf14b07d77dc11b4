// SPDX-License-Identifier: Apache-2.0
use crate::StartError;
use podveil_ca_client::{Module, ProgramConfig, ProgramCredentials};
use podveil_identity::{IdentityError, KubernetesName, ProgramIdentity, TrustDomain};
use podveil_program::LogFormat;
use podveil_program::config::Override;
use podveil_source::{Defaults, SourceConfig};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use tokio_util::sync::CancellationToken;

/// Configuration of `podveil-controller`.
#[derive(Clone, Debug, Deserialize, JsonSchema, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Name of the trust domain; the cluster's state must name the same.
    #[serde(default = "default_trust_domain")]
    pub trust_domain: String,
    /// Where nodes reach discovery and reports, over TLS 1.3 only.
    #[serde(default = "default_listen")]
    pub listen: SocketAddr,
    /// The state of the cluster: `kubernetes` for the API of the cluster that this program runs in, or a YAML file or a
    /// directory of them.
    pub source: SourceConfig,
    /// The namespace of Podveil's own programs: never enrolled.
    #[serde(default = "default_namespace")]
    pub namespace: String,
    /// What holds where a namespace's labels say nothing; the CA is to be given the same.
    #[serde(default)]
    pub defaults: Defaults,
    /// Begin with pods also where Cilium's own `encryption.type=ztunnel` is on. Without it nothing is begun there.
    #[serde(default)]
    pub take_over: bool,
    /// The name of this one among several. Default: the pod's on Kubernetes, else the machine's.
    #[serde(default = "default_replica")]
    pub replica: String,
    /// Where the CA is, `host:port`.
    pub ca_address: String,
    /// File with the token for first contact with the CA; read at each use.
    #[serde(default = "default_token")]
    pub token: PathBuf,
    /// PEM file of the roots to trust at first contact.
    #[serde(default = "default_bootstrap_bundle")]
    pub bootstrap_bundle: PathBuf,
    /// The newest bundle, and how far each workload is enrolled. Losing it walks every workload in again from the
    /// start; keys are never kept.
    #[serde(default = "default_state_dir")]
    pub state_dir: PathBuf,
    /// `/status`, read-only. Names all workloads, so by default only this machine may read it.
    #[serde(default = "default_admin_address")]
    pub admin_address: SocketAddr,
    /// `/metrics`.
    #[serde(default = "default_metrics_address")]
    pub metrics_address: SocketAddr,
    /// `/healthz/ready`.
    #[serde(default = "default_readiness_address")]
    pub readiness_address: SocketAddr,
    /// How log lines are written.
    #[serde(default)]
    pub log: LogFormat,
}

/// Environment variables over the file.
pub const OVERRIDES: &[Override] = &[
    Override {
        variable: "TRUST_DOMAIN",
        key: "trust_domain",
    },
    Override {
        variable: "CA_ADDRESS",
        key: "ca_address",
    },
    Override {
        variable: "PODVEIL_CONTROLLER_LISTEN",
        key: "listen",
    },
    Override {
        variable: "PODVEIL_CONTROLLER_SOURCE",
        key: "source",
    },
    Override {
        variable: "POD_NAMESPACE",
        key: "namespace",
    },
    Override {
        variable: "POD_NAME",
        key: "replica",
    },
];

impl Config {
    /// # Errors
    /// [`StartError::TrustDomain`] if it is not one.
    pub fn trust_domain(&self) -> Result<TrustDomain, StartError> {
        TrustDomain::new(&self.trust_domain).map_err(|source| {
            StartError::TrustDomain(IdentityError::NotSpiffe {
                text: self.trust_domain.clone(),
                source,
            })
        })
    }

    /// # Errors
    /// [`StartError::Namespace`] if it is not a name.
    pub fn namespace(&self) -> Result<KubernetesName, StartError> {
        self.namespace.parse().map_err(StartError::Namespace)
    }

    /// Starts to ask the CA for this program's certificate.
    ///
    /// # Errors
    /// As [`Self::trust_domain`].
    pub fn credentials(&self, stop: CancellationToken) -> Result<ProgramCredentials, StartError> {
        let config = ProgramConfig {
            trust_domain: self.trust_domain()?,
            identity: ProgramIdentity::Controller,
            ca_address: self.ca_address.clone(),
            token_path: self.token.clone(),
            bootstrap_bundle: self.bootstrap_bundle.clone(),
            state_dir: self.state_dir.clone(),
            module: Module::Controller,
        };
        Ok(ProgramCredentials::start(config, stop))
    }
}

fn default_trust_domain() -> String {
    "cluster.local".into()
}

fn default_namespace() -> String {
    "podveil-system".into()
}

fn default_replica() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map_or_else(|_| "podveil-controller".into(), |name| name.trim().into())
}

fn default_listen() -> SocketAddr {
    (Ipv6Addr::UNSPECIFIED, 15010).into()
}

fn default_token() -> PathBuf {
    "/var/run/secrets/podveil/token".into()
}

fn default_bootstrap_bundle() -> PathBuf {
    "/etc/podveil/bundle.pem".into()
}

fn default_state_dir() -> PathBuf {
    "/var/lib/podveil/controller".into()
}

fn default_admin_address() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 15000).into()
}

fn default_metrics_address() -> SocketAddr {
    (Ipv6Addr::UNSPECIFIED, 15020).into()
}

fn default_readiness_address() -> SocketAddr {
    (Ipv6Addr::UNSPECIFIED, 15021).into()
}
