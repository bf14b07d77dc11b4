// SPDX-License-Identifier: Apache-2.0
//! Types of `core/` into wire resources. Every collection in them is ordered, so equal content gives equal bytes.

use podveil_model::{
    Balancing, EndpointPorts, Epoch, External, Health, Locality, MeshConfig, Mode, Scope as Share,
    Service, Stage, Workload,
};
use podveil_policy::{Action, Match, Policy, Scope, ServiceAccountMatch, StringMatch};
use podveil_proto::istio::security as policy;
use podveil_proto::istio::workload::{self as wire, address::Type};
use podveil_proto::podveil::node::v1 as ours;
use podveil_proto::{SERVICE_EXTENSION, WORKLOAD_EXTENSION, type_url};
use prost::Message;
use prost_types::Any;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

pub(crate) fn workload(workload: &Workload) -> Any {
    let tunnel = if workload.stage.is_announced() {
        wire::TunnelProtocol::Hbone
    } else {
        wire::TunnelProtocol::None
    };
    let status = match workload.health {
        Health::Healthy => wire::WorkloadStatus::Healthy,
        // Peers have no third state: they must not pick a terminating endpoint either.
        Health::Terminating | Health::Unhealthy => wire::WorkloadStatus::Unhealthy,
    };
    let network_mode = if workload.host_network {
        wire::NetworkMode::HostNetwork
    } else {
        wire::NetworkMode::Standard
    };
    let wire = wire::Workload {
        uid: workload.uid.to_string(),
        name: workload.name.to_string(),
        namespace: workload.identity.namespace.to_string(),
        addresses: workload.addresses.iter().copied().map(ip).collect(),
        tunnel_protocol: tunnel.into(),
        trust_domain: workload.identity.trust_domain.as_str().to_owned(),
        service_account: workload.identity.service_account.to_string(),
        node: workload.node.to_string(),
        canonical_name: workload.canonical_name.to_string(),
        canonical_revision: workload.canonical_revision.to_string(),
        workload_type: wire::WorkloadType::Pod.into(),
        workload_name: workload.workload_name.to_string(),
        services: (workload.services.iter())
            .map(|(key, ports)| (key.to_string(), port_list(ports)))
            .collect(),
        authorization_policies: workload
            .policies
            .iter()
            .map(|name| name.to_string())
            .collect(),
        status: status.into(),
        cluster_id: workload.cluster.to_string(),
        network_mode: network_mode.into(),
        locality: locality(&workload.locality),
        extensions: vec![wire::Extension {
            name: WORKLOAD_EXTENSION.to_owned(),
            config: Some(Any {
                type_url: type_url::WORKLOAD_EXTENSION.to_owned(),
                value: extension(workload).encode_to_vec(),
            }),
        }],
        capacity: Some(workload.capacity),
        ..Default::default()
    };
    address(Type::Workload(wire))
}

pub(crate) fn service(service: &Service) -> Any {
    let wire = wire::Service {
        name: service.name.to_string(),
        namespace: service.key.namespace.to_string(),
        hostname: service.key.hostname.to_string(),
        addresses: (service.addresses.iter())
            .map(|address| wire::NetworkAddress {
                network: String::new(),
                address: ip(*address),
                length: None,
            })
            .collect(),
        ports: (service.ports.iter())
            .map(|one| port(one.port, one.target))
            .collect(),
        load_balancing: load_balancing(service),
        extensions: service_extension(service).into_iter().collect(),
        ..Default::default()
    };
    address(Type::Service(wire))
}

pub(crate) fn authorization(policy: &Policy) -> Any {
    let scope = match policy.scope {
        Scope::Global => policy::Scope::Global,
        Scope::Namespace => policy::Scope::Namespace,
        Scope::WorkloadSelector => policy::Scope::WorkloadSelector,
    };
    let action = match policy.action {
        Action::Allow => policy::Action::Allow,
        Action::Deny => policy::Action::Deny,
    };
    let rules = policy.rules.iter().map(|rule| policy::Rule {
        clauses: (rule.clauses.iter())
            .map(|clause| policy::Clause {
                matches: clause.iter().map(one_match).collect(),
            })
            .collect(),
    });
    let wire = policy::Authorization {
        name: policy.key.name.to_string(),
        namespace: (policy.key.namespace.as_ref()).map_or_else(String::new, ToString::to_string),
        scope: scope.into(),
        action: action.into(),
        rules: rules.collect(),
        dry_run: policy.dry_run,
        extensions: Vec::new(),
    };
    Any {
        type_url: type_url::AUTHORIZATION.to_owned(),
        value: wire.encode_to_vec(),
    }
}

