// SPDX-License-Identifier: Apache-2.0
//! By what a resource is asked for, and what is meant by what is asked for.

use crate::published::{Changed, Entry, Set, Source};
use podveil_identity::KubernetesName;
use podveil_model::{Lookup, Workload};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

/// The entries of one set by their addresses; more than one while a replaced pod still terminates.
pub(crate) type ByAddress = HashMap<IpAddr, Vec<Arc<Entry>>>;

/// Names of services with an endpoint that has this address and does not own it: whoever owns it is reached by them.
pub(crate) type Borrowed = HashMap<IpAddr, BTreeSet<String>>;

/// The entries of one set by each lookup but their names and addresses: a client that takes everything never asks by these, and
/// one that follows a change needs them only where something moves.
#[derive(Debug, Default)]
pub(crate) struct FoundBy {
    nodes: HashMap<KubernetesName, Vec<Arc<Entry>>>,
    node_ports: HashMap<u16, Vec<Arc<Entry>>>,
    host_ports: HashMap<(KubernetesName, u16), Vec<Arc<Entry>>>,
    /// By the name of the service that they are behind.
    endpoints: HashMap<String, Vec<Arc<Entry>>>,
}

pub(crate) fn by_address(entries: &[Arc<Entry>]) -> ByAddress {
    let mut by_address = ByAddress::new();
    for entry in entries {
        for ip in entry.source.own_addresses() {
            by_address.entry(*ip).or_default().push(entry.clone());
        }
    }
    by_address
}

pub(crate) fn borrowed(entries: &[Arc<Entry>]) -> Borrowed {
    let mut borrowed = Borrowed::new();
    for borrower in entries.iter().filter_map(|entry| entry.source.borrower()) {
        for ip in &borrower.addresses {
            let by = borrowed.entry(*ip).or_default();
            by.extend(borrower.services.keys().map(ToString::to_string));
        }
    }
    borrowed
}

impl FoundBy {
    pub(crate) fn new(entries: &[Arc<Entry>]) -> Self {
        let mut found_by = Self::default();
        for entry in entries {
            match &entry.source {
                Source::Mesh(_) | Source::Policy(_) => {}
                Source::Service(service) => {
                    for port in service.node_ports.keys() {
                        found_by
                            .node_ports
                            .entry(*port)
                            .or_default()
                            .push(entry.clone());
                    }
                }
                Source::Workload(workload) => found_by.add(entry, workload),
            }
        }
        found_by
    }

    fn add(&mut self, entry: &Arc<Entry>, workload: &Workload) {
        let services = workload.services.keys().map(ToString::to_string);
        for service in services {
            self.endpoints
                .entry(service)
                .or_default()
                .push(entry.clone());
        }
        let node = &workload.node;
        self.nodes
            .entry(node.clone())
            .or_default()
            .push(entry.clone());
        for port in workload.host_ports.keys() {
            let place = (node.clone(), *port);
            self.host_ports
                .entry(place)
                .or_default()
                .push(entry.clone());
        }
    }
}

impl Set {
    /// Whoever is meant by a name or another lookup.
    pub(crate) fn find(&self, name: &str) -> Vec<Arc<Entry>> {
        if let Some(entry) = self.get(name) {
            return vec![entry.clone()];
        }
        let Some(lookup) = Lookup::parse(name) else {
            return Vec::new();
        };
        let found_by = || self.found_by();
        let found = match &lookup {
            Lookup::Address(ip) => self.by_address().get(ip),
            Lookup::Node(node) => found_by().nodes.get(node),
            Lookup::NodePort(port) => found_by().node_ports.get(port),
            Lookup::HostPort(node, port) => found_by().host_ports.get(&(node.clone(), *port)),
            Lookup::Service(_) | Lookup::Workload(_) => None,
        };
        found.cloned().unwrap_or_default()
    }

    /// The same, and all that is reached through the services among them: what one who takes nothing else must know. Each
    /// once.
    pub(crate) fn find_whole(&self, name: &str) -> BTreeMap<Arc<str>, Arc<Entry>> {
        let mut whole = BTreeMap::new();
        for entry in self.find(name) {
            for behind in self.behind(&entry) {
                whole.insert(behind.name.clone(), behind.clone());
            }
            whole.insert(entry.name.clone(), entry);
        }
        whole
    }

