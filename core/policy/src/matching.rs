// SPDX-License-Identifier: Apache-2.0
use crate::Connection;
use ipnet::IpNet;
use std::net::IpAddr;

/// Every field that is not empty must hold: any value of it, none of its `not_` values. With no field at all it never
/// matches, so that a policy whose parts could not be understood cannot widen.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Match {
    pub namespaces: Vec<StringMatch>,
    pub not_namespaces: Vec<StringMatch>,
    pub principals: Vec<StringMatch>,
    pub not_principals: Vec<StringMatch>,
    pub service_accounts: Vec<ServiceAccountMatch>,
    pub not_service_accounts: Vec<ServiceAccountMatch>,
    pub source_ips: Vec<IpNet>,
    pub not_source_ips: Vec<IpNet>,
    pub destination_ips: Vec<IpNet>,
    pub not_destination_ips: Vec<IpNet>,
    pub destination_ports: Vec<u16>,
    pub not_destination_ports: Vec<u16>,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub enum StringMatch {
    Exact(String),
    Prefix(String),
    Suffix(String),
    /// Any value; holds only where there is one.
    Presence,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ServiceAccountMatch {
    pub namespace: String,
    pub service_account: String,
}

impl StringMatch {
    fn holds(&self, value: Option<&str>) -> bool {
        let Some(value) = value else { return false };
        match self {
            Self::Exact(exact) => value == exact,
            Self::Prefix(prefix) => value.starts_with(prefix.as_str()),
            Self::Suffix(suffix) => value.ends_with(suffix.as_str()),
            Self::Presence => true,
        }
    }
}

impl Match {
    pub(crate) fn holds(&self, connection: &Connection<'_>) -> bool {
        if *self == Self::default() {
            return false;
        }
        let source = connection.source;
        let principal = source.map(|identity| identity.principal());
        let (principal, namespace) = (
            principal.as_deref(),
            source.map(|identity| identity.namespace.as_str()),
        );
        let account = |wanted: &ServiceAccountMatch| {
            source.is_some_and(|identity| {
                identity.namespace.as_str() == wanted.namespace
                    && identity.service_account.as_str() == wanted.service_account
            })
        };
        let inside = |ip: IpAddr| move |range: &IpNet| range.contains(&ip);
        let port = |wanted: &u16| *wanted == connection.destination.port();
        field(&self.namespaces, &self.not_namespaces, string(namespace))
            && field(&self.principals, &self.not_principals, string(principal))
            && field(&self.service_accounts, &self.not_service_accounts, account)
            && field(
                &self.source_ips,
                &self.not_source_ips,
                inside(connection.source_ip),
            )
            && field(
                &self.destination_ips,
                &self.not_destination_ips,
                inside(connection.destination.ip()),
            )
            && field(&self.destination_ports, &self.not_destination_ports, port)
    }
}

fn string<'a>(value: Option<&'a str>) -> impl Fn(&StringMatch) -> bool + 'a {
    move |wanted| wanted.holds(value)
}

fn field<T>(any: &[T], none: &[T], holds: impl Fn(&T) -> bool) -> bool {
    (any.is_empty() || any.iter().any(&holds)) && !none.iter().any(holds)
}
