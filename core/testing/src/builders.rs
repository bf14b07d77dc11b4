// SPDX-License-Identifier: Apache-2.0
use podveil_identity::{TrustDomain, WorkloadIdentity};
use podveil_model::{
    Balancing, Epoch, External, Health, Locality, MeshConfig, Mode, Scope as Share, Service,
    ServiceKey, ServicePort, Stage, Workload,
};
use podveil_policy::{Action, Match, Policy, PolicyKey, Rule, Scope, StringMatch};
use std::sync::Arc;
use std::time::Duration;

const TRUST_DOMAIN: &str = "cluster.local";

fn trust_domain() -> TrustDomain {
    TrustDomain::new(TRUST_DOMAIN).expect("a legal trust domain")
}

/// A mandatory workload of namespace `shop`, service account `web`, on node `n1`, with UID and name `name`.
pub fn workload(name: &str) -> WorkloadBuilder {
    WorkloadBuilder(Workload {
        uid: name.into(),
        node_uid: None,
        name: name.into(),
        identity: WorkloadIdentity::new(trust_domain(), "shop", "web").expect("legal names"),
        addresses: Vec::new(),
        node: "n1".parse().expect("a legal name"),
        locality: Locality::default(),
        health: Health::Healthy,
        host_network: false,
        stage: Stage::Mandatory,
        epoch: Epoch {
            resource_version: 1,
            stage: 1,
        },
        mode: Mode::Permissive,
        external: External::Allow,
        workload_name: name.into(),
        canonical_name: name.into(),
        canonical_revision: "latest".into(),
        cluster: "Kubernetes".into(),
        services: Default::default(),
        policies: Default::default(),
        exclude_outbound_ports: Default::default(),
        exclude_inbound_ports: Default::default(),
        plain_inbound_ports: Default::default(),
        probe_ports: Default::default(),
        host_ports: Default::default(),
        capacity: 1,
    })
}

/// Panics on text that does not parse: a mistake of the test.
#[derive(Clone, Debug)]
pub struct WorkloadBuilder(Workload);

impl WorkloadBuilder {
    pub fn address(mut self, ip: &str) -> Self {
        self.0.addresses.push(ip.parse().expect("an address"));
        self
    }

    pub fn identity(mut self, namespace: &str, service_account: &str) -> Self {
        self.0.identity =
            WorkloadIdentity::new(trust_domain(), namespace, service_account).expect("legal names");
        self
    }

    pub fn stage(mut self, stage: Stage) -> Self {
        self.0.stage = stage;
        self
    }

    pub fn node(mut self, node: &str) -> Self {
        self.0.node = node.parse().expect("a legal name");
        self
    }

    pub fn mode(mut self, mode: Mode) -> Self {
        self.0.mode = mode;
        self
    }

    pub fn health(mut self, health: Health) -> Self {
        self.0.health = health;
        self
    }

    pub fn epoch(mut self, resource_version: u64, stage: u32) -> Self {
        self.0.epoch = Epoch {
            resource_version,
            stage,
        };
        self
    }

    /// Behind a service, with its own port for some of the service's.
    pub fn behind(mut self, service: &Service, ports: &[(u16, u16)]) -> Self {
        std::sync::Arc::make_mut(&mut self.0.services)
            .insert(service.key.clone(), ports.iter().copied().collect());
        self
    }

    pub fn policy(mut self, name: &str) -> Self {
        self.0.policies.insert(name.into());
        self
    }

    pub fn exclude_inbound_port(mut self, port: u16) -> Self {
        self.0.exclude_inbound_ports.insert(port);
        self
    }

    pub fn plain_inbound_port(mut self, port: u16) -> Self {
        self.0.plain_inbound_ports.insert(port);
        self
    }

    pub fn probe_port(mut self, port: u16) -> Self {
        self.0.probe_ports.insert(port);
        self
    }

    pub fn host_port(mut self, host_port: u16, port: u16) -> Self {
        self.0.host_ports.insert(host_port, port);
        self
    }

    /// Its addresses are not its own.
    pub fn host_network(mut self) -> Self {
        self.0.host_network = true;
        self
    }

    pub fn zone(mut self, zone: &str) -> Self {
        self.0.locality.zone = zone.into();
        self
    }

