// SPDX-License-Identifier: Apache-2.0
use crate::bounded::{Bound, Bounded};
use podveil_identity::{KubernetesName, WorkloadIdentity};
use podveil_model::{
    Decision, Epoch, Health, Lookup, MeshConfig, Service, ServiceKey, Uid, Workload,
};
use podveil_policy::{Policy, PolicySet};
use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// Removed workloads whose epoch is remembered, so that a lagging replica cannot bring an older state back.
const TOMBSTONES: usize = 8192;
/// Workloads of this node whose addresses the node has told.
const LOCALS: usize = 4096;
/// Workloads that are there and not held any more, whose last decision is remembered: as many as a large cluster has. Beyond
/// it the oldest is forgotten, and of that one a lagging replica would be believed.
const LET_GO: usize = 32_768;
/// Addresses that the control plane has said belong to nobody.
const NEGATIVES: usize = 16384;

/// One state of everything known about the cluster. Cheap to clone: the tables are shared until they change.
///
/// INVARIANT: `addresses`, `endpoints` and `host_ports` hold exactly the workloads of `workloads`, `service_addresses` and
/// `node_ports` exactly the services of `services`.
#[derive(Clone, Debug, Default)]
pub struct View {
    workloads: Arc<HashMap<Uid, Arc<Workload>>>,
    addresses: Arc<HashMap<IpAddr, Vec<Arc<Workload>>>>,
    services: Arc<HashMap<ServiceKey, Arc<Service>>>,
    service_addresses: Arc<HashMap<IpAddr, Vec<Arc<Service>>>>,
    endpoints: Arc<HashMap<ServiceKey, Endpoints>>,
    node_ports: Arc<HashMap<u16, Arc<Service>>>,
    host_ports: Arc<HashMap<(KubernetesName, u16), Arc<Workload>>>,
    /// The nodes' own addresses, as `mesh` says them.
    node_addresses: Arc<HashMap<IpAddr, KubernetesName>>,
    policies: Arc<PolicySet>,
    mesh: Option<Arc<MeshConfig>>,
    tombstones: Arc<Bounded<Uid, Epoch>>,
    negatives: Arc<Bounded<IpAddr, ()>>,
    /// Held on demand: what has been asked for and answered, and is kept up to date. `None`: everything is.
    told: Option<Arc<HashSet<Lookup>>>,
    /// What is not held any more although it is there. When it comes back, a newer decision that was held counts.
    let_go: Arc<Bounded<Uid, Decision>>,
    /// Addresses by the node's word, for as long as the control plane has none of the workload.
    locals: Arc<Bounded<Uid, Vec<IpAddr>>>,
    /// How many of `workloads` are at a stage that waits for nodes.
    waiting: usize,
    synced: bool,
}

/// The workloads behind a service, those that get connections apart from those that do not, so that choosing one does
/// not walk over them all.
#[derive(Clone, Debug, Default)]
pub(crate) struct Endpoints {
    pub healthy: Vec<Arc<Workload>>,
    /// Unhealthy ones: used only where the service publishes them.
    pub unready: Vec<Arc<Workload>>,
    /// Terminating ones: used only where there is no other.
    pub terminating: Vec<Arc<Workload>>,
}

impl Endpoints {
    fn of(&mut self, health: Health) -> &mut Vec<Arc<Workload>> {
        match health {
            Health::Healthy => &mut self.healthy,
            Health::Unhealthy => &mut self.unready,
            Health::Terminating => &mut self.terminating,
        }
    }

    fn is_empty(&self) -> bool {
        self.healthy.is_empty() && self.unready.is_empty() && self.terminating.is_empty()
    }
}

/// What was done with a state of a workload.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Insert {
    Applied,
    /// A newer decision is held and stays, or was held before the object was removed, which stays removed.
    Older {
        held: Epoch,
    },
}