pub(crate) fn mesh_config(mesh: &MeshConfig) -> Any {
    let texts = |ranges: &[ipnet::IpNet]| ranges.iter().map(ToString::to_string).collect();
    let wire = ours::MeshConfig {
        trust_domain: mesh.trust_domain.as_str().to_owned(),
        pod_ranges: texts(&mesh.pod_ranges),
        service_ranges: texts(&mesh.service_ranges),
        ranges_known: mesh.ranges_known,
        epoch: Some(epoch(mesh.epoch)),
        plain_outbound_ranges: texts(&mesh.plain_outbound_ranges),
        plain_outbound_namespaces: (mesh.plain_outbound_namespaces.iter())
            .map(ToString::to_string)
            .collect(),
        nodes: (mesh.nodes.iter())
            .map(|(name, addresses)| ours::Node {
                name: name.to_string(),
                addresses: addresses.iter().copied().map(ip).collect(),
            })
            .collect(),
        not_enrolled: mesh.not_enrolled.iter().map(ToString::to_string).collect(),
        outlying: (mesh.outlying.iter().flatten().copied()).map(ip).collect(),
        outlying_known: mesh.outlying.is_some(),
    };
    Any {
        type_url: type_url::MESH_CONFIG.to_owned(),
        value: wire.encode_to_vec(),
    }
}

/// `None`: nothing is known.
fn locality(locality: &Locality) -> Option<wire::Locality> {
    (*locality != Locality::default()).then(|| wire::Locality {
        region: locality.region.to_string(),
        zone: locality.zone.to_string(),
        subzone: locality.subzone.to_string(),
    })
}

