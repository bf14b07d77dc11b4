// SPDX-License-Identifier: Apache-2.0
//! Where a connection would go, as a person writes it, and the address that an application would dial for it.

use crate::failure::Failure;
use podveil_model::{Service, ServiceKey};
use podveil_state::View;
use std::fmt::Display;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Destination {
    host: Host,
    port: Option<u16>,
}

#[derive(Clone, Debug, Eq, PartialEq)]
enum Host {
    Ip(IpAddr),
    Name(String),
    Pod { namespace: String, name: String },
}

impl FromStr for Destination {
    type Err = Failure;

    fn from_str(text: &str) -> Result<Self, Failure> {
        let wrong = || {
            Failure::new(
                format!("{text:?} is not a destination"),
                "write an address, a service (web.shop) or a pod (shop/web-0), then :PORT; IPv6 in brackets",
            )
        };
        if let Ok(address) = text.parse::<SocketAddr>() {
            return Ok(Self {
                host: Host::Ip(address.ip()),
                port: Some(address.port()),
            });
        }
        if let Ok(ip) = text.trim_matches(['[', ']']).parse() {
            return Ok(Self {
                host: Host::Ip(ip),
                port: None,
            });
        }
        let (host, port) = match text.rsplit_once(':') {
            Some((host, port)) => (host, Some(port.parse().map_err(|_| wrong())?)),
            None => (text, None),
        };
        let host = match host.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => Host::Pod {
                namespace: namespace.to_owned(),
                name: name.to_owned(),
            },
            None if !host.is_empty() => Host::Name(host.trim_end_matches('.').to_owned()),
            _ => return Err(wrong()),
        };
        Ok(Self { host, port })
    }
}

impl Destination {
    /// The address and port that an application in `namespace` would dial, as the cluster's DNS would say. IPv4 where
    /// there are both.
    ///
    /// # Errors
    /// If the name means nothing here, or no port is said and none is clear.
    pub fn resolve(&self, view: &View, namespace: &str) -> Result<SocketAddr, Failure> {
        match &self.host {
            Host::Ip(ip) => {
                let services = view.services_at(*ip).first();
                Ok(SocketAddr::new(
                    *ip,
                    self.port_of(ip, services.map(|one| &**one))?,
                ))
            }
            Host::Name(name) => self.service(view, name, namespace),
            Host::Pod { namespace, name } => {
                let pod = view
                    .workloads()
                    .find(|one| one.namespace().as_str() == namespace && *one.name == **name)
                    .ok_or_else(|| {
                        Failure::new(
                            format!("the source's node knows no pod {namespace}/{name}"),
                            format!("`kubectl get pods -n {namespace}`"),
                        )
                    })?;
                let ip = pod.addresses.first().ok_or_else(|| {
                    Failure::new(
                        format!("pod {namespace}/{name} has no address"),
                        "wait until it runs",
                    )
                })?;
                Ok(SocketAddr::new(
                    *ip,
                    self.port_of(&format!("{namespace}/{name}"), None)?,
                ))
            }
        }
    }

    fn service(&self, view: &View, name: &str, namespace: &str) -> Result<SocketAddr, Failure> {
        let mut found: Vec<_> = view
            .services()
            .filter(|one| is_called(one, name, namespace))
            .collect();
        // The search path asks for the short name in one's own namespace first.
        found.sort_by_key(|one| (one.key.namespace.as_str() != namespace, one.key.clone()));
        let service = found.first().ok_or_else(|| {
            Failure::new(
                format!("the source's node knows no service {name:?}"),
                "a name outside the cluster is not looked up here: give its address",
            )
        })?;
        let port = self.port_of(&service.key, Some(service))?;
        let addresses = service.addresses.iter().copied();
        if let Some(ip) = addresses.min_by_key(IpAddr::is_ipv6) {
            return Ok(SocketAddr::new(ip, port));
        }
        // Headless: its name gives the pods' own addresses.
        let behind = |key: &ServiceKey| {
            let mut pods: Vec<_> = view
                .workloads()
                .filter(|one| one.services.contains_key(key))
                .collect();
            pods.sort_by_key(|one| one.uid.clone());
            pods.iter().find_map(|one| one.addresses.first().copied())
        };
        let ip = behind(&service.key).ok_or_else(|| {
            Failure::new(
                format!("service {} has neither an address nor pods", service.key),
                format!("`kubectl get endpointslices -n {}`", service.key.namespace),
            )
        })?;
        Ok(SocketAddr::new(ip, port))
    }