impl View {
    /// One that will hold no more than is asked for.
    pub fn on_demand() -> Self {
        Self {
            told: Some(Arc::default()),
            ..Self::default()
        }
    }

    /// Puts a state of a workload in. Where a newer decision about it is held, that stays, and the rest is taken; one
    /// that was removed comes back by a state at least as new only.
    pub fn insert_workload(&mut self, mut workload: Arc<Workload>) -> Insert {
        let mut insert = Insert::Applied;
        let held = self.workloads.get(&workload.uid);
        let decided = held.map(|held| held.epoch);
        let remembered = self.let_go.get(&workload.uid);
        if let Some(epoch) = decided.or_else(|| remembered.map(|one| one.epoch)) {
            if workload.epoch < epoch {
                insert = Insert::Older { held: epoch };
                let decision = held.map(|held| held.decision());
                let decision = decision.or_else(|| remembered.cloned());
                workload = Arc::new(decision.map_or_else(
                    || Workload::clone(&workload),
                    |decision| workload.decided_as(decision),
                ));
            }
        } else if let Some(held) = self.tombstones.get(&workload.uid)
            && workload.epoch < *held
        {
            return Insert::Older { held: *held };
        }
        if let Some(local) = self.locals.get(&workload.uid)
            && workload.addresses.is_empty()
            && !workload.host_network
        {
            workload = Arc::new(Workload {
                addresses: local.clone(),
                ..Workload::clone(&workload)
            });
        }
        self.unlink_workload(&workload.uid);
        if self.tombstones.get(&workload.uid).is_some() {
            Arc::make_mut(&mut self.tombstones).remove(&workload.uid);
        }
        if self.let_go.get(&workload.uid).is_some() {
            Arc::make_mut(&mut self.let_go).remove(&workload.uid);
        }
        // A host-network pod owns no address (its node's traffic is not its own), nor does an endpoint without a pod.
        if !workload.host_network {
            for ip in unique(&workload.addresses) {
                let at = Arc::make_mut(&mut self.addresses).entry(ip).or_default();
                at.push(workload.clone());
                at.sort_by(|a, b| precedence(b).cmp(&precedence(a)));
                self.forget_negative(ip);
            }
        }
        for key in workload.services.keys() {
            let endpoints = Arc::make_mut(&mut self.endpoints)
                .entry(key.clone())
                .or_default();
            endpoints.of(workload.health).push(workload.clone());
        }
        for port in workload.host_ports.keys() {
            Arc::make_mut(&mut self.host_ports)
                .insert((workload.node.clone(), *port), workload.clone());
        }
        self.waiting += usize::from(workload.stage.waits_for_nodes());
        Arc::make_mut(&mut self.workloads).insert(workload.uid.clone(), workload);
        insert
    }

    /// The node says which addresses a workload of its own has: a pod that starts sends and is sent to before the control
    /// plane has heard of them. Where that tells any, they go before these.
    pub fn set_local_addresses(&mut self, uid: Uid, addresses: Vec<IpAddr>) {
        let held = self.workloads.get(&uid).cloned();
        let told_here = self.locals.get(&uid);
        // Those of a sandbox before are as good as none.
        let bare = held.filter(|held| {
            held.addresses.is_empty() || told_here.is_some_and(|told| *told == held.addresses)
        });
        Arc::make_mut(&mut self.locals).insert(uid, addresses);
        if let Some(bare) = bare {
            let addresses = Vec::new();
            let _same_epoch = self.insert_workload(Arc::new(Workload {
                addresses,
                ..Workload::clone(&bare)
            }));
        }
    }

    pub fn insert_service(&mut self, service: Arc<Service>) {
        self.unlink_service(&service.key);
        for ip in unique(&service.addresses) {
            let at = Arc::make_mut(&mut self.service_addresses)
                .entry(ip)
                .or_default();
            at.push(service.clone());
            at.sort_by(|a, b| a.key.cmp(&b.key));
            self.forget_negative(ip);
        }
        for port in service.node_ports.keys() {
            Arc::make_mut(&mut self.node_ports).insert(*port, service.clone());
        }
        Arc::make_mut(&mut self.services).insert(service.key.clone(), service);
    }

