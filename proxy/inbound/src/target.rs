// SPDX-License-Identifier: Apache-2.0
use podveil_hbone::{Authority, AuthorityError, Host};
use podveil_model::{LocalAddr, NotDialable, OriginalDst, Workload, check_target};
use podveil_state::View;
use std::net::{IpAddr, SocketAddr};

/// Why what a peer asked for is not this pod's application.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum NotOurs {
    #[error("the CONNECT has no usable authority")]
    Authority(#[source] AuthorityError),
    #[error("{target} is never dialled")]
    NotDialable {
        target: SocketAddr,
        #[source]
        source: NotDialable,
    },
    #[error("{named} was asked for and {accepted} accepted")]
    AnotherAddress { named: IpAddr, accepted: IpAddr },
    #[error("this pod is not behind {host}, or not on port {port}")]
    AnotherService { host: String, port: u16 },
}

/// The application that a CONNECT means: always the address that the tunnel was accepted on. The authority gives the
/// port, and a name to compare.
///
/// # Errors
/// [`NotOurs`]; the peer receives 400.
pub(crate) fn of_connect(
    authority: &Authority,
    accepted: LocalAddr,
    workload: &Workload,
    view: &View,
) -> Result<SocketAddr, NotOurs> {
    let port = match &authority.host {
        Host::Ip(named) => {
            let port = authority.port.get();
            dialable(SocketAddr::new(*named, port))?;
            if *named != accepted.ip() {
                return Err(NotOurs::AnotherAddress {
                    named: *named,
                    accepted: accepted.ip(),
                });
            }
            port
        }
        Host::Name(host) => service_port(host, authority.port.get(), workload, view)?,
    };
    let target = SocketAddr::new(accepted.ip(), port);
    dialable(target)?;
    Ok(target)
}

/// The application that a captured plain connection was for: one of this pod's own addresses.
///
/// # Errors
/// [`NotOurs`].
pub(crate) fn of_plain(
    original: OriginalDst,
    accepted: LocalAddr,
    workload: &Workload,
) -> Result<SocketAddr, NotOurs> {
    dialable(original.0)?;
    if workload.addresses.contains(&original.ip()) {
        Ok(original.0)
    } else {
        Err(NotOurs::AnotherAddress {
            named: original.ip(),
            accepted: accepted.ip(),
        })
    }
}

fn dialable(target: SocketAddr) -> Result<(), NotOurs> {
    check_target(target).map_err(|source| NotOurs::NotDialable { target, source })
}

/// This pod's own port for a port of a service that it is behind.
fn service_port(host: &str, port: u16, workload: &Workload, view: &View) -> Result<u16, NotOurs> {
    let behind = workload
        .services
        .iter()
        .find(|(key, _)| *key.hostname == *host);
    let own = behind.and_then(|(key, ports)| {
        let target = || {
            let service = view.service(key)?;
            let known = service.ports.iter().find(|known| known.port == port)?;
            Some(known.target)
        };
        ports.get(&port).copied().or_else(target)
    });
    own.filter(|own| *own != 0)
        .ok_or_else(|| NotOurs::AnotherService {
            host: host.to_owned(),
            port,
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use podveil_testing::{service, workload};

    fn connect(authority: &str) -> Result<String, String> {
        let web = service("web")
            .address("10.96.0.80")
            .port(80, 8080)
            .port(81, 15006);
        let web = web.port(443, 0).build();
        let us = workload("us").address("10.0.0.2").address("fd00::2");
        let us = us.behind(&web, &[(443, 8443)]).build();
        let mut view = View::default();
        view.insert_service(web);
        let authority = authority
            .parse()
            .map_err(|error: AuthorityError| error.to_string())?;
        let accepted = LocalAddr("10.0.0.2:15008".parse().unwrap());
        of_connect(&authority, accepted, &us, &view)
            .map(|target| target.to_string())
            .map_err(|refused| refused.to_string())
    }

    #[test]
    fn a_connect_reaches_only_the_address_it_was_accepted_on() {
        for (authority, expected) in [
            ("10.0.0.2:80", Ok("10.0.0.2:80")),
            ("web.shop.svc.cluster.local:80", Ok("10.0.0.2:8080")),
            ("web.shop.svc.cluster.local:443", Ok("10.0.0.2:8443")),
            (
                "10.0.0.3:80",
                Err("10.0.0.3 was asked for and 10.0.0.2 accepted"),
            ),
            (
                "[fd00::2]:80",
                Err("fd00::2 was asked for and 10.0.0.2 accepted"),
            ),
            (
                "10.96.0.80:80",
                Err("10.96.0.80 was asked for and 10.0.0.2 accepted"),
            ),
            ("127.0.0.1:80", Err("127.0.0.1:80 is never dialled")),
            ("[::1]:80", Err("[::1]:80 is never dialled")),
            ("0.0.0.0:80", Err("0.0.0.0:80 is never dialled")),
            (
                "169.254.169.254:80",
                Err("169.254.169.254:80 is never dialled"),
            ),
            (
                "[::ffff:10.0.0.2]:80",
                Err("[::ffff:10.0.0.2]:80 is never dialled"),
            ),
            ("10.0.0.2:15001", Err("10.0.0.2:15001 is never dialled")),
            ("10.0.0.2:15006", Err("10.0.0.2:15006 is never dialled")),
            ("10.0.0.2:15008", Err("10.0.0.2:15008 is never dialled")),
            (
                "web.shop.svc.cluster.local:81",
                Err("10.0.0.2:15006 is never dialled"),
            ),
            (
                "web.shop.svc.cluster.local:82",
                Err("this pod is not behind web.shop.svc.cluster.local, or not on port 82"),
            ),
            (
                "localhost:80",
                Err("this pod is not behind localhost, or not on port 80"),
            ),
        ] {
            let expected = expected.map(str::to_owned).map_err(str::to_owned);
            assert_eq!(connect(authority), expected, "{authority}");
        }
    }

    #[test]
    fn a_plain_connection_reaches_only_this_pods_addresses() {
        let us = workload("us")
            .address("10.0.0.2")
            .address("fd00::2")
            .build();
        let accepted = LocalAddr("10.0.0.2:15006".parse().unwrap());
        for (original, ours) in [
            ("10.0.0.2:80", true),
            ("[fd00::2]:80", true),
            ("10.0.0.3:80", false),
            ("127.0.0.1:80", false),
            ("169.254.1.1:80", false),
            ("10.0.0.2:15008", false),
            ("10.0.0.2:15006", false),
        ] {
            let original = OriginalDst(original.parse().unwrap());
            assert_eq!(
                of_plain(original, accepted, &us).is_ok(),
                ours,
                "{original}"
            );
        }
    }
}
