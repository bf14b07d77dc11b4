// SPDX-License-Identifier: Apache-2.0
use super::{
    Malformed, Parsed, at_most, ip, known_enum, kubernetes_name, port, target_port, text, workload,
};
use podveil_model::{Balancing, Scope, Service, ServiceKey, ServicePort};
use podveil_proto::istio::workload::load_balancing::{HealthPolicy, Mode};
use podveil_proto::istio::workload::{self as wire};
use podveil_proto::podveil::node::v1 as ours;
use podveil_proto::{SERVICE_EXTENSION, type_url};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

const MAX_ADDRESSES: usize = 4096;
const MAX_PORTS: usize = 4096;
/// More than there are kinds of them says nothing more.
const MAX_SCOPES: usize = 16;
/// RFC 1035.
const MAX_HOSTNAME_BYTES: usize = 253;

impl TryFrom<wire::Service> for Parsed<Service> {
    type Error = Malformed;

    fn try_from(wire: wire::Service) -> Result<Self, Malformed> {
        let _: wire::IpFamilies = known_enum("ip_families", wire.ip_families)?;
        // SPEC: `visibility` is the one enum of which an unknown value is taken as its default by peers; it only says
        // who may see the name, which nothing here reads.
        let mut publish_not_ready = false;
        let extension: Option<ours::ServiceExtension> = workload::extension(
            wire.extensions,
            SERVICE_EXTENSION,
            type_url::SERVICE_EXTENSION,
        )?;
        let extension = extension.unwrap_or_default();
        let mut balancing = Balancing {
            affinity: (extension.affinity_seconds != 0)
                .then(|| Duration::from_secs(extension.affinity_seconds.into())),
            ..Balancing::default()
        };
        if let Some(load_balancing) = wire.load_balancing {
            // Of these only STRICT leaves endpoints out. PASSTHROUGH asks to have the connection balanced by somebody
            // else, which is never done.
            balancing.only_preferred =
                known_enum::<Mode>("load_balancing.mode", load_balancing.mode)? == Mode::Strict;
            balancing.prefer = scopes(load_balancing.routing_preference)?;
            publish_not_ready = known_enum::<HealthPolicy>(
                "load_balancing.health_policy",
                load_balancing.health_policy,
            )? == HealthPolicy::AllowAll;
        }
        let mut addresses = Vec::new();
        for address in at_most(MAX_ADDRESSES, "addresses", wire.addresses)? {
            addresses.extend(single(&address)?);
        }
        let mut ports = Vec::new();
        for one in at_most(MAX_PORTS, "ports", wire.ports)? {
            ports.push(ServicePort {
                port: port("ports.service_port", one.service_port)?,
                target: target_port("ports.target_port", one.target_port)?,
            });
        }
        Ok(Self(Service {
            key: ServiceKey {
                namespace: kubernetes_name("namespace", &wire.namespace)?,
                hostname: hostname("hostname", &wire.hostname)?,
            },
            name: text("name", wire.name)?,
            addresses,
            ports,
            publish_not_ready,
            balancing,
            node_ports: workload::port_mappings("node_ports", extension.node_ports)?,
        }))
    }
}

fn scopes(values: Vec<i32>) -> Result<Vec<Scope>, Malformed> {
    let field = "load_balancing.routing_preference";
    let scope = |value| {
        Ok(match known_enum(field, value)? {
            wire::load_balancing::Scope::UnspecifiedScope => {
                return Err(Malformed::Unsupported { field });
            }
            wire::load_balancing::Scope::Region => Scope::Region,
            wire::load_balancing::Scope::Zone => Scope::Zone,
            wire::load_balancing::Scope::Subzone => Scope::Subzone,
            wire::load_balancing::Scope::Node => Scope::Node,
            wire::load_balancing::Scope::Cluster => Scope::Cluster,
            wire::load_balancing::Scope::Network => Scope::Network,
        })
    };
    at_most(MAX_SCOPES, field, values)?
        .into_iter()
        .map(scope)
        .collect()
}

/// One address; `None` for a true range (a ServiceEntry of things outside), which no endpoint of ours stands behind.
fn single(wire: &wire::NetworkAddress) -> Result<Option<IpAddr>, Malformed> {
    let address = ip("addresses", &wire.address)?;
    let full = if address.is_ipv4() { 32 } else { 128 };
    match wire.length {
        Some(length) if length > full => Err(Malformed::BadIp { field: "addresses" }),
        Some(length) if length < full => Ok(None),
        _ => Ok(Some(address)),
    }
}

/// Parses `<namespace>/<hostname>`.
pub(super) fn key(field: &'static str, text: &str) -> Result<ServiceKey, Malformed> {
    let (namespace, host) = text.split_once('/').ok_or(Malformed::Text { field })?;
    Ok(ServiceKey {
        namespace: kubernetes_name(field, namespace)?,
        hostname: hostname(field, host)?,
    })
}

fn hostname(field: &'static str, text: &str) -> Result<Arc<str>, Malformed> {
    if text.is_empty() {
        return Err(Malformed::Empty { field });
    }
    if text.len() > MAX_HOSTNAME_BYTES {
        return Err(Malformed::TooLong {
            field,
            limit: MAX_HOSTNAME_BYTES,
        });
    }
    // Peers' hostnames may begin with a wildcard label.
    let legal =
        |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'*');
    if text.bytes().all(legal) {
        Ok(text.into())
    } else {
        Err(Malformed::Text { field })
    }
}
