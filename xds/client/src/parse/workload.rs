// SPDX-License-Identifier: Apache-2.0
use super::{
    Malformed, Parsed, at_most, ip, known_enum, kubernetes_name, port, required, service, text,
};
use podveil_identity::{TrustDomain, WorkloadIdentity};
use podveil_model::{EndpointPorts, Epoch, External, Health, Locality, Mode, Stage, Uid, Workload};
use podveil_proto::istio::workload::{self as wire, NetworkMode, TunnelProtocol, WorkloadStatus};
use podveil_proto::podveil::node::v1 as ours;
use podveil_proto::{WORKLOAD_EXTENSION, type_url};
use prost::Message;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

const MAX_ADDRESSES: usize = 64;
const MAX_SERVICES: usize = 4096;
const MAX_POLICIES: usize = 4096;
const MAX_EXTENSIONS: usize = 64;
const MAX_PORTS: usize = 4096;

impl TryFrom<wire::Workload> for Parsed<Workload> {
    type Error = Malformed;

    fn try_from(wire: wire::Workload) -> Result<Self, Malformed> {
        let extension = extension(
            wire.extensions,
            WORKLOAD_EXTENSION,
            type_url::WORKLOAD_EXTENSION,
        )?;
        let tunnel = known_enum("tunnel_protocol", wire.tunnel_protocol)?;
        let enrolment = Enrolment::new(tunnel, extension)?;
        let _: wire::WorkloadType = known_enum("workload_type", wire.workload_type)?;
        if let Some(tunnel) = &wire.application_tunnel {
            let _: wire::application_tunnel::Protocol =
                known_enum("application_tunnel.protocol", tunnel.protocol)?;
        }
        let health = match known_enum("status", wire.status)? {
            _ if enrolment.terminating => Health::Terminating,
            WorkloadStatus::Healthy => Health::Healthy,
            WorkloadStatus::Unhealthy => Health::Unhealthy,
        };
        let host_network = known_enum::<NetworkMode>("network_mode", wire.network_mode)?
            == NetworkMode::HostNetwork;
        let mut addresses = Vec::new();
        for bytes in at_most(MAX_ADDRESSES, "addresses", wire.addresses)? {
            addresses.push(ip("addresses", &bytes)?);
        }
        if wire.services.len() > MAX_SERVICES {
            return Err(Malformed::TooMany {
                field: "services",
                limit: MAX_SERVICES,
            });
        }
        let mut services = BTreeMap::new();
        for (key, list) in wire.services {
            services.insert(service::key("services", &key)?, endpoint_ports(list)?);
        }
        let mut policies = BTreeSet::new();
        for name in at_most(
            MAX_POLICIES,
            "authorization_policies",
            wire.authorization_policies,
        )? {
            policies.insert(required("authorization_policies", name)?);
        }
        Ok(Self(Workload {
            uid: Uid(required("uid", wire.uid)?),
            node_uid: enrolment.node_uid,
            name: text("name", wire.name)?,
            identity: WorkloadIdentity {
                trust_domain: trust_domain(
                    "trust_domain",
                    or(&wire.trust_domain, "cluster.local"),
                )?,
                namespace: kubernetes_name("namespace", &wire.namespace)?,
                service_account: kubernetes_name(
                    "service_account",
                    or(&wire.service_account, "default"),
                )?,
            },
            addresses,
            node: kubernetes_name("node", or(&wire.node, NO_NODE))?,
            locality: locality(wire.locality.unwrap_or_default())?,
            health,
            host_network,
            stage: enrolment.stage,
            epoch: enrolment.epoch,
            mode: enrolment.mode,
            workload_name: text("workload_name", wire.workload_name)?,
            canonical_name: text("canonical_name", wire.canonical_name)?,
            canonical_revision: text("canonical_revision", wire.canonical_revision)?,
            cluster: text("cluster_id", or(&wire.cluster_id, "Kubernetes").to_owned())?,
            services: Arc::new(services),
            policies,
            exclude_outbound_ports: enrolment.exclude_outbound_ports,
            exclude_inbound_ports: enrolment.exclude_inbound_ports,
            plain_inbound_ports: enrolment.plain_inbound_ports,
            external: enrolment.external,
            probe_ports: enrolment.probe_ports,
            host_ports: enrolment.host_ports,
            capacity: wire.capacity.unwrap_or(1),
        }))
    }
}

/// The node of a workload that runs on none we could know (istiod: a WorkloadEntry). `.invalid` is reserved
/// (RFC 2606), so no node is called so.
const NO_NODE: &str = "none.invalid";

fn or<'a>(value: &'a str, default: &'a str) -> &'a str {
    if value.is_empty() { default } else { value }
}

pub(super) fn trust_domain(field: &'static str, name: &str) -> Result<TrustDomain, Malformed> {
    TrustDomain::new(name).map_err(|_| Malformed::TrustDomain {
        field,
        value: super::shortened(name),
    })
}

fn locality(wire: wire::Locality) -> Result<Locality, Malformed> {
    Ok(Locality {
        region: text("locality.region", wire.region)?,
        zone: text("locality.zone", wire.zone)?,
        subzone: text("locality.subzone", wire.subzone)?,
    })
}

