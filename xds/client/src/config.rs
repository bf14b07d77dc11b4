// SPDX-License-Identifier: Apache-2.0
use podveil_proto::envoy::service::discovery::v3::Node;
use prost_types::{Struct, Value, value::Kind};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

/// Who we are, as control planes of this kind expect to hear it.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct NodeInfo {
    /// `NODE_NAME`: what `Workload.node` says of workloads here (Cilium's agent: the node's address).
    pub node: String,
    /// Our own pod.
    pub name: String,
    pub namespace: String,
    pub instance_ip: Option<IpAddr>,
    /// Further metadata, e.g. every `ISTIO_META_*` with its prefix stripped.
    pub metadata: BTreeMap<String, String>,
}

impl NodeInfo {
    /// The node of the first request of each type: id
    /// `ztunnel~<ip>~<pod>.<namespace>~<namespace>.svc.cluster.local`, which istiod takes the proxy's type from.
    pub(crate) fn to_wire(&self) -> Node {
        let ip = self
            .instance_ip
            .unwrap_or(IpAddr::V4(Ipv4Addr::new(1, 1, 1, 1)));
        let string = |value: &str| Value {
            kind: Some(Kind::StringValue(value.to_owned())),
        };
        let mut fields: BTreeMap<String, Value> = self
            .metadata
            .iter()
            .map(|(key, value)| (key.clone(), string(value)))
            .collect();
        for (key, value) in [
            ("NAME", self.name.as_str()),
            ("NAMESPACE", self.namespace.as_str()),
            ("NODE_NAME", self.node.as_str()),
            ("INSTANCE_IPS", ip.to_string().as_str()),
        ] {
            fields.insert(key.to_owned(), string(value));
        }
        Node {
            id: format!(
                "ztunnel~{ip}~{name}.{namespace}~{namespace}.svc.cluster.local",
                name = self.name,
                namespace = self.namespace
            ),
            cluster: String::new(),
            metadata: Some(Struct { fields }),
        }
    }
}

/// What to subscribe to, and the bounds.
#[derive(Clone, Debug)]
pub struct Config {
    pub node: NodeInfo,
    /// Subscribe to `podveil.node.v1.MeshConfig` too. Off for Cilium's agent and istiod, which end the stream on a
    /// type they do not know.
    pub mesh_config: bool,
    /// Take only the workloads and services that [`Demand`](crate::Demand) asks for, instead of all of them, and keep those
    /// up to date until they are forgotten.
    pub on_demand: bool,
    /// Sent with each stream, e.g. `clusterid`.
    pub headers: BTreeMap<String, String>,
    /// Read before each stream and sent as `authorization: Bearer`. `None` where the channel proves who we are.
    pub token_path: Option<PathBuf>,
    /// First pause after a lost stream. 10 ms: what peers use, so a restarted control plane is found quickly.
    pub backoff_min: Duration,
    /// Longest pause: each doubles up to here. 15 s: what peers use.
    pub backoff_max: Duration,
    /// A question without an answer may be asked again after this long.
    pub ask_timeout: Duration,
    /// Open questions, and in `on_demand` also the answered ones that are kept up to date.
    pub max_asked: usize,
    /// Resources held of one type; one more is rejected. 500 000 workloads are far beyond a cluster's limits.
    pub max_resources: usize,
}

impl Config {
    /// Everything the Podveil controller serves, without conditions.
    pub fn new(node: NodeInfo) -> Self {
        Self {
            node,
            mesh_config: true,
            on_demand: false,
            headers: BTreeMap::new(),
            token_path: None,
            backoff_min: Duration::from_millis(10),
            backoff_max: Duration::from_secs(15),
            ask_timeout: Duration::from_secs(5),
            max_asked: 4096,
            max_resources: 500_000,
        }
    }
}