    /// Does not hold any more what the wire names, although it is there.
    pub fn let_go(&mut self, name: &str) {
        let uid = Uid::from(name);
        match self.workloads.get(&uid).cloned() {
            Some(workload) => {
                self.unlink_workload(&uid);
                Arc::make_mut(&mut self.let_go).insert(uid, workload.decision());
            }
            None => {
                self.remove_address(name);
            }
        }
    }

    /// Removes what the wire names: a workload's UID or a service's `<namespace>/<hostname>`.
    pub fn remove_address(&mut self, name: &str) -> bool {
        let uid = Uid::from(name);
        if let Some(workload) = self.workloads.get(&uid).cloned() {
            self.unlink_workload(&uid);
            Arc::make_mut(&mut self.locals).remove(&uid);
            Arc::make_mut(&mut self.tombstones).insert(uid, workload.epoch);
            return true;
        }
        let Some((namespace, hostname)) = name.split_once('/') else {
            return false;
        };
        let Ok(namespace) = namespace.parse() else {
            return false;
        };
        self.unlink_service(&ServiceKey {
            namespace,
            hostname: hostname.into(),
        })
    }

    pub fn insert_policy(&mut self, name: Arc<str>, policy: Arc<Policy>) {
        Arc::make_mut(&mut self.policies).insert(name, policy);
    }

    pub fn remove_policy(&mut self, name: &str) -> bool {
        Arc::make_mut(&mut self.policies).remove(name)
    }

    /// Puts the mesh's configuration in, unless a newer one is held.
    pub fn insert_mesh(&mut self, mesh: Arc<MeshConfig>) -> Insert {
        match &self.mesh {
            Some(held) if mesh.epoch < held.epoch => Insert::Older { held: held.epoch },
            held => {
                if held.as_ref().is_none_or(|held| held.nodes != mesh.nodes) {
                    let nodes = mesh.nodes.iter();
                    let addresses = nodes
                        .flat_map(|(node, ips)| ips.iter().map(move |ip| (*ip, node.clone())))
                        .collect();
                    self.node_addresses = Arc::new(addresses);
                }
                self.mesh = Some(mesh);
                Insert::Applied
            }
        }
    }

    /// Held on demand: all that there is by this lookup is in, and will be kept up to date.
    pub fn set_told(&mut self, lookup: Lookup) {
        if let Some(told) = &mut self.told {
            Arc::make_mut(told).insert(lookup);
        }
    }

    /// Held on demand: it is not kept up to date any more.
    pub fn forget(&mut self, lookup: &Lookup) {
        if let Some(told) = &mut self.told {
            Arc::make_mut(told).remove(lookup);
        }
    }

    /// The control plane says that nobody has this address. Holds until somebody is seen with it.
    pub fn insert_negative(&mut self, ip: IpAddr) {
        if self.told.is_some() {
            self.set_told(Lookup::Address(ip));
        } else if !self.addresses.contains_key(&ip) && !self.service_addresses.contains_key(&ip) {
            Arc::make_mut(&mut self.negatives).insert(ip, ());
        }
    }

    /// The first state of all addresses is in.
    pub fn set_synced(&mut self) {
        self.synced = true;
    }

    pub fn is_synced(&self) -> bool {
        self.synced
    }

    pub fn by_uid(&self, uid: &Uid) -> Option<&Arc<Workload>> {
        self.workloads.get(uid)
    }

    /// The workload that has this address: where several claim it, one that is not on its way out, the newest first.
    pub fn by_address(&self, ip: IpAddr) -> Option<&Arc<Workload>> {
        self.all_by_address(ip).first()
    }