/// Ports of a node and what they lead to.
pub(super) fn port_mappings(
    field: &'static str,
    mappings: Vec<ours::PortMapping>,
) -> Result<BTreeMap<u16, u16>, Malformed> {
    let mut ports = BTreeMap::new();
    for one in at_most(MAX_PORTS, field, mappings)? {
        let to = port(field, one.port)?;
        if ports.insert(port(field, one.node_port)?, to).is_some() {
            return Err(Malformed::Duplicate { field });
        }
    }
    Ok(ports)
}

fn endpoint_ports(list: wire::PortList) -> Result<EndpointPorts, Malformed> {
    let mut ports = EndpointPorts::new();
    for one in at_most(MAX_PORTS, "services.ports", list.ports)? {
        ports.insert(
            port("services.ports.service_port", one.service_port)?,
            super::target_port("services.ports.target_port", one.target_port)?,
        );
    }
    Ok(ports)
}

/// What our extension says, or what a control plane without it means.
struct Enrolment {
    stage: Stage,
    epoch: Epoch,
    mode: Mode,
    exclude_outbound_ports: BTreeSet<u16>,
    exclude_inbound_ports: BTreeSet<u16>,
    plain_inbound_ports: BTreeSet<u16>,
    terminating: bool,
    external: External,
    node_uid: Option<Uid>,
    probe_ports: BTreeSet<u16>,
    host_ports: BTreeMap<u16, u16>,
}

impl Enrolment {
    fn new(
        tunnel: TunnelProtocol,
        extension: Option<ours::WorkloadExtension>,
    ) -> Result<Self, Malformed> {
        let announced = match tunnel {
            TunnelProtocol::Hbone => true,
            TunnelProtocol::None => false,
            TunnelProtocol::LegacyIstioMtls => {
                return Err(Malformed::Unsupported {
                    field: "tunnel_protocol",
                });
            }
        };
        let Some(extension) = extension else {
            return Ok(Self {
                stage: if announced {
                    Stage::Announced
                } else {
                    Stage::None
                },
                epoch: Epoch::default(),
                mode: Mode::default(),
                exclude_outbound_ports: BTreeSet::new(),
                exclude_inbound_ports: BTreeSet::new(),
                plain_inbound_ports: BTreeSet::new(),
                terminating: false,
                external: External::default(),
                node_uid: None,
                probe_ports: BTreeSet::new(),
                host_ports: BTreeMap::new(),
            });
        };
        use ours::EnrolmentStage as Wire;
        let stage = match known_enum("stage", extension.stage)? {
            Wire::None => Stage::None,
            Wire::Wanted => Stage::Wanted,
            Wire::Capturable => Stage::Capturable,
            Wire::Announced => Stage::Announced,
            Wire::Mandatory => Stage::Mandatory,
            Wire::Draining => Stage::Draining,
        };
        if stage.is_announced() != announced {
            return Err(Malformed::TunnelAndStage);
        }
        let mode = match known_enum("mode", extension.mode)? {
            ours::Mode::Permissive => Mode::Permissive,
            ours::Mode::Strict => Mode::Strict,
        };
        Ok(Self {
            stage,
            epoch: epoch(extension.epoch),
            mode,
            exclude_outbound_ports: ports(
                "exclude_outbound_ports",
                extension.exclude_outbound_ports,
            )?,
            exclude_inbound_ports: ports("exclude_inbound_ports", extension.exclude_inbound_ports)?,
            plain_inbound_ports: ports("plain_inbound_ports", extension.plain_inbound_ports)?,
            terminating: extension.terminating,
            external: match known_enum("external", extension.external)? {
                ours::External::Allow => External::Allow,
                ours::External::Refuse => External::Refuse,
            },
            node_uid: match text("node_uid", extension.node_uid)? {
                empty if empty.is_empty() => None,
                uid => Some(Uid(uid)),
            },
            probe_ports: ports("probe_ports", extension.probe_ports)?,
            host_ports: port_mappings("host_ports", extension.host_ports)?,
        })
    }
}

pub(super) fn epoch(wire: Option<ours::Epoch>) -> Epoch {
    wire.map_or_else(Epoch::default, |wire| Epoch {
        resource_version: wire.resource_version,
        stage: wire.stage,
    })
}

fn ports(field: &'static str, values: Vec<u32>) -> Result<BTreeSet<u16>, Malformed> {
    at_most(MAX_PORTS, field, values)?
        .into_iter()
        .map(|value| port(field, value))
        .collect()
}

/// Ours among the extensions, by its name; those of others are not our business.
pub(super) fn extension<M: Message + Default>(
    all: Vec<wire::Extension>,
    name: &str,
    type_url: &str,
) -> Result<Option<M>, Malformed> {
    let all = at_most(MAX_EXTENSIONS, "extensions", all)?;
    let mut own = all.into_iter().filter(|one| one.name == name);
    let Some(first) = own.next() else {
        return Ok(None);
    };
    if own.next().is_some() {
        return Err(Malformed::Duplicate {
            field: "extensions",
        });
    }
    let config = first.config.ok_or(Malformed::Empty {
        field: "extensions.config",
    })?;
    if config.type_url != type_url {
        return Err(Malformed::WrongType {
            got: super::shortened(&config.type_url),
        });
    }
    super::decode(&config.value).map(Some)
}
