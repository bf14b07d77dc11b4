// SPDX-License-Identifier: Apache-2.0
//! The four answers. The order of the questions matters: what is known about an address comes before any range, so
//! that no setting can make an enrolled workload plain.

use crate::View;
use podveil_model::{Answer, OriginalDst, PlainReason, Service, Unresolved, Upstream, Workload};
use rand::seq::index;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// Endpoints offered for one connection: the first is dialled, the others are for when that fails.
const OFFERED: usize = 4;

/// How one endpoint is reached.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Way {
    Tunnel,
    Plain(PlainReason),
}

impl View {
    /// What is known about where `source` wants to go.
    pub fn resolve(&self, source: &Workload, destination: OriginalDst) -> Answer {
        let (ip, port) = (destination.ip(), destination.port());
        // A workload's own address comes first: no service can be given a pod's address to take its traffic over.
        if let Some(workload) = self.by_address(ip) {
            return answer(vec![Upstream {
                workload: workload.clone(),
                service: None,
                address: destination.0,
            }]);
        }
        if let Some(service) = preferred(self.services_at(ip), source) {
            return match self.upstreams(service, ip, port) {
                Ok(upstreams) => answer(upstreams),
                // Its endpoints are not ours to know, e.g. the API server's.
                Err(Unresolved::NoEndpoint { .. }) if self.is_named_plain(ip) => Answer::Outside,
                Err(unresolved) => Answer::NotKnown(unresolved),
            };
        }
        self.about_unknown(ip)
    }

    fn about_unknown(&self, ip: IpAddr) -> Answer {
        let not_known = Answer::NotKnown(Unresolved::Address { ip });
        let Some(mesh) = &self.mesh() else {
            return not_known;
        };
        if self.is_named_plain(ip) {
            return Answer::Outside;
        }
        if !mesh.ranges_known {
            // Nobody can say what is inside, so each address is asked for once, and the answer decides.
            return if self.is_negative(ip) {
                Answer::Outside
            } else {
                not_known
            };
        }
        if mesh.may_be_inside(ip) {
            not_known
        } else {
            Answer::Outside
        }
    }

    /// Did the operator name this address as plain, and is the state complete, so that it is nobody's that we could
    /// tunnel to?
    fn is_named_plain(&self, ip: IpAddr) -> bool {
        self.is_synced()
            && self.mesh().is_some_and(|mesh| {
                let mut ranges = mesh.plain_outbound_ranges.iter();
                ranges.any(|range| range.contains(&ip))
            })
    }

    /// Some endpoints of a service, chosen at random, of the family that was dialled.
    fn upstreams(
        &self,
        service: &Arc<Service>,
        ip: IpAddr,
        port: u16,
    ) -> Result<Vec<Upstream>, Unresolved> {
        let Some(service_port) = service.ports.iter().find(|known| known.port == port) else {
            return Err(Unresolved::NoPort {
                service: service.key.clone(),
                port,
            });
        };
        let upstream = |workload: &Arc<Workload>| {
            let own = workload.services.get(&service.key)?.get(&port).copied();
            let target = own
                .or(Some(service_port.target))
                .filter(|port| *port != 0)?;
            Some(Upstream {
                address: SocketAddr::new(workload.address_like(ip)?, target),
                workload: workload.clone(),
                service: Some(service.key.clone()),
            })
        };
        let no_endpoint = || Unresolved::NoEndpoint {
            service: service.key.clone(),
        };
        let endpoints = self.endpoints(&service.key).ok_or_else(no_endpoint)?;
        let healthy = endpoints.healthy.len();
        let takers = healthy
            + if service.publish_not_ready {
                endpoints.unready.len()
            } else {
                0
            };
        let taker = |chosen: usize| {
            endpoints
                .healthy
                .get(chosen)
                .or_else(|| endpoints.unready.get(chosen - healthy))
        };
        let mut random = rand::rng();
        let few = index::sample(&mut random, takers, takers.min(OFFERED))
            .iter()
            .filter_map(taker)
            .filter_map(upstream)
            .collect::<Vec<_>>();
        if !few.is_empty() {
            return Ok(few);
        }
        // The few had no such port or family; one of the others may.
        let mut all = (0..takers)
            .filter_map(taker)
            .filter_map(upstream)
            .collect::<Vec<_>>();
        let chosen = index::sample(&mut random, all.len(), all.len().min(OFFERED)).into_vec();
        let mut position = 0;
        all.retain(|_| {
            position += 1;
            chosen.contains(&(position - 1))
        });
        if all.is_empty() {
            Err(no_endpoint())
        } else {
            Ok(all)
        }
    }
}

/// Of several services with one address, the client's own namespace's.
fn preferred<'a>(services: &'a [Arc<Service>], source: &Workload) -> Option<&'a Arc<Service>> {
    services
        .iter()
        .find(|service| service.key.namespace == *source.namespace())
        .or_else(|| services.first())
}

/// The first endpoint decides the way; the others stay only if they are reached the same way.
fn answer(mut upstreams: Vec<Upstream>) -> Answer {
    let way = way(&upstreams[0]);
    upstreams.retain(|upstream| self::way(upstream) == way);
    match way {
        Way::Tunnel => Answer::Enrolled(upstreams),
        Way::Plain(reason) => Answer::Plain { reason, upstreams },
    }
}

fn way(upstream: &Upstream) -> Way {
    let workload = &upstream.workload;
    if !workload.stage.is_announced() {
        Way::Plain(PlainReason::NotEnrolled)
    } else if workload
        .exclude_inbound_ports
        .contains(&upstream.address.port())
    {
        Way::Plain(PlainReason::PortExcluded)
    } else {
        Way::Tunnel
    }
}

#[cfg(test)]
#[path = "resolve_tests.rs"]
mod tests;