fn address(one: Type) -> Any {
    Any {
        type_url: type_url::ADDRESS.to_owned(),
        value: wire::Address { r#type: Some(one) }.encode_to_vec(),
    }
}

fn extension(workload: &Workload) -> ours::WorkloadExtension {
    let stage = match workload.stage {
        Stage::None => ours::EnrolmentStage::None,
        Stage::Wanted => ours::EnrolmentStage::Wanted,
        Stage::Capturable => ours::EnrolmentStage::Capturable,
        Stage::Announced => ours::EnrolmentStage::Announced,
        Stage::Mandatory => ours::EnrolmentStage::Mandatory,
        Stage::Draining => ours::EnrolmentStage::Draining,
    };
    let mode = match workload.mode {
        Mode::Permissive => ours::Mode::Permissive,
        Mode::Strict => ours::Mode::Strict,
    };
    let numbers = |ports: &std::collections::BTreeSet<u16>| {
        ports.iter().map(|port| u32::from(*port)).collect()
    };
    ours::WorkloadExtension {
        stage: stage.into(),
        epoch: Some(epoch(workload.epoch)),
        mode: mode.into(),
        exclude_outbound_ports: numbers(&workload.exclude_outbound_ports),
        exclude_inbound_ports: numbers(&workload.exclude_inbound_ports),
        plain_inbound_ports: numbers(&workload.plain_inbound_ports),
        terminating: workload.health == Health::Terminating,
        external: match workload.external {
            External::Allow => ours::External::Allow,
            External::Refuse => ours::External::Refuse,
        }
        .into(),
        probe_ports: numbers(&workload.probe_ports),
        host_ports: port_mappings(&workload.host_ports),
        node_uid: (workload.node_uid.as_ref()).map_or_else(String::new, ToString::to_string),
    }
}

/// `None` where there is nothing to say.
fn service_extension(service: &Service) -> Option<wire::Extension> {
    let affinity = service.balancing.affinity;
    if affinity.is_none() && service.node_ports.is_empty() {
        return None;
    }
    let seconds = |affinity: Duration| u32::try_from(affinity.as_secs()).unwrap_or(u32::MAX);
    let ours = ours::ServiceExtension {
        affinity_seconds: affinity.map_or(0, seconds),
        node_ports: port_mappings(&service.node_ports),
    };
    Some(wire::Extension {
        name: SERVICE_EXTENSION.to_owned(),
        config: Some(Any {
            type_url: type_url::SERVICE_EXTENSION.to_owned(),
            value: ours.encode_to_vec(),
        }),
    })
}

fn port_mappings(ports: &BTreeMap<u16, u16>) -> Vec<ours::PortMapping> {
    ports
        .iter()
        .map(|(node_port, port)| ours::PortMapping {
            node_port: u32::from(*node_port),
            port: u32::from(*port),
        })
        .collect()
}

/// `None`: every default.
fn load_balancing(service: &Service) -> Option<wire::LoadBalancing> {
    use wire::load_balancing::{HealthPolicy, Mode, Scope as Wire};
    let Balancing {
        prefer,
        only_preferred,
        affinity: _,
    } = &service.balancing;
    if prefer.is_empty() && !service.publish_not_ready {
        return None;
    }
    let scope = |scope: &Share| match scope {
        Share::Network => Wire::Network,
        Share::Cluster => Wire::Cluster,
        Share::Region => Wire::Region,
        Share::Zone => Wire::Zone,
        Share::Subzone => Wire::Subzone,
        Share::Node => Wire::Node,
    };
    let mode = match (prefer.is_empty(), only_preferred) {
        (true, _) => Mode::UnspecifiedMode,
        (false, true) => Mode::Strict,
        (false, false) => Mode::Failover,
    };
    let health = if service.publish_not_ready {
        HealthPolicy::AllowAll
    } else {
        HealthPolicy::OnlyHealthy
    };
    Some(wire::LoadBalancing {
        routing_preference: prefer.iter().map(|one| scope(one).into()).collect(),
        mode: mode.into(),
        health_policy: health.into(),
    })
}

fn epoch(epoch: Epoch) -> ours::Epoch {
    ours::Epoch {
        resource_version: epoch.resource_version,
        stage: epoch.stage,
    }
}

fn port_list(ports: &EndpointPorts) -> wire::PortList {
    wire::PortList {
        ports: ports.iter().map(|(from, to)| port(*from, *to)).collect(),
    }
}

fn port(service_port: u16, target_port: u16) -> wire::Port {
    wire::Port {
        service_port: service_port.into(),
        target_port: target_port.into(),
        app_protocol: 0,
    }
}

fn ip(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn one_match(one: &Match) -> policy::Match {
    let numbers = |ports: &[u16]| ports.iter().map(|port| u32::from(*port)).collect();
    policy::Match {
        namespaces: strings(&one.namespaces),
        not_namespaces: strings(&one.not_namespaces),
        principals: strings(&one.principals),
        not_principals: strings(&one.not_principals),
        source_ips: ranges(&one.source_ips),
        not_source_ips: ranges(&one.not_source_ips),
        destination_ips: ranges(&one.destination_ips),
        not_destination_ips: ranges(&one.not_destination_ips),
        destination_ports: numbers(&one.destination_ports),
        not_destination_ports: numbers(&one.not_destination_ports),
        service_accounts: accounts(&one.service_accounts),
        not_service_accounts: accounts(&one.not_service_accounts),
        extensions: Vec::new(),
    }
}

fn strings(matches: &[StringMatch]) -> Vec<policy::StringMatch> {
    use policy::string_match::MatchType;
    let wire = |one: &StringMatch| match one {
        StringMatch::Exact(text) => MatchType::Exact(text.clone()),
        StringMatch::Prefix(text) => MatchType::Prefix(text.clone()),
        StringMatch::Suffix(text) => MatchType::Suffix(text.clone()),
        StringMatch::Presence => MatchType::Presence(policy::Presence {}),
    };
    (matches.iter())
        .map(|one| policy::StringMatch {
            match_type: Some(wire(one)),
        })
        .collect()
}

fn ranges(ranges: &[ipnet::IpNet]) -> Vec<policy::Address> {
    (ranges.iter())
        .map(|range| policy::Address {
            address: ip(range.addr()),
            length: range.prefix_len().into(),
        })
        .collect()
}

fn accounts(accounts: &[ServiceAccountMatch]) -> Vec<policy::ServiceAccountMatch> {
    (accounts.iter())
        .map(|one| policy::ServiceAccountMatch {
            namespace: one.namespace.clone(),
            service_account: one.service_account.clone(),
        })
        .collect()
}