    fn behind(&self, entry: &Entry) -> impl Iterator<Item = &Arc<Entry>> {
        let service = matches!(entry.source, Source::Service(_)).then(|| self.found_by());
        let endpoints = service.and_then(|found_by| found_by.endpoints.get(&*entry.name));
        let endpoints = || endpoints.into_iter().flatten();
        endpoints().chain(endpoints().flat_map(|endpoint| self.owners(endpoint)))
    }

    /// The workloads that own the addresses that an endpoint has and does not own.
    fn owners(&self, entry: &Entry) -> impl Iterator<Item = &Arc<Entry>> {
        let borrower = entry.source.borrower().into_iter();
        borrower
            .flat_map(|borrower| &borrower.addresses)
            .filter_map(|ip| self.by_address().get(ip))
            .flatten()
            .filter(|entry| entry.source.is_workload())
    }

    /// What every name of it is about by which a resource may have been asked for, its own included.
    pub(crate) fn names_of(&self, name: &str, source: &Source) -> BTreeSet<String> {
        self.names_then_and_now(name, source, &BTreeMap::new())
    }

    /// The same, by the names too that its services have had meanwhile.
    pub(crate) fn names_then_and_now(
        &self,
        name: &str,
        source: &Source,
        changed: &BTreeMap<&Arc<str>, Changed<'_>>,
    ) -> BTreeSet<String> {
        let mut names = source.own_names(name);
        let Source::Workload(workload) = source else {
            return names;
        };
        let mut services: BTreeSet<String> =
            workload.services.keys().map(ToString::to_string).collect();
        if !workload.host_network {
            let borrowed = self.borrowed();
            let borrowing = workload.addresses.iter().filter_map(|ip| borrowed.get(ip));
            services.extend(borrowing.flatten().cloned());
        }
        for service in &services {
            let before = changed.get(&Arc::from(service.as_str()));
            let before = before
                .into_iter()
                .flat_map(|change| &change.before)
                .copied();
            let now = self.get(service).map(|entry| &entry.source);
            for source in before.chain(now) {
                names.extend(source.own_names(service));
            }
        }
        names
    }
}

impl Source {
    /// The addresses that are its own: a host-network pod's are its node's.
    fn own_addresses(&self) -> &[IpAddr] {
        match self {
            Self::Service(service) => &service.addresses,
            Self::Workload(workload) if !workload.host_network => &workload.addresses,
            Self::Workload(_) | Self::Mesh(_) | Self::Policy(_) => &[],
        }
    }

    /// The names by which it is found itself, not through a service.
    pub(crate) fn own_names(&self, name: &str) -> BTreeSet<String> {
        let mut names = BTreeSet::from([name.to_owned()]);
        let mut add = |lookup: Lookup| names.insert(lookup.to_string());
        for ip in self.own_addresses() {
            add(Lookup::Address(*ip));
        }
        match self {
            Self::Mesh(_) | Self::Policy(_) => {}
            Self::Service(service) => {
                for port in service.node_ports.keys() {
                    add(Lookup::NodePort(*port));
                }
            }
            Self::Workload(workload) => {
                add(Lookup::Node(workload.node.clone()));
                for port in workload.host_ports.keys() {
                    add(Lookup::HostPort(workload.node.clone(), *port));
                }
            }
        }
        names
    }

    /// Are others found through it? A service's endpoints, and whoever owns an address that an endpoint borrows.
    pub(crate) fn leads_to_others(&self) -> bool {
        match self {
            Self::Mesh(_) | Self::Policy(_) => false,
            Self::Service(_) => true,
            Self::Workload(_) => self.borrower().is_some(),
        }
    }

    /// One behind services at addresses that it has and does not own.
    fn borrower(&self) -> Option<&Workload> {
        match self {
            Self::Workload(workload) => {
                (workload.host_network && !workload.services.is_empty()).then_some(workload)
            }
            Self::Mesh(_) | Self::Policy(_) | Self::Service(_) => None,
        }
    }

    /// Is it found by the same lookups as `other`?
    pub(crate) fn is_found_like(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Service(one), Self::Service(other)) => {
                one.addresses == other.addresses && one.node_ports == other.node_ports
            }
            (Self::Workload(one), Self::Workload(other)) => {
                one.addresses == other.addresses
                    && one.host_network == other.host_network
                    && one.node == other.node
                    && one.host_ports == other.host_ports
                    && (Arc::ptr_eq(&one.services, &other.services)
                        || one.services.keys().eq(other.services.keys()))
            }
            (Self::Mesh(_), Self::Mesh(_)) | (Self::Policy(_), Self::Policy(_)) => true,
            _ => false,
        }
    }
}
