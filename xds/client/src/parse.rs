// SPDX-License-Identifier: Apache-2.0
//! Wire resources into types of `core/`: the only parser of what a control plane sends.
//!
//! Everything is bounded. An enum value that is not known rejects the one resource that carries it; an address or a
//! matcher that is not understood rejects its whole policy, since leaving it out would widen the policy.
//! The functions that take bytes are what the fuzz targets call.

mod mesh;
mod policy;
mod service;
mod workload;

pub use policy::refuse_all;

use podveil_identity::{IdentityError, KubernetesName};
use podveil_model::{MeshConfig, Service, Workload};
use podveil_policy::Policy;
use podveil_proto::{envoy, istio, podveil};
use prost::Message;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

/// Bytes of one resource, before it is decoded. A service with a thousand addresses stays far below.
pub const MAX_RESOURCE_BYTES: usize = 1 << 20;
/// Bytes of any one text in a resource: beyond every name that Kubernetes allows.
const MAX_TEXT_BYTES: usize = 1024;

/// A type of `core/`, parsed from the wire. Local, so that it can have a `TryFrom`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Parsed<T>(pub T);

/// A resource of type `istio.workload.Address`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Address {
    Service(Arc<Service>),
    Workload(Arc<Workload>),
}

impl Address {
    /// The name that its resource must have, and by which it is removed.
    pub fn resource_name(&self) -> Arc<str> {
        match self {
            Self::Service(service) => service.key.to_string().into(),
            Self::Workload(workload) => workload.uid.0.clone(),
        }
    }
}

