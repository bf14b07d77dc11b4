// SPDX-License-Identifier: Apache-2.0
use crate::{Snapshot, encode};
use podveil_model::{Epoch, MeshConfig, Service, Stage, Workload};
use podveil_policy::Policy;
use podveil_proto::envoy::service::discovery::v3::Resource;
use podveil_proto::type_url;
use prost_types::Any;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::net::IpAddr;
use std::sync::Arc;

/// Name of the one resource of type `MeshConfig`.
const MESH: &str = "mesh";
/// Bytes of the content hash that make a version: a collision would hide a change from a node, so not fewer.
const VERSION_BYTES: usize = 16;

/// The types served. The order is the order of sending: a policy should be there before the workload that names it.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Kind {
    MeshConfig,
    Authorization,
    Address,
}

impl Kind {
    pub(crate) fn type_url(self) -> &'static str {
        match self {
            Self::MeshConfig => type_url::MESH_CONFIG,
            Self::Authorization => type_url::AUTHORIZATION,
            Self::Address => type_url::ADDRESS,
        }
    }

    pub(crate) fn from_type_url(url: &str) -> Option<Self> {
        [Self::MeshConfig, Self::Authorization, Self::Address]
            .into_iter()
            .find(|kind| kind.type_url() == url)
    }
}

/// One snapshot in wire form. A set that did not change is the same `Arc` as in the snapshot before.
#[derive(Debug, Default)]
pub(crate) struct Published {
    pub(crate) number: u64,
    mesh: Arc<Set>,
    policies: Arc<Set>,
    addresses: Arc<Set>,
}

/// All resources of one type. An entry that did not change is the same `Arc` as before.
#[derive(Debug, Default)]
pub(crate) struct Set {
    entries: BTreeMap<Arc<str>, Arc<Entry>>,
    /// `/<ip>` to whoever has it: more than one while a replaced pod still terminates.
    by_address: HashMap<IpAddr, Vec<Arc<Entry>>>,
}

#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) name: Arc<str>,
    pub(crate) version: String,
    any: Any,
    source: Source,
}

/// What an entry was encoded from; an equal one is not encoded again.
#[derive(Clone, Debug, PartialEq)]
enum Source {
    Mesh(Arc<MeshConfig>),
    Policy(Arc<Policy>),
    Service(Arc<Service>),
    Workload(Arc<Workload>),
}

impl Published {
    /// The snapshot that follows `self`; `None` if it has the same content.
    pub(crate) fn next(&self, snapshot: Snapshot) -> Option<Self> {
        let workloads = snapshot.workloads.into_iter().map(Source::Workload);
        let services = snapshot.services.into_iter().map(Source::Service);
        let addresses = Set::next(&self.addresses, workloads.chain(services));
        let policies = snapshot.policies.into_iter().map(Source::Policy);
        let policies = Set::next(&self.policies, policies);
        let mesh = Set::next(&self.mesh, snapshot.mesh.into_iter().map(Source::Mesh));
        let changed = !Arc::ptr_eq(&addresses, &self.addresses)
            || !Arc::ptr_eq(&policies, &self.policies)
            || !Arc::ptr_eq(&mesh, &self.mesh)
            // The first snapshot counts even if it is empty: before it nothing is known, after it "nobody" is.
            || self.number == 0;
        changed.then_some(Self {
            number: self.number + 1,
            mesh,
            policies,
            addresses,
        })
    }

    pub(crate) fn set(&self, kind: Kind) -> &Arc<Set> {
        match kind {
            Kind::MeshConfig => &self.mesh,
            Kind::Authorization => &self.policies,
            Kind::Address => &self.addresses,
        }
    }
}

