// SPDX-License-Identifier: Apache-2.0
//! The way back over `lo`: packets marked [`MARK`] are looked up in a table of our own, where every address is local.

use crate::backend::{ApplyError, VerifyError};
use crate::command::run_in;
use podveil_model::{VERIFICATION_V4, VERIFICATION_V6};
use podveil_netns::{NetNs, NetNsError};
use podveil_plan::{MARK, MARK_MASK, ROUTE_TABLE};
use serde::Deserialize;
use std::collections::HashSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

/// An address family.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    /// The families that this namespace can carry. A pod may have IPv6 switched off, a kernel may lack it.
    /// # Errors
    /// When the namespace cannot be entered.
    pub fn of(netns: &NetNs) -> Result<Vec<Self>, NetNsError> {
        let v6 = netns.run(|| {
            fs::read_to_string("/proc/thread-self/net/if_inet6")
                .is_ok_and(|addresses| addresses.lines().any(|line| line.ends_with(" lo")))
        })?;
        Ok(if v6 {
            vec![Self::V4, Self::V6]
        } else {
            vec![Self::V4]
        })
    }

    pub(crate) fn version(self) -> u8 {
        match self {
            Self::V4 => 4,
            Self::V6 => 6,
        }
    }

    fn flag(self) -> &'static str {
        match self {
            Self::V4 => "-4",
            Self::V6 => "-6",
        }
    }
}

/// The addresses that connections sent over `lo` begin at when the application names none: without one the kernel would
/// take the destination's own for both ends.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Sources {
    pub v4: Option<IpAddr>,
    pub v6: Option<IpAddr>,
}

impl Sources {
    /// What the namespace would choose for a destination far away.
    pub fn of(netns: &NetNs, addresses: &HashSet<IpAddr>) -> Result<Self, NetNsError> {
        netns.run(|| {
            // Nothing is sent, the kernel only looks for a route.
            let chosen = |far: IpAddr| {
                let any: IpAddr = match far {
                    IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                    IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
                };
                let socket = UdpSocket::bind((any, 0)).ok()?;
                socket.connect((far, 9)).ok()?;
                let ip = socket.local_addr().ok()?.ip();
                addresses.contains(&ip).then_some(ip)
            };
            let first = |is_v4: bool| {
                let mut usable: Vec<IpAddr> = (addresses.iter().copied())
                    .filter(|ip| ip.is_ipv4() == is_v4 && is_usable(*ip))
                    .collect();
                usable.sort();
                usable.first().copied()
            };
            Self {
                v4: chosen(VERIFICATION_V4.into()).or_else(|| first(true)),
                v6: chosen(VERIFICATION_V6.into()).or_else(|| first(false)),
            }
        })
    }

    fn family(self, family: Family) -> Option<IpAddr> {
        match family {
            Family::V4 => self.v4,
            Family::V6 => self.v6,
        }
    }
}

fn is_usable(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_link_local(),
        IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unicast_link_local(),
    }
}

#[derive(Debug, Deserialize)]
struct Rule {
    priority: u32,
    fwmark: Option<String>,
    table: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Route {
    #[serde(rename = "type")]
    kind: Option<String>,
    dst: String,
    dev: Option<String>,
    prefsrc: Option<IpAddr>,
}

impl Rule {
    fn is_ours(&self) -> bool {
        self.priority == ROUTE_TABLE
            && self.fwmark.as_deref() == Some(&format!("{MARK:#x}"))
            && self.table.as_deref() == Some(&ROUTE_TABLE.to_string())
    }
}

/// Routes before the rule, so that no packet meets an empty table. The blackhole stands in for the local route if
/// somebody deletes that one: an answer must not fall through to the main table and leave the pod.
pub async fn ensure(netns: &NetNs, sources: Sources) -> Result<(), ApplyError> {
    for family in Family::of(netns)? {
        let rule = match rules(netns, family).await?.iter().any(Rule::is_ours) {
            true => String::new(),
            false => format!(
                "rule add pref {ROUTE_TABLE} fwmark {MARK:#x}/{MARK_MASK:#x} lookup {ROUTE_TABLE}\n"
            ),
        };
        let source = match sources.family(family) {
            Some(ip) => format!(" src {ip}"),
            None => String::new(),
        };
        let batch = format!(
            "route replace local default dev lo table {ROUTE_TABLE}{source}\n\
             route replace blackhole default metric 9999 table {ROUTE_TABLE}\n{rule}"
        );
        run_in(netns, "ip", &[family.flag(), "-batch", "-"], &batch).await?;
    }
    Ok(())
}

pub async fn verify(netns: &NetNs, sources: Sources) -> Result<(), VerifyError> {
    for family in Family::of(netns).map_err(ApplyError::from)? {
        let missing = |what| VerifyError::Route {
            version: family.version(),
            what,
        };
        if !rules(netns, family).await?.iter().any(Rule::is_ours) {
            return Err(missing("rule"));
        }
        let found = routes(netns, family).await?.iter().any(|route| {
            route.kind.as_deref() == Some("local")
                && route.dst == "default"
                && route.dev.as_deref() == Some("lo")
                && route.prefsrc == sources.family(family)
        });
        if !found {
            return Err(missing("route"));
        }
    }
    Ok(())
}

pub async fn stand(netns: &NetNs) -> Result<bool, ApplyError> {
    for family in Family::of(netns)? {
        let rule = rules(netns, family).await?.iter().any(Rule::is_ours);
        if rule || !routes(netns, family).await?.is_empty() {
            return Ok(true);
        }
    }
    Ok(false)
}

pub async fn remove(netns: &NetNs) -> Result<(), ApplyError> {
    for family in Family::of(netns)? {
        let mut batch = String::new();
        for rule in rules(netns, family).await? {
            if rule.is_ours() {
                batch.push_str(&format!(
                    "rule del pref {ROUTE_TABLE} fwmark {MARK:#x}/{MARK_MASK:#x} lookup {ROUTE_TABLE}\n"
                ));
            }
        }
        if !routes(netns, family).await?.is_empty() {
            batch.push_str(&format!("route flush table {ROUTE_TABLE}\n"));
        }
        if !batch.is_empty() {
            run_in(netns, "ip", &[family.flag(), "-batch", "-"], &batch).await?;
        }
    }
    Ok(())
}

async fn rules(netns: &NetNs, family: Family) -> Result<Vec<Rule>, ApplyError> {
    let output = run_in(netns, "ip", &[family.flag(), "-json", "rule", "show"], "").await?;
    parse(&output)
}

async fn routes(netns: &NetNs, family: Family) -> Result<Vec<Route>, ApplyError> {
    let table = ROUTE_TABLE.to_string();
    let arguments = [
        family.flag(),
        "-json",
        "route",
        "show",
        "table",
        table.as_str(),
    ];
    match run_in(netns, "ip", &arguments, "").await {
        Ok(output) => parse(&output),
        // A table that never had a route does not exist.
        Err(crate::CommandError::Failed { message, .. }) if message.contains("does not exist") => {
            Ok(Vec::new())
        }
        Err(error) => Err(error.into()),
    }
}

fn parse<T: for<'de> Deserialize<'de>>(output: &[u8]) -> Result<Vec<T>, ApplyError> {
    if output.trim_ascii().is_empty() {
        return Ok(Vec::new());
    }
    serde_json::from_slice(output).map_err(|source| ApplyError::Output {
        program: "ip",
        source,
    })
}
