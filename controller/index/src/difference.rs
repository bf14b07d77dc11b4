// SPDX-License-Identifier: Apache-2.0
//! What differs between two states of a cluster, where it is little: most changes of a large one are a pod that becomes ready,
//! or not, and the endpoints of its services that follow.

use foldhash::{HashMap, HashMapExt};
use podveil_model::{EndpointPorts, Uid};
use podveil_source::{Cluster, Pod, ServiceEntry, Target};
use std::sync::Arc;

/// Nothing else differs: who has which address, which services there are and what policies select is as before.
#[derive(Debug, Default)]
pub(crate) struct Difference<'a> {
    /// Those that are not as they were.
    pub pods: Vec<&'a Arc<Pod>>,
    /// Those that have other endpoints.
    pub services: Vec<Moved<'a>>,
}

/// A service whose endpoints are not those that they were.
#[derive(Debug)]
pub(crate) struct Moved<'a> {
    pub service: &'a ServiceEntry,
    /// By pod, what it has now; `None`: it stands behind the service no more.
    pub pods: HashMap<&'a Uid, Option<&'a EndpointPorts>>,
}

impl<'a> Difference<'a> {
    /// `None`: more than that differs, or may.
    pub(crate) fn between(before: &'a Cluster, now: &'a Cluster) -> Option<Self> {
        if !now.same_surroundings(before)
            || now.pods.len() != before.pods.len()
            || now.services.len() != before.services.len()
        {
            return None;
        }
        let mut difference = Self::default();
        for (before, now) in before.pods.iter().zip(&now.pods) {
            if Arc::ptr_eq(before, now) {
                continue;
            }
            if !claims_the_same(before, now) {
                return None;
            }
            difference.pods.push(now);
        }
        for (before, now) in before.services.iter().zip(&now.services) {
            if !Arc::ptr_eq(before, now) {
                difference.services.push(Moved::between(before, now)?);
            }
        }
        Some(difference)
    }
}

impl<'a> Moved<'a> {
    fn between(before: &'a ServiceEntry, now: &'a ServiceEntry) -> Option<Self> {
        if !now.same_but_for_endpoints(before) {
            return None;
        }
        let (before, behind) = (pods_behind(before)?, pods_behind(now)?);
        let mut pods = HashMap::new();
        for (uid, ports) in &behind {
            if before.get(uid) != Some(ports) {
                pods.insert(*uid, Some(*ports));
            }
        }
        let gone = before.keys().filter(|uid| !behind.contains_key(*uid));
        pods.extend(gone.map(|uid| (*uid, None)));
        Some(Self { service: now, pods })
    }

    /// All that stand behind it now.
    pub(crate) fn pods_behind(&self) -> impl Iterator<Item = &'a Uid> {
        (self.service.endpoints.iter()).filter_map(|endpoint| match &endpoint.target {
            Target::Pod(uid) => Some(uid),
            Target::Address(_) | Target::Name(_) => None,
        })
    }
}

/// `None` where others stand behind it than pods that are named by their UID, or one of them twice.
fn pods_behind(service: &ServiceEntry) -> Option<HashMap<&Uid, &EndpointPorts>> {
    let mut pods = HashMap::with_capacity(service.endpoints.len());
    for endpoint in &service.endpoints {
        let Target::Pod(uid) = &endpoint.target else {
            return None;
        };
        if pods.insert(uid, &endpoint.ports).is_some() {
            return None;
        }
    }
    Some(pods)
}

/// Has it the same name, and the same say in who owns an address?
fn claims_the_same(before: &Pod, now: &Pod) -> bool {
    before.uid == now.uid
        && before.namespace == now.namespace
        && before.name == now.name
        && before.node == now.node
        && before.addresses == now.addresses
        && before.phase == now.phase
        && before.host_network == now.host_network
        && before.created == now.created
        && before.service_account == now.service_account
}