    /// Refuses addresses outside the cluster.
    pub fn refuse_external(mut self) -> Self {
        self.0.external = External::Refuse;
        self
    }

    pub fn build(self) -> Arc<Workload> {
        Arc::new(self.0)
    }
}

/// A service `<name>.shop.svc.cluster.local` of namespace `shop`.
pub fn service(name: &str) -> ServiceBuilder {
    ServiceBuilder(Service {
        key: ServiceKey {
            namespace: "shop".parse().expect("a legal name"),
            hostname: format!("{name}.shop.svc.cluster.local").into(),
        },
        name: name.into(),
        addresses: Vec::new(),
        ports: Vec::new(),
        publish_not_ready: false,
        balancing: Balancing::default(),
        node_ports: Default::default(),
    })
}

/// Panics on text that does not parse: a mistake of the test.
#[derive(Clone, Debug)]
pub struct ServiceBuilder(Service);

impl ServiceBuilder {
    pub fn address(mut self, ip: &str) -> Self {
        self.0.addresses.push(ip.parse().expect("an address"));
        self
    }

    /// `target` 0: named, each endpoint says its own.
    pub fn port(mut self, port: u16, target: u16) -> Self {
        self.0.ports.push(ServicePort { port, target });
        self
    }

    pub fn publish_not_ready(mut self) -> Self {
        self.0.publish_not_ready = true;
        self
    }

    pub fn node_port(mut self, node_port: u16, port: u16) -> Self {
        self.0.node_ports.insert(node_port, port);
        self
    }

    pub fn prefer(mut self, scope: Share) -> Self {
        self.0.balancing.prefer.push(scope);
        self
    }

    pub fn only_preferred(mut self) -> Self {
        self.0.balancing.only_preferred = true;
        self
    }

    pub fn affinity(mut self, time: Duration) -> Self {
        self.0.balancing.affinity = Some(time);
        self
    }

    pub fn build(self) -> Arc<Service> {
        Arc::new(self.0)
    }
}

/// An allow policy of namespace `shop` with no rule yet: it allows nothing.
pub fn policy(name: &str) -> PolicyBuilder {
    PolicyBuilder(Policy {
        key: PolicyKey {
            namespace: Some("shop".parse().expect("a legal name")),
            name: name.into(),
        },
        scope: Scope::Namespace,
        action: Action::Allow,
        rules: Vec::new(),
        dry_run: false,
    })
}

#[derive(Clone, Debug)]
pub struct PolicyBuilder(Policy);

impl PolicyBuilder {
    pub fn deny(mut self) -> Self {
        self.0.action = Action::Deny;
        self
    }

    pub fn scope(mut self, scope: Scope) -> Self {
        self.0.scope = scope;
        self
    }

    /// One more rule, which holds for one source principal.
    pub fn principal(self, principal: &str) -> Self {
        self.matching(Match {
            principals: vec![StringMatch::Exact(principal.to_owned())],
            ..Match::default()
        })
    }

    /// One more rule, which holds for one destination port.
    pub fn port(self, port: u16) -> Self {
        self.matching(Match {
            destination_ports: vec![port],
            ..Match::default()
        })
    }

    pub fn matching(mut self, one: Match) -> Self {
        self.0.rules.push(Rule {
            clauses: vec![vec![one]],
        });
        self
    }

    pub fn build(self) -> Arc<Policy> {
        Arc::new(self.0)
    }
}

/// A mesh whose pods are 10.0.0.0/16 and fd00::/64, and whose services are 10.96.0.0/16.
pub fn mesh() -> MeshConfig {
    MeshConfig {
        trust_domain: trust_domain(),
        pod_ranges: vec![
            "10.0.0.0/16".parse().expect("a range"),
            "fd00::/64".parse().expect("a range"),
        ],
        service_ranges: vec!["10.96.0.0/16".parse().expect("a range")],
        ranges_known: true,
        outlying: Some(Default::default()),
        plain_outbound_ranges: Vec::new(),
        plain_outbound_namespaces: Default::default(),
        nodes: Default::default(),
        not_enrolled: Default::default(),
        epoch: Epoch::default(),
    }
}
