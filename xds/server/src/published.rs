// SPDX-License-Identifier: Apache-2.0
use crate::found_by::{self, Borrowed, ByAddress, FoundBy};
use crate::{Snapshot, encode};
use bytes::Bytes;
use podveil_model::{Epoch, MeshConfig, Service, Stage, Workload};
use podveil_policy::Policy;
use podveil_proto::envoy::service::discovery::v3::Resource;
use podveil_proto::type_url;
use prost::Message;
use prost_types::Any;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write;
use std::sync::{Arc, OnceLock};

/// Name of the one resource of type `MeshConfig`.
const MESH: &str = "mesh";
/// Bytes of the content hash that make a version: a collision would hide a change from a node, so not fewer.
const VERSION_BYTES: usize = 16;
/// Sets that a subscriber may be behind before it has to begin a new stream: minutes of an ordinary cluster's changes.
pub(crate) const MAX_LOG_SETS: usize = 4096;
/// Names in the log; one is a pointer into the set. Enough for a large cluster's workloads to change several times.
const MAX_LOG_NAMES: usize = 1 << 18;
/// What something was before, kept for itself, weighs as much as so many names.
const BEFORE_WEIGHS: usize = 8;

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
    /// By name.
    entries: Vec<Arc<Entry>>,
    /// By what else they are asked for. Each is made when somebody first asks by it.
    by_address: OnceLock<ByAddress>,
    borrowed: OnceLock<Borrowed>,
    found_by: OnceLock<FoundBy>,
    /// Grows by one with each set that differs from the one before it.
    sequence: u64,
    /// What each of the last sets changed, this one's last: so that going on from any of them costs what has changed,
    /// however large the set is.
    log: VecDeque<Arc<[Change]>>,
}

/// A name that means something else in one set than in the set before it.
#[derive(Clone, Debug)]
struct Change {
    name: Arc<str>,
    /// What it was, where it is found by other [lookups](podveil_model::Lookup) now, or by none.
    before: Option<Source>,
    /// It was not there before, or is found by other lookups.
    moved: bool,
    /// It is a workload, and not only in whether connections are sent there.
    captured: bool,
}

/// What happened to a name since some set.
#[derive(Debug, Default)]
pub(crate) struct Changed<'a> {
    /// What it has been, where it is found by other lookups now.
    pub(crate) before: Vec<&'a Source>,
    /// It was not there in between, or is found by other lookups.
    pub(crate) moved: bool,
    /// See [`Workload::is_captured_like`].
    pub(crate) captured: bool,
}

#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) name: Arc<str>,
    pub(crate) version: String,
    /// The `Resource` of the wire, without aliases.
    pub(crate) wire: Bytes,
    pub(crate) source: Source,
}

/// What an entry was encoded from; an equal one is not encoded again.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Source {
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
        let mut named: Vec<(Arc<str>, Source)> =
            sources.map(|source| (source.name(), source)).collect();
        named.sort_by(|(one, _), (other, _)| one.cmp(other));
        let mut entries = Vec::with_capacity(named.len());
        let mut changed = Vec::new();
        let mut old = before.entries.iter().peekable();
        let mut named = named.into_iter().peekable();
        while let Some((name, source)) = named.next() {
            // Of two of one name the last counts.
            if named.peek().is_some_and(|(next, _)| *next == name) {
                continue;
            }
            while let Some(gone) = old.next_if(|old| old.name < name) {
                changed.push(Change::gone(gone));
            }
            let held = old.next_if(|old| old.name == name);
            let entry = match held {
                Some(held) if held.source == source => held.clone(),
                _ => {
                    let entry = Entry::new(name, source);
                    match held {
                        Some(held) if held.version == entry.version => held.clone(),
                        _ => {
                            changed.push(Change::of(&entry, held.map(|held| &held.source)));
                            Arc::new(entry)
                        }
                    }
                }
            };
            entries.push(entry);
        }
        changed.extend(old.map(Change::gone));
        if changed.is_empty() {
            return before.clone();
        }
        let mut log = before.log.clone();
        log.push_back(changed.into());
        let weight = |set: &Arc<[Change]>| set.iter().map(Change::weight).sum::<usize>();
        let mut all: usize = log.iter().map(weight).sum();
        while log.len() > MAX_LOG_SETS || all > MAX_LOG_NAMES {
            all -= log.pop_front().map_or(all, |oldest| weight(&oldest));
        }
        Arc::new(Self {
            entries,
            by_address: OnceLock::new(),
            borrowed: OnceLock::new(),
            found_by: OnceLock::new(),
            sequence: before.sequence + 1,
            log,
        })
    }

    pub(crate) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The names that may mean something else than in the set of this sequence, each once; `None` if that was too long ago.
    pub(crate) fn changed_since(&self, sequence: u64) -> Option<BTreeMap<&Arc<str>, Changed<'_>>> {
        let behind = usize::try_from(self.sequence.checked_sub(sequence)?).ok()?;
        let known = self.log.len().checked_sub(behind)?;
        let mut changed: BTreeMap<_, Changed<'_>> = BTreeMap::new();
        for change in self.log.iter().skip(known).flat_map(|set| set.iter()) {
            let one = changed.entry(&change.name).or_default();
            one.before.extend(&change.before);
            one.moved |= change.moved;
            one.captured |= change.captured;
        }
        Some(changed)
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Arc<Entry>> {
        let place = (self.entries).binary_search_by(|entry| (*entry.name).cmp(name));
        self.entries.get(place.ok()?)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<Entry>> {
        self.entries.iter()
    }

    pub(crate) fn by_address(&self) -> &ByAddress {
        (self.by_address).get_or_init(|| found_by::by_address(&self.entries))
    }

    pub(crate) fn borrowed(&self) -> &Borrowed {
        (self.borrowed).get_or_init(|| found_by::borrowed(&self.entries))
    }

    pub(crate) fn found_by(&self) -> &FoundBy {
        self.found_by.get_or_init(|| FoundBy::new(&self.entries))
    }
}

impl Change {
    fn weight(&self) -> usize {
        1 + BEFORE_WEIGHS * usize::from(self.before.is_some())
    }

    fn of(entry: &Entry, held: Option<&Source>) -> Self {
        let before = held.filter(|held| !held.is_found_like(&entry.source));
        Self {
            name: entry.name.clone(),
            moved: held.is_none() || before.is_some(),
            before: before.cloned(),
            captured: match held {
                Some(held) => !held.is_captured_like(&entry.source),
                None => entry.source.is_workload(),
            },
        }
    }

    fn gone(entry: &Arc<Entry>) -> Self {
        Self {
            name: entry.name.clone(),
            before: Some(entry.source.clone()),
            moved: true,
            captured: entry.source.is_workload(),
        }
    }
}

impl Entry {
    fn new(name: Arc<str>, source: Source) -> Self {
        let any = source.encode();
        let version = match source.unordered() {
            Some(unordered) => version(&unordered.encode()),
            None => version(&any),
        };
        let resource = Resource {
            version: version.clone(),
            resource: Some(any),
            name: name.to_string(),
            aliases: Vec::new(),
        };
        Self {
            name,
            version,
            wire: resource.encode_to_vec().into(),
            source,
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

    pub(crate) fn is_workload(&self) -> bool {
        matches!(self, Self::Workload(_))
    }

    /// Does a difference between them concern nobody who captures?
    fn is_captured_like(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Workload(one), Self::Workload(other)) => one.is_captured_like(other),
            (one, other) => !one.is_workload() && !other.is_workload(),
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