    /// All workloads that claim this address, the likeliest first.
    pub fn all_by_address(&self, ip: IpAddr) -> &[Arc<Workload>] {
        self.addresses.get(&ip).map_or(&[], Vec::as_slice)
    }

    /// The workload at this address that has this identity.
    pub fn by_address_and_identity(
        &self,
        ip: IpAddr,
        identity: &WorkloadIdentity,
    ) -> Option<&Arc<Workload>> {
        self.all_by_address(ip)
            .iter()
            .find(|workload| workload.identity == *identity)
    }

    /// Is a decision about it known, as of this epoch or a newer one? From then on no older one is believed.
    pub fn is_decided(&self, uid: &Uid, epoch: Epoch) -> bool {
        let held = self.workloads.get(uid).map(|held| held.epoch);
        let remembered = || self.let_go.get(uid).map(|one| one.epoch);
        held.or_else(remembered).is_some_and(|known| known >= epoch)
    }

    pub fn service(&self, key: &ServiceKey) -> Option<&Arc<Service>> {
        self.services.get(key)
    }

    pub fn services_at(&self, ip: IpAddr) -> &[Arc<Service>] {
        self.service_addresses.get(&ip).map_or(&[], Vec::as_slice)
    }

    pub(crate) fn endpoints(&self, key: &ServiceKey) -> Option<&Endpoints> {
        self.endpoints.get(key)
    }

    /// The node that has this address.
    pub fn node_at(&self, ip: IpAddr) -> Option<&KubernetesName> {
        self.node_addresses.get(&ip)
    }

    /// The service that every node's port leads to, and its own port.
    pub fn by_node_port(&self, port: u16) -> Option<(&Arc<Service>, u16)> {
        let service = self.node_ports.get(&port)?;
        Some((service, *service.node_ports.get(&port)?))
    }

    /// The workload that this node's port leads to, and its own port.
    pub fn by_host_port(&self, node: &KubernetesName, port: u16) -> Option<(&Arc<Workload>, u16)> {
        let workload = self.host_ports.get(&(node.clone(), port))?;
        Some((workload, *workload.host_ports.get(&port)?))
    }

    /// Has the control plane said that nobody has this address?
    pub fn is_negative(&self, ip: IpAddr) -> bool {
        match &self.told {
            None => self.negatives.get(&ip).is_some(),
            Some(told) => {
                told.contains(&Lookup::Address(ip))
                    && !self.addresses.contains_key(&ip)
                    && !self.service_addresses.contains_key(&ip)
            }
        }
    }

    pub fn is_on_demand(&self) -> bool {
        self.told.is_some()
    }

    /// Held on demand: how much has been asked for, answered, and is kept up to date.
    pub fn told(&self) -> usize {
        self.told.as_ref().map_or(0, |told| told.len())
    }

    /// Held on demand: by what an answer about this destination must have been asked for. Nothing where everything is held.
    pub fn lookups(&self, destination: SocketAddr) -> Vec<Lookup> {
        let (ip, port) = (destination.ip(), destination.port());
        let mut lookups = self.lookup_of_peer(ip);
        if self.is_on_demand()
            && let Some(node) = self.node_at(ip)
        {
            lookups.push(Lookup::HostPort(node.clone(), port));
            lookups.push(Lookup::NodePort(port));
        }
        lookups
    }

    /// The same for an answer about whoever has this address.
    pub fn lookup_of_peer(&self, ip: IpAddr) -> Vec<Lookup> {
        let may_be_known = || (self.mesh.as_ref()).is_none_or(|mesh| mesh.may_be_known(ip));
        (self.is_on_demand() && may_be_known())
            .then_some(Lookup::Address(ip))
            .into_iter()
            .collect()
    }

    /// Is everything held that is known by these?
    pub fn are_told(&self, lookups: &[Lookup]) -> bool {
        let told = |told: &Arc<HashSet<Lookup>>| lookups.iter().all(|lookup| told.contains(lookup));
        self.told.as_ref().is_none_or(told)
    }