/// Why a resource is rejected. The control plane is at fault, or newer than we are.
#[derive(Debug, thiserror::Error)]
pub enum Malformed {
    #[error("{field}: {value:?} is not a range (CIDR)")]
    BadCidr { field: &'static str, value: String },
    #[error("{field}: not a usable IP address")]
    BadIp { field: &'static str },
    #[error("{field}: {value} is not a port")]
    BadPort { field: &'static str, value: u32 },
    #[error("not a protobuf message of its type")]
    Decode(#[source] prost::DecodeError),
    #[error("{field}: two of the same")]
    Duplicate { field: &'static str },
    #[error("{field}: empty")]
    Empty { field: &'static str },
    #[error("{field}")]
    Identity {
        field: &'static str,
        #[source]
        source: IdentityError,
    },
    #[error("the resource is named {resource:?} and calls itself {itself:?}")]
    OtherName { resource: String, itself: String },
    #[error("{field}: not printable, or holds a separator")]
    Text { field: &'static str },
    #[error("{field}: more than {limit} bytes")]
    TooLong { field: &'static str, limit: usize },
    #[error("{field}: more than {limit}")]
    TooMany { field: &'static str, limit: usize },
    #[error("tunnel protocol and enrolment stage disagree")]
    TunnelAndStage,
    #[error("{field}: {value:?} is not a trust domain")]
    TrustDomain { field: &'static str, value: String },
    #[error("{field}: {value} is not a value known here")]
    UnknownEnum { field: &'static str, value: i32 },
    #[error("{field}: not understood here, and leaving it out could widen what is allowed")]
    Unsupported { field: &'static str },
    #[error("resource of type {got:?} in a response of another type")]
    WrongType { got: String },
}

/// Parses one resource of type `istio.workload.Address`, whose resource is called `name`.
///
/// # Errors
/// [`Malformed`]: the resource is to be rejected as a whole.
pub fn address(name: &str, bytes: &[u8]) -> Result<Address, Malformed> {
    use istio::workload::address::Type;
    let wire: istio::workload::Address = decode(bytes)?;
    let parsed = match wire.r#type {
        Some(Type::Workload(wire)) => Address::Workload(Arc::new(Parsed::try_from(wire)?.0)),
        Some(Type::Service(wire)) => Address::Service(Arc::new(Parsed::try_from(wire)?.0)),
        None => return Err(Malformed::Empty { field: "address" }),
    };
    let itself = parsed.resource_name();
    if *itself == *name {
        Ok(parsed)
    } else {
        Err(Malformed::OtherName {
            resource: shortened(name),
            itself: itself.to_string(),
        })
    }
}

/// Parses one resource of type `istio.security.Authorization`.
///
/// # Errors
/// [`Malformed`]: the policy is to be rejected as a whole.
pub fn authorization(bytes: &[u8]) -> Result<Policy, Malformed> {
    let wire: istio::security::Authorization = decode(bytes)?;
    Ok(Parsed::try_from(wire)?.0)
}

/// Parses the resource of type `podveil.node.v1.MeshConfig`.
///
/// # Errors
/// [`Malformed`]: what is held stays in use.
pub fn mesh_config(bytes: &[u8]) -> Result<MeshConfig, Malformed> {
    let wire: podveil::node::v1::MeshConfig = decode(bytes)?;
    Ok(Parsed::try_from(wire)?.0)
}

/// Decodes a whole response and parses every resource in it; for fuzzing. Returns how many were understood.
///
/// # Errors
/// [`Malformed::Decode`] if the bytes are not a response at all.
pub fn response(bytes: &[u8]) -> Result<usize, Malformed> {
    let wire = envoy::service::discovery::v3::DeltaDiscoveryResponse::decode(bytes)
        .map_err(Malformed::Decode)?;
    let understood = wire.resources.iter().filter(|resource| {
        resource.resource.as_ref().is_some_and(|any| {
            address(&resource.name, &any.value).is_ok()
                || authorization(&any.value).is_ok()
                || mesh_config(&any.value).is_ok()
        })
    });
    Ok(understood.count())
}

fn decode<M: Message + Default>(bytes: &[u8]) -> Result<M, Malformed> {
    if bytes.len() > MAX_RESOURCE_BYTES {
        return Err(Malformed::TooLong {
            field: "resource",
            limit: MAX_RESOURCE_BYTES,
        });
    }
    M::decode(bytes).map_err(Malformed::Decode)
}

fn shortened(text: &str) -> String {
    shortened_to(text, MAX_TEXT_BYTES)
}

/// The beginning of a text that somebody else sent, for messages and names.
pub(crate) fn shortened_to(text: &str, bytes: usize) -> String {
    text[..text.floor_char_boundary(bytes)].to_owned()
}

fn at_most<T>(limit: usize, field: &'static str, items: Vec<T>) -> Result<Vec<T>, Malformed> {
    if items.len() > limit {
        Err(Malformed::TooMany { field, limit })
    } else {
        Ok(items)
    }
}

/// Any text: bounded, without control characters, and possibly empty.
fn text(field: &'static str, text: String) -> Result<Arc<str>, Malformed> {
    if text.len() > MAX_TEXT_BYTES {
        return Err(Malformed::TooLong {
            field,
            limit: MAX_TEXT_BYTES,
        });
    }
    if text.chars().any(char::is_control) {
        return Err(Malformed::Text { field });
    }
    Ok(text.into())
}

fn required(field: &'static str, value: String) -> Result<Arc<str>, Malformed> {
    if value.is_empty() {
        return Err(Malformed::Empty { field });
    }
    text(field, value)
}

fn kubernetes_name(field: &'static str, name: &str) -> Result<KubernetesName, Malformed> {
    name.parse()
        .map_err(|source| Malformed::Identity { field, source })
}

fn known_enum<E: TryFrom<i32>>(field: &'static str, value: i32) -> Result<E, Malformed> {
    E::try_from(value).map_err(|_| Malformed::UnknownEnum { field, value })
}

/// 4 or 16 bytes in network order; IPv4 in an IPv6 coat is refused, since two spellings of one address would be two
/// different keys.
fn ip(field: &'static str, bytes: &[u8]) -> Result<IpAddr, Malformed> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Ok(Ipv4Addr::from(v4).into());
    }
    match <[u8; 16]>::try_from(bytes).map(Ipv6Addr::from) {
        Ok(v6) if v6.to_ipv4_mapped().is_none() => Ok(v6.into()),
        _ => Err(Malformed::BadIp { field }),
    }
}

fn port(field: &'static str, value: u32) -> Result<u16, Malformed> {
    match u16::try_from(value) {
        Ok(port) if port != 0 => Ok(port),
        _ => Err(Malformed::BadPort { field, value }),
    }
}

/// A port of which 0 says "named: look at the endpoint".
fn target_port(field: &'static str, value: u32) -> Result<u16, Malformed> {
    u16::try_from(value).map_err(|_| Malformed::BadPort { field, value })
}
