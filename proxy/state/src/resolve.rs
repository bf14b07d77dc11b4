// SPDX-License-Identifier: Apache-2.0
//! The four answers. The order of the questions matters: what is known about an address comes before any range, so
//! that no setting can make an enrolled workload plain.

use crate::endpoints::Asked;
use crate::{Affinity, View};
use podveil_identity::KubernetesName;
use podveil_model::{
    Answer, OriginalDst, PlainReason, Service, Unresolved, Upstream, Workload, check_target,
};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// How one endpoint is reached.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Way {
    Tunnel,
    Plain(PlainReason),
}

impl View {
    /// What is known about where `source` wants to go.
    pub fn resolve(&self, source: &Workload, destination: OriginalDst) -> Answer {
        self.resolve_with(source, destination, &Affinity::default())
    }

    /// The same for a client that keeps endpoints.
    pub fn resolve_with(
        &self,
        source: &Workload,
        destination: OriginalDst,
        affinity: &Affinity,
    ) -> Answer {
        let (ip, port) = (destination.ip(), destination.port());
        // Half of what there is would give another answer.
        if !self.are_told(&self.lookups(destination.0)) {
            return Answer::NotKnown(Unresolved::Address { ip });
        }
        // A workload's own address comes first: no service can be given a pod's address to take its traffic over.
        if let Some(workload) = self.by_address(ip) {
            return answer(vec![Upstream {
                workload: workload.clone(),
                service: None,
                address: destination.0,
            }]);
        }
        let asked = Asked {
            source,
            ip,
            port,
            affinity,
        };
        if let Some(service) = preferred(self.services_at(ip), source) {
            return self.behind(service, asked);
        }
        if let Some(node) = self.node_at(ip) {
            if let Some(upstream) = self.host_port(node, destination) {
                return answer(vec![upstream]);
            }
            if let Some((service, port)) = self.by_node_port(port) {
                return self.behind(service, Asked { port, ..asked });
            }
        }
        self.about_unknown(ip)
    }

    fn behind(&self, service: &Arc<Service>, asked: Asked<'_>) -> Answer {
        match self.upstreams(service, asked) {
            Ok(upstreams) => answer(upstreams),
            // Its endpoints are not ours to know, e.g. the API server's.
            Err(Unresolved::NoEndpoint { .. }) if self.is_named_plain(asked.ip) => Answer::Outside,
            // The endpoints may only not have been told yet.
            Err(_) if !self.is_synced() => Answer::NotKnown(Unresolved::NotSynced { ip: asked.ip }),
            Err(unresolved) => Answer::NotKnown(unresolved),
        }
    }

    /// The pod that a node's port leads to.
    fn host_port(&self, node: &KubernetesName, destination: OriginalDst) -> Option<Upstream> {
        let (workload, port) = self.by_host_port(node, destination.port())?;
        let address = SocketAddr::new(workload.address_like(destination.ip())?, port);
        check_target(address).ok()?;
        Some(Upstream {
            workload: workload.clone(),
            service: None,
            address,
        })
    }

    fn about_unknown(&self, ip: IpAddr) -> Answer {
        let not_known = Answer::NotKnown(Unresolved::Address { ip });
        let Some(mesh) = &self.mesh() else {
            return not_known;
        };
        if self.is_named_plain(ip) {
            return Answer::Outside;
        }
        if !self.is_synced() {
            // Services have addresses of any range.
            return Answer::NotKnown(Unresolved::NotSynced { ip });
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
