// SPDX-License-Identifier: Apache-2.0
use podveil_program::config::Override;
use podveil_program::{HumanDuration, LogFormat};
use podveil_source::{Defaults, SourceConfig};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Where the admin service is, for whoever does not say otherwise.
pub const DEFAULT_ADMIN_SOCKET: &str = "/run/podveil/ca/admin.sock";

/// Configuration of `podveil-ca`.
#[derive(Clone, Debug, Deserialize, JsonSchema, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Name of the trust domain whose CA this is. It is in every certificate, so a data directory keeps to one.
    #[serde(default = "default_trust_domain")]
    pub trust_domain: String,
    /// Where programs reach the CA, over TLS 1.3 only.
    #[serde(default = "default_listen")]
    pub listen: SocketAddr,
    /// The cluster as the CA itself reads it: `kubernetes`, or a YAML file or a directory of them.
    pub source: SourceConfig,
    /// How a program proves itself before it has a certificate. Default: as fits the source, `token_review` for
    /// `kubernetes` and `token_files` for files.
    #[serde(default)]
    pub first_contact: Option<FirstContactConfig>,
    /// Where keys and journal are kept. Default: as fits the source, `kubernetes` or `directory`. Losing them means a new
    /// root for every program.
    #[serde(default)]
    pub store: Option<StoreConfig>,
    /// On Kubernetes, the namespace of Podveil's own programs.
    #[serde(default = "default_namespace")]
    pub namespace: String,
    /// What holds where a namespace's labels say nothing; as the controller has it.
    #[serde(default)]
    pub defaults: Defaults,
    /// On Kubernetes, the name of this replica: its pod's.
    #[serde(default)]
    pub replica: Option<String>,
    /// For `store: directory`: keys, journal and `bundle.pem`; made with mode 0700.
    #[serde(default = "default_data_dir")]
    pub data_dir: PathBuf,
    /// For `first_contact: token_files`: one file a program, `controller`, `node.<name>`. A token has at least 16 bytes.
    #[serde(default = "default_tokens_dir")]
    pub tokens_dir: PathBuf,
    /// Life of a workload's certificate. With renewal between 35 % and 45 % of it, 24 h leave at least 13 h whenever
    /// an outage of the CA begins.
    #[serde(default = "default_leaf_ttl")]
    pub leaf_ttl: HumanDuration,
    /// Life of a program's certificate; renewed as a workload's is.
    #[serde(default = "default_leaf_ttl")]
    pub program_ttl: HumanDuration,
    /// Life of an issuing authority. It is replaced when a third of it is left.
    #[serde(default = "default_issuing_ttl")]
    pub issuing_ttl: HumanDuration,
    /// Life of a root: replaced by a rotation, not by its end.
    #[serde(default = "default_root_ttl")]
    pub root_ttl: HumanDuration,
    /// Unix socket of the admin service, for its own user and root only; its directory is made with mode 0700.
    #[serde(default = "default_admin_socket")]
    pub admin_socket: PathBuf,
    /// `/metrics`.
    #[serde(default = "default_metrics_address")]
    pub metrics_address: SocketAddr,
    /// `/healthz/ready`.
    #[serde(default = "default_readiness_address")]
    pub readiness_address: SocketAddr,
    #[serde(default)]
    pub rotation: RotationConfig,
    #[serde(default)]
    pub limits: LimitsConfig,
    /// How log lines are written.
    #[serde(default)]
    pub log: LogFormat,
}

/// How a program proves itself at first contact.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FirstContactConfig {
    /// By a token that the operator put into a file of `tokens_dir`.
    TokenFiles,
    /// By the token of its pod's ServiceAccount with audience `podveil-ca`, which the API server reviews.
    TokenReview,
}

/// Where keys and journal are kept.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StoreConfig {
    /// `data_dir`, for one CA.
    Directory,
    /// Secret `podveil-ca`, shared by replicas; the roots in ConfigMap `podveil-roots`.
    Kubernetes,
}

impl Config {
    pub(crate) fn first_contact(&self) -> FirstContactConfig {
        self.first_contact.unwrap_or(match self.source {
            SourceConfig::File(_) => FirstContactConfig::TokenFiles,
            SourceConfig::Kubernetes => FirstContactConfig::TokenReview,
        })
    }

    pub(crate) fn store(&self) -> StoreConfig {
        self.store.unwrap_or(match self.source {
            SourceConfig::File(_) => StoreConfig::Directory,
            SourceConfig::Kubernetes => StoreConfig::Kubernetes,
        })
    }
}

/// How long a rotation waits for whom.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RotationConfig {
    /// For a program that is connected and has not acknowledged a step; then the rotation stops where it is, and the
    /// next `podveilctl rotate` goes on from there.
    pub timeout: HumanDuration,
    /// A program that has been away for longer than this is named and not waited for.
    pub absent_after: HumanDuration,
}

/// Requests that the CA takes; above them it answers `ResourceExhausted` with the time to wait.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct LimitsConfig {
    /// All callers together: issuing leaves processor time for everything else.
    pub requests_per_second: u32,
    /// One program. A node that replaces the certificates of 200 identities is done in a few seconds.
    pub requests_per_second_per_program: u32,
    /// All first contacts together: these callers have no name yet.
    pub first_contacts_per_second: u32,
}

impl Default for RotationConfig {
    fn default() -> Self {
        Self {
            timeout: HumanDuration(Duration::from_secs(120)),
            absent_after: HumanDuration(Duration::from_secs(30)),
        }
    }
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self {
            requests_per_second: 2000,
            requests_per_second_per_program: 100,
            first_contacts_per_second: 100,
        }
    }
}

/// Environment variables over the file.
pub const OVERRIDES: &[Override] = &[
    Override {
        variable: "TRUST_DOMAIN",
        key: "trust_domain",
    },
    Override {
        variable: "PODVEIL_CA_LISTEN",
        key: "listen",
    },
    Override {
        variable: "PODVEIL_CA_DATA_DIR",
        key: "data_dir",
    },
    Override {
        variable: "POD_NAME",
        key: "replica",
    },
    Override {
        variable: "POD_NAMESPACE",
        key: "namespace",
    },
];

fn default_trust_domain() -> String {
    "cluster.local".into()
}

fn default_listen() -> SocketAddr {
    (std::net::Ipv6Addr::UNSPECIFIED, 15012).into()
}

fn default_namespace() -> String {
    "podveil-system".into()
}

fn default_data_dir() -> PathBuf {
    "/var/lib/podveil/ca".into()
}

fn default_tokens_dir() -> PathBuf {
    "/var/run/secrets/podveil/tokens".into()
}

fn default_leaf_ttl() -> HumanDuration {
    HumanDuration(Duration::from_secs(24 * 3600))
}

fn default_issuing_ttl() -> HumanDuration {
    HumanDuration(Duration::from_secs(90 * 24 * 3600))
}

fn default_root_ttl() -> HumanDuration {
    HumanDuration(Duration::from_secs(3650 * 24 * 3600))
}

fn default_admin_socket() -> PathBuf {
    DEFAULT_ADMIN_SOCKET.into()
}

fn default_metrics_address() -> SocketAddr {
    (std::net::Ipv6Addr::UNSPECIFIED, 15020).into()
}

fn default_readiness_address() -> SocketAddr {
    (std::net::Ipv6Addr::UNSPECIFIED, 15021).into()
}