impl Set {
    fn next(before: &Arc<Self>, sources: impl Iterator<Item = Source>) -> Arc<Self> {
        let mut entries = BTreeMap::new();
        for source in sources {
            let name = source.name();
            let entry = match before.entries.get(&name) {
                Some(entry) if entry.source == source => entry.clone(),
                old => {
                    let entry = Entry::new(name.clone(), source);
                    match old {
                        Some(old) if old.version == entry.version => old.clone(),
                        _ => Arc::new(entry),
                    }
                }
            };
            entries.insert(name, entry);
        }
        let same = entries.len() == before.entries.len()
            && (entries.values().zip(before.entries.values())).all(|(a, b)| Arc::ptr_eq(a, b));
        if same {
            return before.clone();
        }
        let mut by_address: HashMap<IpAddr, Vec<Arc<Entry>>> = HashMap::new();
        for entry in entries.values() {
            for ip in entry.source.addresses() {
                by_address.entry(*ip).or_default().push(entry.clone());
            }
        }
        Arc::new(Self {
            entries,
            by_address,
        })
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Arc<Entry>> {
        self.entries.get(name)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<Entry>> {
        self.entries.values()
    }

    /// Whoever is meant by a name or by `/<ip>`.
    pub(crate) fn find(&self, key: &str) -> Vec<Arc<Entry>> {
        if let Some(entry) = self.entries.get(key) {
            return vec![entry.clone()];
        }
        let ip = key
            .strip_prefix('/')
            .and_then(|ip| ip.parse::<IpAddr>().ok());
        ip.and_then(|ip| self.by_address.get(&ip))
            .cloned()
            .unwrap_or_default()
    }
}

impl Entry {
    fn new(name: Arc<str>, source: Source) -> Self {
        let any = source.encode();
        Self {
            version: version(
                &source
                    .unordered()
                    .map_or_else(|| any.clone(), |one| one.encode()),
            ),
            name,
            any,
            source,
        }
    }

    pub(crate) fn resource(&self, aliases: Vec<String>) -> Resource {
        Resource {
            version: self.version.clone(),
            resource: Some(self.any.clone()),
            name: self.name.to_string(),
            aliases,
        }
    }
}

impl Source {
    fn name(&self) -> Arc<str> {
        match self {
            Self::Mesh(_) => MESH.into(),
            Self::Policy(policy) => policy.key.to_string().into(),
            Self::Service(service) => service.key.to_string().into(),
            Self::Workload(workload) => workload.uid.0.clone(),
        }
    }

    fn encode(&self) -> Any {
        match self {
            Self::Mesh(mesh) => encode::mesh_config(mesh),
            Self::Policy(policy) => encode::authorization(policy),
            Self::Service(service) => encode::service(service),
            Self::Workload(workload) => encode::workload(workload),
        }
    }

    /// The content whose hash is the version, where that is not all of it. When an epoch began to count differs between
    /// replicas and after a restart; of what is at rest it says nothing that anybody waits for.
    fn unordered(&self) -> Option<Self> {
        match self {
            Self::Mesh(mesh) => Some(Self::Mesh(Arc::new(MeshConfig {
                epoch: Epoch::default(),
                ..MeshConfig::clone(mesh)
            }))),
            Self::Workload(workload)
                if matches!(workload.stage, Stage::None | Stage::Mandatory) =>
            {
                Some(Self::Workload(Arc::new(Workload {
                    epoch: Epoch::default(),
                    ..Workload::clone(workload)
                })))
            }
            Self::Policy(_) | Self::Service(_) | Self::Workload(_) => None,
        }
    }

    fn addresses(&self) -> &[IpAddr] {
        match self {
            Self::Mesh(_) | Self::Policy(_) => &[],
            Self::Service(service) => &service.addresses,
            // A host-network pod's address is its node's.
            Self::Workload(workload) if workload.host_network => &[],
            Self::Workload(workload) => &workload.addresses,
        }
    }
}

/// The content's hash: the same on every replica and after a restart, so that a reconnecting node is sent only what
/// really differs.
fn version(any: &Any) -> String {
    let hash = Sha256::digest(&any.value);
    let mut text = String::with_capacity(2 * VERSION_BYTES);
    for byte in hash.iter().take(VERSION_BYTES) {
        let _ = write!(text, "{byte:02x}");
    }
    text
}
