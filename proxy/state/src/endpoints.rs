// SPDX-License-Identifier: Apache-2.0
//! Which endpoints of a service are offered to a client: always endpoints, never the service's address.

use crate::{Affinity, View};
use podveil_model::{Scope, Service, Unresolved, Upstream, Workload, check_target};
use rand::seq::index;
use std::cmp::Reverse;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// Endpoints offered for one connection: the first is dialled, the others are for when that fails.
const OFFERED: usize = 4;

/// Who asks for an endpoint, and how.
#[derive(Clone, Copy)]
pub(crate) struct Asked<'a> {
    pub source: &'a Workload,
    /// The address that was dialled; the endpoint's is of the same family.
    pub ip: IpAddr,
    /// Of the service.
    pub port: u16,
    /// What the client has kept, where the service has session affinity.
    pub affinity: &'a Affinity,
}

impl View {
    /// Some endpoints of a service, the best first.
    ///
    /// # Errors
    /// If the service has no such port, or nobody behind it can take the connection.
    pub(crate) fn upstreams(
        &self,
        service: &Arc<Service>,
        asked: Asked<'_>,
    ) -> Result<Vec<Upstream>, Unresolved> {
        if service.ports.iter().all(|known| known.port != asked.port) {
            return Err(Unresolved::NoPort {
                service: service.key.clone(),
                port: asked.port,
            });
        }
        let no_endpoint = || Unresolved::NoEndpoint {
            service: service.key.clone(),
        };
        let endpoints = self.endpoints(&service.key).ok_or_else(no_endpoint)?;
        let unready: &[_] = if service.publish_not_ready {
            &endpoints.unready
        } else {
            &[]
        };
        // Those on their way out may still serve: better than nobody, as Kubernetes has it.
        for takers in [
            [&endpoints.healthy[..], unready],
            [&endpoints.terminating[..], &[]],
        ] {
            let offered = self.offer(service, asked, takers);
            if !offered.is_empty() {
                return Ok(offered);
            }
        }
        Err(no_endpoint())
    }

    fn offer(
        &self,
        service: &Arc<Service>,
        asked: Asked<'_>,
        takers: [&[Arc<Workload>]; 2],
    ) -> Vec<Upstream> {
        let [first, second] = takers;
        let count = first.len() + second.len();
        let balancing = &service.balancing;
        if balancing.prefer.is_empty() && balancing.affinity.is_none() {
            let taker = |chosen: usize| {
                first
                    .get(chosen)
                    .or_else(|| second.get(chosen - first.len()))
            };
            // A few at random, without walking over all.
            let few: Vec<Upstream> = index::sample(&mut rand::rng(), count, count.min(OFFERED))
                .iter()
                .filter_map(taker)
                .filter_map(|workload| self.upstream(service, asked, workload))
                .collect();
            if !few.is_empty() {
                return few;
            }
            // They had no such port or family; one of the others may.
        }
        let mut all: Vec<(&Arc<Workload>, Upstream)> = first
            .iter()
            .chain(second)
            .filter_map(|endpoint| Some((endpoint, self.upstream(service, asked, endpoint)?)))
            .collect();
        let rank = |endpoint: &Workload| {
            let shared = |scope: &&Scope| scope.is_shared(asked.source, endpoint);
            balancing.prefer.iter().take_while(shared).count()
        };
        if balancing.only_preferred && self.is_cluster_address(asked.ip) {
            all.retain(|(endpoint, _)| rank(endpoint) == balancing.prefer.len());
        }
        let kept = asked.affinity.endpoint(service);
        all.sort_by_cached_key(|(endpoint, _)| {
            let order = match balancing.affinity {
                // The same for one client at every time, also after a restart, as long as the endpoint is there.
                Some(_) => hash_of(&asked.source.uid, &endpoint.uid),
                None => rand::random(),
            };
            let kept = Some(&endpoint.uid) == kept.as_ref();
            (Reverse((kept, rank(endpoint))), order)
        });
        let offered = all.into_iter().map(|(_, upstream)| upstream);
        offered.take(OFFERED).collect()
    }

    /// The endpoint as it is dialled; `None` if it does not serve this port or family, or is never dialled.
    fn upstream(
        &self,
        service: &Arc<Service>,
        asked: Asked<'_>,
        endpoint: &Arc<Workload>,
    ) -> Option<Upstream> {
        let own = endpoint.services.get(&service.key)?.get(&asked.port);
        let target = || {
            let mut ports = service.ports.iter();
            Some(ports.find(|known| known.port == asked.port)?.target)
        };
        let port = own.copied().or_else(target).filter(|port| *port != 0)?;
        let address = SocketAddr::new(endpoint.address_like(asked.ip)?, port);
        check_target(address).ok()?;
        Some(Upstream {
            workload: self.owner(endpoint, address.ip())?.clone(),
            service: Some(service.key.clone()),
            address,
        })
    }

    /// The workload that a connection to an endpoint reaches. An endpoint whose address is not its own may stand for a pod
    /// that has it, which may take tunnels; for one that is not known it is not used.
    fn owner<'a>(&'a self, endpoint: &'a Arc<Workload>, ip: IpAddr) -> Option<&'a Arc<Workload>> {
        if !endpoint.host_network {
            return Some(endpoint);
        }
        let in_pod_ranges = || {
            let mesh = self.mesh();
            mesh.is_some_and(|mesh| mesh.pod_ranges.iter().any(|range| range.contains(&ip)))
        };
        match self.by_address(ip) {
            Some(owner) => Some(owner),
            None if in_pod_ranges() => None,
            None => Some(endpoint),
        }
    }

    /// Only cluster addresses know a preference that leaves endpoints out: the policy for traffic inside the cluster.
    fn is_cluster_address(&self, ip: IpAddr) -> bool {
        self.mesh().is_none_or(|mesh| {
            !mesh.ranges_known || mesh.service_ranges.iter().any(|range| range.contains(&ip))
        })
    }
}

fn hash_of(client: &impl Hash, endpoint: &impl Hash) -> u64 {
    // Its keys are fixed, unlike those of a table.
    let mut hasher = DefaultHasher::new();
    client.hash(&mut hasher);
    endpoint.hash(&mut hasher);
    hasher.finish()
}
