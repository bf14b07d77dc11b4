// SPDX-License-Identifier: Apache-2.0
//! The schema of a file, as serde types. Values with a form of their own (names, addresses, ranges) are checked while
//! they are read, so that the parser knows the line.

use ipnet::IpNet;
use podveil_identity::{KubernetesName, TrustDomain};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _};
use serde_saphyr::Spanned;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::str::FromStr;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub(crate) struct Document {
    pub trust_domain: Option<Spanned<Text<TrustDomain>>>,
    pub ranges: Option<Spanned<Ranges>>,
    pub plain_outbound: Vec<Text<Range>>,
    pub nodes: Vec<Spanned<Node>>,
    pub namespaces: Vec<Spanned<Namespace>>,
    pub workloads: Vec<Spanned<Workload>>,
    pub services: Vec<Spanned<Service>>,
    pub policies: Vec<Spanned<Policy>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Ranges {
    #[serde(default)]
    pub pods: Vec<Text<Range>>,
    #[serde(default)]
    pub services: Vec<Text<Range>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Node {
    pub name: Text<KubernetesName>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Namespace {
    pub name: Text<KubernetesName>,
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(crate) struct Workload {
    pub name: Text<KubernetesName>,
    pub namespace: Text<KubernetesName>,
    pub uid: Spanned<String>,
    pub node: Text<KubernetesName>,
    pub service_account: Text<KubernetesName>,
    #[serde(default)]
    pub addresses: Vec<Text<IpAddr>>,
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
    #[serde(default)]
    pub phase: Phase,
    #[serde(default)]
    pub host_network: bool,
    #[serde(default = "yes")]
    pub ready: bool,
}

fn yes() -> bool {
    true
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub(crate) enum Phase {
    Failed,
    #[default]
    Running,
    Succeeded,
    Terminating,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(crate) struct Service {
    pub name: Text<KubernetesName>,
    pub namespace: Text<KubernetesName>,
    #[serde(default)]
    pub addresses: Vec<Text<IpAddr>>,
    pub ports: Vec<Spanned<ServicePort>>,
    /// Names of workloads in the same namespace.
    #[serde(default)]
    pub endpoints: Vec<String>,
    #[serde(default)]
    pub publish_not_ready_addresses: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(crate) struct ServicePort {
    pub port: u16,
    /// The same as `port` where nothing is said.
    pub target_port: Option<u16>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(crate) struct Policy {
    pub name: Text<KubernetesName>,
    /// Absent for, and only for, a global policy.
    pub namespace: Option<Text<KubernetesName>>,
    pub scope: Scope,
    pub action: Action,
    #[serde(default)]
    pub dry_run: bool,
    /// For the scope `workloads`: names in the policy's namespace.
    #[serde(default)]
    pub workloads: Vec<String>,
    #[serde(default)]
    pub rules: Vec<Spanned<Rule>>,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Scope {
    Global,
    Namespace,
    Workloads,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Action {
    Allow,
    Deny,
}

/// With neither part it holds for every connection.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Rule {
    #[serde(default)]
    pub from: Vec<Spanned<From>>,
    #[serde(default)]
    pub to: Vec<Spanned<To>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub(crate) struct From {
    pub principals: Vec<String>,
    pub not_principals: Vec<String>,
    pub namespaces: Vec<String>,
    pub not_namespaces: Vec<String>,
    pub service_accounts: Vec<String>,
    pub not_service_accounts: Vec<String>,
    pub ips: Vec<Text<Range>>,
    pub not_ips: Vec<Text<Range>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub(crate) struct To {
    pub ports: Vec<u16>,
    pub not_ports: Vec<u16>,
    pub ips: Vec<Text<Range>>,
    pub not_ips: Vec<Text<Range>>,
}

/// Parses one document.
///
/// # Errors
/// The line (0 if unknown) and a sentence.
pub(crate) fn read(text: &str) -> Result<Document, (u64, String)> {
    // The size of the text is bounded already; a cluster has more nodes than a usual configuration file.
    let mut budget = serde_saphyr::Budget::default();
    budget.max_events = 16_000_000;
    budget.max_nodes = 8_000_000;
    let mut options = serde_saphyr::Options::default();
    options.with_snippet = false;
    options.budget = Some(budget);
    serde_saphyr::from_str_with_options::<Option<Document>>(text, options)
        .map(Option::unwrap_or_default)
        .map_err(|error| {
            let line = error.location().map_or(0, |location| location.line());
            (line, error.to_string())
        })
}

/// A value written as text in its own form.
#[derive(Clone, Debug)]
pub(crate) struct Text<T>(pub T);

impl<'de, T> Deserialize<'de> for Text<T>
where
    T: FromText,
{
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        T::from_text(&text).map(Self).map_err(D::Error::custom)
    }
}

pub(crate) trait FromText: Sized {
    fn from_text(text: &str) -> Result<Self, String>;
}

impl FromText for KubernetesName {
    fn from_text(text: &str) -> Result<Self, String> {
        text.parse()
            .map_err(|error: podveil_identity::IdentityError| error.to_string())
    }
}

impl FromText for TrustDomain {
    fn from_text(text: &str) -> Result<Self, String> {
        Self::new(text).map_err(|error| format!("{text:?} is not a trust domain: {error}"))
    }
}

impl FromText for IpAddr {
    fn from_text(text: &str) -> Result<Self, String> {
        text.parse()
            .map_err(|_| format!("{text:?} is not an IP address"))
    }
}

/// A CIDR; one address is a range of one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Range(pub IpNet);

impl FromText for Range {
    fn from_text(text: &str) -> Result<Self, String> {
        IpNet::from_str(text)
            .or_else(|_| IpAddr::from_str(text).map(IpNet::from))
            .map(|range| Self(range.trunc()))
            .map_err(|_| format!("{text:?} is not a CIDR or an address"))
    }
}
