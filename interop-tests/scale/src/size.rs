// SPDX-License-Identifier: Apache-2.0
use std::net::Ipv4Addr;
use std::ops::Range;
use std::time::Duration;

/// Services of one namespace; the large one has a namespace of its own.
const SERVICES_OF_NAMESPACE: usize = 25;

/// A cluster, and how long it is looked at. Each service has its own pods, so their number follows.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Size {
    pub nodes: usize,
    pub services: usize,
    /// Pods behind each of those.
    pub endpoints: usize,
    /// Pods behind the one large service.
    pub large: usize,
    /// Nodes whose programs are connected.
    pub subscribers: usize,
    /// Changes of pods whose way to the nodes is timed.
    pub changes: usize,
    /// How long requests are counted while nothing changes.
    pub rest: Duration,
    /// How long what was freed may take to go back to the system, before memory is read.
    pub settle: Duration,
    /// Whether the controller is killed and started again at the end.
    pub restart: bool,
    /// Whether the nodes' proxies, all but the first, hold no more than their pods talk to.
    pub on_demand: bool,
}

/// Services that the pods of a node talk to, beside the large one.
const TALKS_TO: usize = 20;
/// Of so many nodes one has pods that talk to the large service.
const TALKS_TO_LARGE: usize = 10;

impl Size {
    /// What a large cluster is taken to be.
    pub const FULL: Self = Self {
        nodes: 1000,
        services: 800,
        endpoints: 20,
        large: 4000,
        subscribers: 1000,
        changes: 200,
        rest: Duration::from_secs(60),
        // The allocators' own rules say ten.
        settle: Duration::from_secs(12),
        restart: true,
        on_demand: false,
    };

    /// The same in small, for a test.
    pub const SMALL: Self = Self {
        nodes: 50,
        services: 40,
        endpoints: 20,
        large: 200,
        subscribers: 50,
        changes: 30,
        rest: Duration::from_secs(5),
        settle: Duration::from_secs(1),
        restart: true,
        on_demand: false,
    };

    pub fn pods(&self) -> usize {
        self.services * self.endpoints + self.large
    }

    /// Workloads and services together: what a node is told of.
    pub(crate) fn addresses(&self) -> usize {
        self.pods() + self.services + 1
    }

    /// All services, the large one last.
    pub(crate) fn all_services(&self) -> Range<usize> {
        0..self.services + 1
    }

    pub(crate) fn namespaces(&self) -> impl Iterator<Item = String> {
        let last = self.services.div_ceil(SERVICES_OF_NAMESPACE);
        (0..=last).map(|number| format!("team-{number}"))
    }

    /// The namespace of a service and of its pods.
    pub(crate) fn namespace(&self, service: usize) -> String {
        let number = if service == self.services {
            self.services.div_ceil(SERVICES_OF_NAMESPACE)
        } else {
            service / SERVICES_OF_NAMESPACE
        };
        format!("team-{number}")
    }

    /// The pods behind a service.
    pub(crate) fn behind(&self, service: usize) -> Range<usize> {
        let first = service * self.endpoints;
        let count = if service == self.services {
            self.large
        } else {
            self.endpoints
        };
        first..first + count
    }

    /// The services that a node's pods talk to.
    pub(crate) fn talks_to(&self, node: usize) -> impl Iterator<Item = usize> {
        let apart = (self.services / TALKS_TO).max(1);
        let services = self.services;
        (0..TALKS_TO.min(services))
            .map(move |number| (node + number * apart) % services)
            .chain(node.is_multiple_of(TALKS_TO_LARGE).then_some(services))
    }

    /// Is a node's proxy told of a pod's changes?
    pub(crate) fn is_interested(&self, node: usize, pod: usize) -> bool {
        !self.on_demand
            || node == 0
            || self.node_of(pod) == node
            || self
                .talks_to(node)
                .any(|service| service == self.service_of(pod))
    }

    pub(crate) fn service_of(&self, pod: usize) -> usize {
        (pod / self.endpoints).min(self.services)
    }

    pub(crate) fn node_of(&self, pod: usize) -> usize {
        pod % self.nodes
    }

    pub(crate) fn pod_address(&self, pod: usize) -> Ipv4Addr {
        let [a, b, c, _] = node_range(self.node_of(pod)).octets();
        let host = u8::try_from(2 + pod / self.nodes).expect("a node has fewer than 250 pods");
        Ipv4Addr::new(a, b, c, host)
    }
}

/// The first address of a node's /24.
pub(crate) fn node_range(node: usize) -> Ipv4Addr {
    let [high, low] = u16::try_from(node)
        .expect("fewer than 65536 nodes")
        .to_be_bytes();
    Ipv4Addr::new(10, 128 + high, low, 0)
}

pub(crate) fn node_address(node: usize) -> Ipv4Addr {
    let [high, low] = u16::try_from(node + 1)
        .expect("fewer than 65535 nodes")
        .to_be_bytes();
    Ipv4Addr::new(172, 16, high, low)
}
