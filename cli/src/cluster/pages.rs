// SPDX-License-Identifier: Apache-2.0
//! What the programs' own pages say. Read leniently: an unknown field is a newer program's, a missing one an older's.

use podveil_source::NotEnrolled;
use prost_types::{Timestamp, TimestampError};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::collections::BTreeMap;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

/// The controller's `/status`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct ControllerPage {
    /// Of the snapshot that nodes are to have in use.
    pub version: String,
    pub source: SourcePage,
    pub nodes: Vec<ControllerNode>,
    pub workloads: Vec<ControllerWorkload>,
    pub conditions: Vec<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct SourcePage {
    pub error: Option<String>,
}

/// A node as the controller hears it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct ControllerNode {
    pub name: String,
    pub silent: bool,
    pub modules: Vec<ControllerModule>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct ControllerModule {
    pub module: String,
    pub connected: bool,
    pub silent: bool,
    pub heard_seconds_ago: u64,
    /// It lacks nothing that anybody waits for.
    pub current: bool,
    pub bundle_sequence: u64,
    pub certificate_generation: u64,
}

/// A pod as the controller sees it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct ControllerWorkload {
    pub uid: String,
    pub namespace: String,
    pub name: String,
    pub identity: String,
    pub node: String,
    pub addresses: Vec<String>,
    pub stage: String,
    pub mode: String,
    pub reason: String,
    pub conditions: Vec<String>,
    pub connections_older: u32,
    pub connections_captured: u32,
}

impl ControllerWorkload {
    /// Did somebody ask for it to be enrolled, or is there anything to tell about it?
    pub fn is_asked_for(&self) -> bool {
        let unasked = [NotEnrolled::NotLabelled, NotEnrolled::OwnNamespace]
            .iter()
            .any(|rule| self.reason == rule.to_string());
        self.stage != "none" || !self.conditions.is_empty() || !(unasked || self.reason.is_empty())
    }
}

/// `/status` of a node's `proxy` module.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ProxyPage {
    pub version: Version,
    pub certificates: Vec<Certificate>,
    /// By uid.
    pub workload_state: BTreeMap<String, PodState>,
    pub podveil: ProxyFacts,
}

/// `/status` of a node's `redirect` module.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct RedirectPage {
    pub back_end: Option<BackEnd>,
    /// How the CNI plugin stands: `installed`, `off`, or `not installed: <why>`.
    pub cni_plugin: String,
    pub pods: Vec<CapturedPod>,
}

/// What a node captures with from now on, and what it would have taken before that.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct BackEnd {
    pub chosen: String,
    pub unusable: Vec<Unusable>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Unusable {
    pub back_end: String,
    pub feature: String,
    pub reason: String,
}

/// How a pod is captured. Times are seconds since 1970, absent where that has not been seen.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default, rename_all(deserialize = "camelCase"))]
pub struct CapturedPod {
    pub uid: String,
    pub back_end: Option<String>,
    pub captured_since: Option<u64>,
    pub verified: Option<u64>,
    pub repairs: u64,
    pub connections_captured: u64,
    pub connections_older: u64,
    /// Not captured any more; the captured connections are the last ones.
    pub draining: bool,
    /// Packets that the fence refused, by direction.
    pub fence: BTreeMap<String, u64>,
    /// SYNs dropped because no listener of the proxy stood.
    pub no_listener: u64,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Version {
    pub version: String,
}

/// One identity's certificate on a node.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Certificate {
    pub identity: String,
    /// The leaf first; empty where there is none yet.
    pub cert_chain: Vec<Link>,
    pub last_error: Option<String>,
}

impl Certificate {
    pub fn leaf(&self) -> Option<Leaf> {
        let first = self.cert_chain.first()?;
        Some(Leaf {
            valid_from: first.valid_from?,
            expiration_time: first.expiration_time?,
            generation: first.generation,
        })
    }
}

/// One certificate of a chain. Of those above the leaf only the text may be told.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Link {
    pub valid_from: Option<When>,
    pub expiration_time: Option<When>,
    pub generation: u64,
}

#[derive(Clone, Copy, Debug)]
pub struct Leaf {
    pub valid_from: When,
    pub expiration_time: When,
    pub generation: u64,
}

/// A pod in the proxy's hands.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct PodState {
    /// `Up` or `Pending`.
    pub state: String,
    pub reason: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ProxyFacts {
    pub bundle: Bundle,
    /// What it is not ready for, one sentence each.
    pub waiting_for: Vec<String>,
    /// It holds a part of the cluster.
    pub on_demand: Option<OnDemand>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct OnDemand {
    /// What it has asked for and keeps up to date.
    pub lookups: u64,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Bundle {
    pub sequence: u64,
    pub roots: usize,
}

/// A moment, RFC 3339 on the wire.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct When(pub SystemTime);

impl When {
    /// How long until then; nothing once it is past.
    pub fn left(self, now: SystemTime) -> Duration {
        self.0.duration_since(now).unwrap_or_default()
    }

    /// How long since then.
    pub fn since(self, now: SystemTime) -> Duration {
        now.duration_since(self.0).unwrap_or_default()
    }
}

impl FromStr for When {
    type Err = TimestampError;

    fn from_str(text: &str) -> Result<Self, TimestampError> {
        SystemTime::try_from(text.parse::<Timestamp>()?).map(Self)
    }
}

impl<'de> Deserialize<'de> for When {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse()
            .map_err(|_| serde::de::Error::custom(format!("{text:?} is not a time (RFC 3339)")))
    }
}

impl Serialize for When {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&crate::output::utc(self.0))
    }
}
