// SPDX-License-Identifier: Apache-2.0
use super::{Malformed, Parsed, at_most, ip, known_enum, kubernetes_name, port, target_port, text};
use podveil_model::{Service, ServiceKey, ServicePort};
use podveil_proto::istio::workload::{self as wire, load_balancing::HealthPolicy};
use std::net::IpAddr;
use std::sync::Arc;

const MAX_ADDRESSES: usize = 4096;
const MAX_PORTS: usize = 4096;
/// RFC 1035.
const MAX_HOSTNAME_BYTES: usize = 253;

impl TryFrom<wire::Service> for Parsed<Service> {
    type Error = Malformed;

    fn try_from(wire: wire::Service) -> Result<Self, Malformed> {
        let _: wire::IpFamilies = known_enum("ip_families", wire.ip_families)?;
        // SPEC: `visibility` is the one enum of which an unknown value is taken as its default by peers; it only says
        // who may see the name, which nothing here reads.
        let mut publish_not_ready = false;
        if let Some(load_balancing) = wire.load_balancing {
            let _: wire::load_balancing::Mode =
                known_enum("load_balancing.mode", load_balancing.mode)?;
            for scope in load_balancing.routing_preference {
                let _: wire::load_balancing::Scope =
                    known_enum("load_balancing.routing_preference", scope)?;
            }
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
        }))
    }
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
