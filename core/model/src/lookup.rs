// SPDX-License-Identifier: Apache-2.0
use crate::{ServiceKey, Uid};
use podveil_identity::KubernetesName;
use std::fmt;
use std::net::IpAddr;

/// No namespace's name has a dot, so what begins with this is no service's name.
const OURS: &str = "podveil.io/";

/// By what a node asks the control plane for a part of the cluster. A service is answered with the workloads behind it.
///
/// Its text is the name on the wire. The first three are the ambient mesh's, which peers know; the others are ours:
/// `/<ip>`, `<namespace>/<hostname>`, `<uid>`, `podveil.io/node/<node>`, `podveil.io/node-port/<port>`,
/// `podveil.io/host-port/<node>/<port>`.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Lookup {
    /// Whoever has this address, on this cluster's own network.
    Address(IpAddr),
    Service(ServiceKey),
    Workload(Uid),
    /// The workloads that run on a node.
    Node(KubernetesName),
    /// The service that this port of every node leads to.
    NodePort(u16),
    /// The workload that this port of a node leads to.
    HostPort(KubernetesName, u16),
}

impl Lookup {
    /// From the wire. `None`: it is no form of ours, and can only be a resource's own name: a uid, or a service's.
    pub fn parse(name: &str) -> Option<Self> {
        if let Some(ip) = name.strip_prefix('/') {
            return Some(Self::Address(ip.parse().ok()?));
        }
        let (kind, rest) = name.strip_prefix(OURS)?.split_once('/')?;
        match kind {
            "node" => Some(Self::Node(rest.parse().ok()?)),
            "node-port" => Some(Self::NodePort(rest.parse().ok()?)),
            "host-port" => {
                let (node, port) = rest.split_once('/')?;
                Some(Self::HostPort(node.parse().ok()?, port.parse().ok()?))
            }
            _ => None,
        }
    }
}

impl fmt::Display for Lookup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(ip) => write!(f, "/{ip}"),
            Self::Service(key) => key.fmt(f),
            Self::Workload(uid) => uid.fmt(f),
            Self::Node(node) => write!(f, "{OURS}node/{node}"),
            Self::NodePort(port) => write!(f, "{OURS}node-port/{port}"),
            Self::HostPort(node, port) => write!(f, "{OURS}host-port/{node}/{port}"),
        }
    }
}

/// A lookup as it is asked for on demand, once: when it was forgotten and is asked for again it has another number, so that
/// what was still on its way for the first time answers nothing.
///
/// Its text is that of the lookup, `?` and the number. No resource has such a name.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Question<'a> {
    /// The lookup's own text.
    pub about: &'a str,
    pub number: u64,
}

impl<'a> Question<'a> {
    /// From the wire; `None`: it has no number.
    pub fn parse(name: &'a str) -> Option<Self> {
        let (about, number) = name.rsplit_once('?')?;
        let number = number.parse().ok()?;
        Some(Self { about, number })
    }
}

impl fmt::Display for Question<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}?{}", self.about, self.number)
    }
}

/// Of the names of all that a lookup means, in their order: who comes again says by it what was meant when it was last told
/// (FNV-1a, 64 bits).
pub fn digest<'a>(names: impl IntoIterator<Item = &'a str>) -> u64 {
    let bytes = (names.into_iter()).flat_map(|name| name.bytes().chain([0]));
    bytes.fold(0xcbf2_9ce4_8422_2325, |digest, byte| {
        (digest ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        for (lookup, wire) in [
            (Lookup::Address("10.0.0.9".parse().unwrap()), "/10.0.0.9"),
            (Lookup::Address("fd00::9".parse().unwrap()), "/fd00::9"),
            (
                Lookup::Node("n-1.zone".parse().unwrap()),
                "podveil.io/node/n-1.zone",
            ),
            (Lookup::NodePort(30080), "podveil.io/node-port/30080"),
            (
                Lookup::HostPort("n1".parse().unwrap(), 8443),
                "podveil.io/host-port/n1/8443",
            ),
        ] {
            assert_eq!(lookup.to_string(), wire);
            assert_eq!(Lookup::parse(wire), Some(lookup));
        }
    }

    #[test]
    fn a_question_is_a_lookup_with_a_number() {
        let question = Question {
            about: "/10.0.0.9",
            number: 7,
        };
        assert_eq!(question.to_string(), "/10.0.0.9?7");
        assert_eq!(Question::parse("/10.0.0.9?7"), Some(question));
        assert_eq!(Question::parse("/10.0.0.9"), None);
        assert_eq!(Question::parse("/10.0.0.9?"), None);
    }

    #[test]
    fn digests_differ_where_names_do() {
        let digests = [&["a", "b"][..], &["ab"], &["a"], &["b", "a"], &[]]
            .map(|names| digest(names.iter().copied()));
        for (at, one) in digests.iter().enumerate() {
            assert!(!digests[at + 1..].contains(one));
        }
        assert_eq!(digests[4], 0xcbf2_9ce4_8422_2325, "of nothing");
    }

    #[test]
    fn names_of_resources_are_no_other_form() {
        let key = ServiceKey {
            namespace: "node".parse().unwrap(),
            hostname: "web.node.svc.cluster.local".into(),
        };
        for name in [
            &*Lookup::Service(key).to_string(),
            "Kubernetes//Pod/shop/web-1",
            "0b5d7a1e-9f0c-4f52-8a77-1f6f3f0d8d11",
            "/",
            "/not-an-ip",
            "network/10.0.0.9",
            "podveil.io/node-port/65536",
            "podveil.io/node/Not_A_Name",
            "podveil.io/host-port/n1",
            "podveil.io/other/x",
            "",
        ] {
            assert_eq!(Lookup::parse(name), None, "{name}");
        }
    }
}
