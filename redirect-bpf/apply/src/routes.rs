// SPDX-License-Identifier: Apache-2.0
//! The way back over `lo`: packets marked [`MARK`] are looked up in a table of our own, where every address is local.

use crate::backend::{ApplyError, VerifyError};
use crate::connections::Addresses;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::route::{
    RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use podveil_model::{VERIFICATION_V4, VERIFICATION_V6};
use podveil_netns::netlink::Netlink;
use podveil_netns::{NetNs, NetNsError};
use podveil_plan::{MARK, MARK_MASK, ROUTE_TABLE};
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
    pub fn of(netns: &NetNs, addresses: &Addresses) -> Result<Self, NetNsError> {
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
                addresses.has(ip).then_some(ip)
            };
            let first = |is_v4: bool| {
                let mut usable: Vec<IpAddr> = (addresses.iter())
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

/// Routes before the rule, so that no packet meets an empty table. The blackhole stands in for the local route if
/// somebody deletes that one: an answer must not fall through to the main table and leave the pod.
pub fn ensure(netns: &NetNs, sources: Sources) -> Result<(), ApplyError> {
    for family in Family::of(netns)? {
        let kernel = Kernel::open(netns, family)?;
        let replace = NLM_F_CREATE | NLM_F_REPLACE;
        for route in [local(family, sources.family(family)), blackhole(family)] {
            kernel.change(RouteNetlinkMessage::NewRoute(route), replace)?;
        }
        if !kernel.has_rule()? {
            let rule = RouteNetlinkMessage::NewRule(rule(family));
            kernel.change(rule, NLM_F_CREATE | NLM_F_EXCL)?;
        }
    }
    Ok(())
}

pub fn verify(netns: &NetNs, sources: Sources) -> Result<(), VerifyError> {
    for family in Family::of(netns).map_err(ApplyError::from)? {
        let kernel = Kernel::open(netns, family)?;
        let missing = |what| VerifyError::Route {
            version: family.version(),
            what,
        };
        if !kernel.has_rule()? {
            return Err(missing("rule"));
        }
        let wanted = local(family, sources.family(family));
        if !kernel.routes()?.iter().any(|route| is_same(route, &wanted)) {
            return Err(missing("route"));
        }
    }
    Ok(())
}

pub fn stand(netns: &NetNs) -> Result<bool, ApplyError> {
    for family in Family::of(netns)? {
        let kernel = Kernel::open(netns, family)?;
        if kernel.has_rule()? || !kernel.routes()?.is_empty() {
            return Ok(true);
        }
    }
    Ok(false)
}

pub fn remove(netns: &NetNs) -> Result<(), ApplyError> {
    for family in Family::of(netns)? {
        let kernel = Kernel::open(netns, family)?;
        for _ in 0..kernel.rules()? {
            kernel.change(RouteNetlinkMessage::DelRule(rule(family)), 0)?;
        }
        for route in kernel.routes()? {
            kernel.change(RouteNetlinkMessage::DelRoute(route), 0)?;
        }
    }
    Ok(())
}

/// The routes and rules of one family in one namespace, those of ours.
struct Kernel {
    netlink: Netlink<RouteNetlinkMessage>,
    family: Family,
}

impl Kernel {
    fn open(netns: &NetNs, family: Family) -> Result<Self, ApplyError> {
        let netlink = Netlink::open(netns, NETLINK_ROUTE).map_err(ApplyError::Routes)?;
        Ok(Self { netlink, family })
    }

    fn change(&self, request: RouteNetlinkMessage, flags: u16) -> Result<(), ApplyError> {
        (self.netlink.change(request, flags)).map_err(ApplyError::Routes)
    }

    fn has_rule(&self) -> Result<bool, ApplyError> {
        Ok(self.rules()? > 0)
    }

    fn rules(&self) -> Result<usize, ApplyError> {
        let mut question = RuleMessage::default();
        question.header.family = self.family.into();
        let answers = self.netlink.list(RouteNetlinkMessage::GetRule(question));
        let ours = rule(self.family);
        Ok((answers.map_err(ApplyError::Routes)?.iter())
            .filter(|answer| {
                matches!(answer, RouteNetlinkMessage::NewRule(rule)
                    if ours.attributes.iter().all(|one| rule.attributes.contains(one)))
            })
            .count())
    }

    fn routes(&self) -> Result<Vec<RouteMessage>, ApplyError> {
        let mut question = RouteMessage::default();
        question.header.address_family = self.family.into();
        question.attributes = vec![RouteAttribute::Table(ROUTE_TABLE)];
        match self.netlink.list(RouteNetlinkMessage::GetRoute(question)) {
            Ok(answers) => Ok((answers.into_iter())
                .filter_map(|answer| match answer {
                    RouteNetlinkMessage::NewRoute(route) => Some(route),
                    _ => None,
                })
                .collect()),
            // A table that never had a route does not exist.
            Err(error) if error.raw_os_error() == Some(nix::libc::ENOENT) => Ok(Vec::new()),
            Err(error) => Err(ApplyError::Routes(error)),
        }
    }
}

impl From<Family> for AddressFamily {
    fn from(family: Family) -> Self {
        match family {
            Family::V4 => Self::Inet,
            Family::V6 => Self::Inet6,
        }
    }
}

fn rule(family: Family) -> RuleMessage {
    let mut rule = RuleMessage::default();
    rule.header.family = family.into();
    rule.header.action = RuleAction::ToTable;
    rule.attributes = vec![
        RuleAttribute::Priority(ROUTE_TABLE),
        RuleAttribute::FwMark(MARK),
        RuleAttribute::FwMask(MARK_MASK),
        RuleAttribute::Table(ROUTE_TABLE),
    ];
    rule
}

/// `lo` has this number in every namespace.
const LOOPBACK: u32 = 1;
/// Last: the higher, the later.
const BLACKHOLE_METRIC: u32 = 9999;

fn local(family: Family, source: Option<IpAddr>) -> RouteMessage {
    let mut route = default_route(family, RouteType::Local, RouteScope::Host);
    route.attributes.push(RouteAttribute::Oif(LOOPBACK));
    if let Some(source) = source {
        let source = RouteAttribute::PrefSource(source.into());
        route.attributes.push(source);
    }
    route
}

fn blackhole(family: Family) -> RouteMessage {
    let mut route = default_route(family, RouteType::BlackHole, RouteScope::Universe);
    let metric = RouteAttribute::Priority(BLACKHOLE_METRIC);
    route.attributes.push(metric);
    route
}

fn default_route(family: Family, kind: RouteType, scope: RouteScope) -> RouteMessage {
    let mut route = RouteMessage::default();
    route.header.address_family = family.into();
    route.header.protocol = RouteProtocol::Boot;
    route.header.kind = kind;
    route.header.scope = scope;
    route.attributes = vec![RouteAttribute::Table(ROUTE_TABLE)];
    route
}

/// The kernel tells more of a route than it was given.
fn is_same(found: &RouteMessage, wanted: &RouteMessage) -> bool {
    let source = |route: &RouteMessage| {
        let is_source = |one: &&RouteAttribute| matches!(one, RouteAttribute::PrefSource(_));
        route.attributes.iter().find(is_source).cloned()
    };
    found.header.kind == wanted.header.kind
        && found.header.destination_prefix_length == wanted.header.destination_prefix_length
        && (wanted.attributes.iter()).all(|one| found.attributes.contains(one))
        && source(found) == source(wanted)
}