    fn port_of(&self, what: &dyn Display, service: Option<&Service>) -> Result<u16, Failure> {
        if let Some(port) = self.port {
            return Ok(port);
        }
        let ports = service
            .map(|service| service.ports.as_slice())
            .unwrap_or_default();
        match ports {
            [only] => Ok(only.port),
            [] => Err(Failure::new(format!("{what}: which port?"), "add :PORT")),
            several => {
                let several: Vec<_> = several.iter().map(|one| one.port.to_string()).collect();
                Err(Failure::new(
                    format!("{what} has several ports"),
                    format!("add one of :{}", several.join(", :")),
                ))
            }
        }
    }
}

/// `web`, `web.shop`, `web.shop.svc` and the whole name.
fn is_called(service: &Service, name: &str, namespace: &str) -> bool {
    let hostname = &*service.key.hostname;
    if hostname == name {
        return true;
    }
    let Some((short, _)) = hostname.split_once(".svc.") else {
        return false;
    };
    let name = name.strip_suffix(".svc").unwrap_or(name);
    short == name || short == format!("{name}.{namespace}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use podveil_testing::{service, workload};

    fn view() -> View {
        let mut view = View::default();
        let web = service("web").address("fd00:96::80").address("10.96.0.80");
        view.insert_service(web.port(80, 8080).build());
        let two = service("two")
            .address("10.96.0.81")
            .port(80, 1)
            .port(443, 2);
        view.insert_service(two.build());
        let headless = service("db").port(5432, 5432).build();
        let pod = workload("db-0").address("10.0.0.7").behind(&headless, &[]);
        view.insert_workload(pod.build());
        view.insert_service(headless);
        view.insert_service(service("empty").port(1, 1).build());
        view
    }

    #[test]
    fn what_a_person_writes_is_what_an_application_dials() {
        for (text, namespace, dialled) in [
            ("10.0.0.2:80", "shop", Ok("10.0.0.2:80")),
            ("[fd00::2]:80", "shop", Ok("[fd00::2]:80")),
            ("10.96.0.80", "shop", Ok("10.96.0.80:80")),
            ("web", "shop", Ok("10.96.0.80:80")),
            ("web:81", "shop", Ok("10.96.0.80:81")),
            ("web.shop", "other", Ok("10.96.0.80:80")),
            ("web.shop.svc", "other", Ok("10.96.0.80:80")),
            ("web.shop.svc.cluster.local.", "other", Ok("10.96.0.80:80")),
            ("db", "shop", Ok("10.0.0.7:5432")),
            ("shop/db-0:5432", "other", Ok("10.0.0.7:5432")),
            (
                "web",
                "other",
                Err("the source's node knows no service \"web\""),
            ),
            (
                "two",
                "shop",
                Err("shop/two.shop.svc.cluster.local has several ports"),
            ),
            ("fd00::2", "shop", Err("fd00::2: which port?")),
            ("shop/db-0", "shop", Err("shop/db-0: which port?")),
            (
                "shop/gone:1",
                "shop",
                Err("the source's node knows no pod shop/gone"),
            ),
            (
                "empty",
                "shop",
                Err("service shop/empty.shop.svc.cluster.local has neither an address nor pods"),
            ),
            ("web:http", "shop", Err("\"web:http\" is not a destination")),
            ("/x", "shop", Err("\"/x\" is not a destination")),
            ("", "shop", Err("\"\" is not a destination")),
        ] {
            let found = text
                .parse::<Destination>()
                .and_then(|destination| destination.resolve(&view(), namespace));
            let found = found
                .map(|address| address.to_string())
                .map_err(|failure| failure.to_string());
            assert_eq!(
                found.as_deref().map_err(String::as_str),
                dialled,
                "{text} in {namespace}"
            );
        }
    }
}