    /// May somebody have this address whom we have not been told of?
    pub fn is_unheard_of(&self, ip: IpAddr) -> bool {
        match self.is_on_demand() {
            true => !self.are_told(&self.lookup_of_peer(ip)),
            false => {
                self.all_by_address(ip).is_empty()
                    && self.may_be_inside(ip)
                    && !self.is_negative(ip)
            }
        }
    }

    pub fn policies(&self) -> &Arc<PolicySet> {
        &self.policies
    }

    pub fn mesh(&self) -> Option<&Arc<MeshConfig>> {
        self.mesh.as_ref()
    }

    /// May this address be a pod's or a service's? Yes as long as nothing is known.
    pub fn may_be_inside(&self, ip: IpAddr) -> bool {
        self.mesh.as_ref().is_none_or(|mesh| mesh.may_be_inside(ip))
    }

    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    /// Is a workload at a stage that waits for nodes?
    pub fn waits_for_nodes(&self) -> bool {
        self.waiting > 0
    }

    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    fn forget_negative(&mut self, ip: IpAddr) {
        if self.negatives.get(&ip).is_some() {
            Arc::make_mut(&mut self.negatives).remove(&ip);
        }
    }

    fn unlink_workload(&mut self, uid: &Uid) {
        let Some(workload) = self.workloads.get(uid).cloned() else {
            return;
        };
        Arc::make_mut(&mut self.workloads).remove(uid);
        self.waiting -= usize::from(workload.stage.waits_for_nodes());
        let addresses = Arc::make_mut(&mut self.addresses);
        for ip in &workload.addresses {
            if let Some(at) = addresses.get_mut(ip) {
                at.retain(|other| other.uid != *uid);
                if at.is_empty() {
                    addresses.remove(ip);
                }
            }
        }
        for port in workload.host_ports.keys() {
            let place = (workload.node.clone(), *port);
            if (self.host_ports.get(&place)).is_some_and(|other| other.uid == *uid) {
                Arc::make_mut(&mut self.host_ports).remove(&place);
            }
        }
        let endpoints = Arc::make_mut(&mut self.endpoints);
        for key in workload.services.keys() {
            if let Some(behind) = endpoints.get_mut(key) {
                behind.of(workload.health).retain(|other| other.uid != *uid);
                if behind.is_empty() {
                    endpoints.remove(key);
                }
            }
        }
    }

    fn unlink_service(&mut self, key: &ServiceKey) -> bool {
        let Some(service) = self.services.get(key).cloned() else {
            return false;
        };
        Arc::make_mut(&mut self.services).remove(key);
        let addresses = Arc::make_mut(&mut self.service_addresses);
        for ip in &service.addresses {
            if let Some(at) = addresses.get_mut(ip) {
                at.retain(|other| other.key != *key);
                if at.is_empty() {
                    addresses.remove(ip);
                }
            }
        }
        for port in service.node_ports.keys() {
            if (self.node_ports.get(port)).is_some_and(|other| other.key == *key) {
                Arc::make_mut(&mut self.node_ports).remove(port);
            }
        }
        true
    }
}

fn unique(addresses: &[IpAddr]) -> impl Iterator<Item = IpAddr> {
    let mut seen = HashSet::new();
    addresses.iter().copied().filter(move |ip| seen.insert(*ip))
}

/// An address may pass from one pod to the next before the first is known to be gone.
fn precedence(workload: &Workload) -> (bool, Epoch, &Uid) {
    (
        workload.health != Health::Terminating,
        workload.epoch,
        &workload.uid,
    )
}

impl Bound for Epoch {
    const CAPACITY: usize = TOMBSTONES;
}

impl Bound for Decision {
    const CAPACITY: usize = LET_GO;
}

impl Bound for Vec<IpAddr> {
    const CAPACITY: usize = LOCALS;
}

impl Bound for () {
    const CAPACITY: usize = NEGATIVES;
}
