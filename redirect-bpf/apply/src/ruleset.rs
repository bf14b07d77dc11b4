// SPDX-License-Identifier: Apache-2.0
//! The rules themselves: a capture as chains of commented rules, and these as a script for `nft -f -`.
//!
//! nft 1.0.6 wants every brace of a block on a line of its own. Every rule has a comment that no other rule of its
//! chain has, for the operator who reads them.

use crate::Connection;
use podveil_model::{HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT};
use podveil_netns::cgroup::CgroupPath;
use podveil_plan::{Capture, Fence, FenceChange, MARK, MARK_MASK, OWN_MARK, Phase, VERIFY_MARK};
use std::collections::BTreeSet;
use std::fmt::Write;
use std::net::IpAddr;

pub const TABLE: &str = "inet podveil";
/// Stands exactly when the connections older than capture have been recorded.
pub const FENCE_CHAIN: &str = "fence_out";
const FENCE_CHAINS: [&str; 3] = [FENCE_CHAIN, "fence_in", "fence_out_enrolled"];
pub const OLDER_SETS: [&str; 2] = ["older4", "older6"];
const SETS: [(&str, &str); 6] = [
    ("enrolled4", "ipv4_addr"),
    ("enrolled6", "ipv6_addr"),
    ("mandatory4", "ipv4_addr"),
    ("mandatory6", "ipv6_addr"),
    (
        OLDER_SETS[0],
        "ipv4_addr . inet_service . ipv4_addr . inet_service",
    ),
    (
        OLDER_SETS[1],
        "ipv6_addr . inet_service . ipv6_addr . inet_service",
    ),
];
pub const COUNTERS: [&str; 3] = ["fence_out", "fence_in", "lost_reply"];
/// How long conntrack keeps a connection of which one direction has ended, in seconds: as long as the kernel keeps an open
/// one (five days). The proxy holds one of the ends, so that it is a socket that ends it, not a clock. The kernel's own
/// minute or two would lose the answer to a request that ended with a FIN and takes longer.
const HALF_CLOSED_SECONDS: u32 = 5 * 24 * 60 * 60;
const HALF_CLOSED: [(&str, &str, &str); 2] = [
    ("half_closed4", "ip", "ipv4"),
    ("half_closed6", "ip6", "ipv6"),
];
/// A SYN that opens a connection; everything else belongs to one that is older than the rule that looks at it.
const SYN: &str = "tcp flags & (fin|syn|rst|ack) == syn";

/// One chain and what hangs in it.
#[derive(Debug)]
pub struct Chain {
    pub name: &'static str,
    /// `type .. hook .. priority ..`, or nothing for a chain that another one goes to.
    hook: Option<&'static str>,
    rules: Vec<Rule>,
}

#[derive(Debug)]
struct Rule {
    statement: String,
    comment: &'static str,
}

impl Chain {
    fn new(name: &'static str, hook: &'static str) -> Self {
        Self {
            name,
            hook: (!hook.is_empty()).then_some(hook),
            rules: Vec::new(),
        }
    }

    fn rule(mut self, statement: impl Into<String>, comment: &'static str) -> Self {
        let statement = statement.into();
        self.rules.push(Rule { statement, comment });
        self
    }

    fn rule_if(self, condition: bool, statement: impl Into<String>, comment: &'static str) -> Self {
        match condition {
            true => self.rule(statement, comment),
            false => self,
        }
    }

    fn ports(
        self,
        match_: &str,
        ports: &BTreeSet<u16>,
        verdict: &str,
        comment: &'static str,
    ) -> Self {
        let list: Vec<String> = ports.iter().map(u16::to_string).collect();
        self.rule_if(
            !ports.is_empty(),
            format!("{match_} {{ {} }} {verdict}", list.join(", ")),
            comment,
        )
    }

    /// Conntrack takes a timeout with a connection's first packet only.
    fn half_closed(self) -> Self {
        HALF_CLOSED
            .into_iter()
            .fold(self, |chain, (name, _, nfproto)| {
                chain.rule(
                format!(
                    "meta l4proto tcp ct state new meta nfproto {nfproto} ct timeout set \"{name}\""
                ),
                name,
            )
            })
    }

    fn write(&self, script: &mut String) {
        let _ = writeln!(script, "\tchain {} {{", self.name);
        if let Some(hook) = self.hook {
            let _ = writeln!(script, "\t\t{hook}; policy accept;");
        }
        for Rule { statement, comment } in &self.rules {
            let _ = writeln!(script, "\t\t{statement} comment \"{comment}\"");
        }
        script.push_str("\t}\n");
    }

    #[cfg(test)]
    fn comments(&self) -> impl Iterator<Item = &'static str> {
        self.rules.iter().map(|rule| rule.comment)
    }
}

/// The chains of a capture, the fence's only if it is to stand.
pub fn chains(capture: &Capture, cgroup: &CgroupPath, fenced: bool) -> Vec<Chain> {
    let proxy = format!("socket cgroupv2 level {} \"{}\"", cgroup.level, cgroup.path);
    let capturing = capture.phase == Phase::Capturing;
    let mut chains = vec![
        Chain::new("clean_marks", "type filter hook prerouting priority -150").rule(
            format!("iifname != \"lo\" meta mark & {MARK_MASK:#x} == {MARK:#x} meta mark set 0x0"),
            "a mark that came in proves nothing",
        )
        .half_closed(),
        Chain::new("own_connections", "type filter hook output priority -160")
            .rule(
                format!(
                    "meta l4proto tcp ct state new oifname \"lo\" {proxy} ct mark set {MARK:#x}"
                ),
                "proxy to application",
            )
            .rule(
                format!(
                    "meta l4proto tcp ct state new oifname != \"lo\" {proxy} ct mark set {OWN_MARK:#x}"
                ),
                "proxy to peers",
            )
            .half_closed(),
        Chain::new("local_replies", "type route hook output priority -150").rule(
            format!("meta l4proto tcp ct mark {MARK:#x} ct direction reply meta mark set {MARK:#x}"),
            "application to proxy, whatever client address was kept",
        ),
        Chain::new("lost_replies", "type filter hook postrouting priority 0").rule(
            format!(
                "oifname != \"lo\" meta l4proto tcp ct mark {MARK:#x} ct direction reply counter name lost_reply drop"
            ),
            "an answer to the proxy never leaves the pod",
        ),
    ];
    let mut out = Chain::new("capture_out", "type nat hook output priority -100");
    let mut inward = Chain::new("capture_in", "type nat hook prerouting priority -100");
    if capturing {
        out = out
            .rule("meta l4proto != tcp return", "TCP only")
            .rule("oifname \"lo\" return", "to itself")
            .rule(
                "ip daddr { 127.0.0.0/8, 169.254.0.0/16 } return",
                "loopback and link-local, never a peer",
            )
            .rule(
                "ip6 daddr { ::1, fe80::/10 } return",
                "loopback and link-local, never a peer (IPv6)",
            )
            .rule(
                format!("meta mark != {VERIFY_MARK:#x} {proxy} return"),
                "the proxy's own sockets",
            )
            .ports(
                "tcp dport",
                &capture.exclude_outbound_ports,
                "return",
                "podveil.io/exclude-outbound-ports",
            )
            .rule(
                format!("{SYN} redirect to :{OUTBOUND_PORT}"),
                "to the proxy",
            );
        inward = inward
            .rule("meta l4proto != tcp return", "TCP only")
            .rule("iifname \"lo\" return", "to itself")
            .rule(format!("tcp dport {HBONE_PORT} return"), "tunnels")
            .ports(
                "tcp dport",
                &capture.exclude_inbound_ports,
                "return",
                "podveil.io/exclude-inbound-ports",
            )
            .rule(
                format!("{SYN} fib daddr type local redirect to :{INBOUND_PORT}"),
                "to the proxy, if for this pod",
            );
    }
    chains.extend([out, inward]);
    if capturing && fenced {
        chains.extend(fence(capture, &proxy));
    }
    chains
}

fn fence(capture: &Capture, proxy: &str) -> [Chain; 3] {
    let open: BTreeSet<u16> = &capture.exclude_inbound_ports | &capture.plain_inbound_ports;
    let refuse = "counter name fence_in reject with tcp reset";
    [
        Chain::new("fence_out_enrolled", "")
            .rule(format!("ct mark {OWN_MARK:#x} accept"), "proxy to peers")
            .rule(
                format!("ct mark {MARK:#x} meta mark {MARK:#x} accept"),
                "application to proxy, goes to lo",
            )
            .rule(format!("{proxy} accept"), "the proxy's own sockets")
            .rule(
                format!("tcp sport {{ {INBOUND_PORT}, {HBONE_PORT} }} accept"),
                "the proxy's listeners",
            )
            .rule(
                "tcp flags & rst == rst meta length < 100 accept",
                "a reset, which carries no data",
            )
            .ports(
                "tcp dport",
                &capture.exclude_outbound_ports,
                "accept",
                "podveil.io/exclude-outbound-ports",
            )
            .ports(
                "tcp sport",
                &capture.exclude_inbound_ports,
                "accept",
                "podveil.io/exclude-inbound-ports",
            )
            .rule(
                "ip saddr . tcp sport . ip daddr . tcp dport @older4 accept",
                "older than capture",
            )
            .rule(
                "ip6 saddr . tcp sport . ip6 daddr . tcp dport @older6 accept",
                "older than capture (IPv6)",
            )
            .rule(
                "counter name fence_out reject with tcp reset",
                "plaintext to an enrolled address",
            ),
        Chain::new("fence_out", "type filter hook output priority 0")
            .rule("meta l4proto != tcp accept", "TCP only")
            .rule("oifname \"lo\" accept", "stays in the pod")
            .rule(
                "ip daddr @enrolled4 goto fence_out_enrolled",
                "to an enrolled address",
            )
            .rule(
                "ip6 daddr @enrolled6 goto fence_out_enrolled",
                "to an enrolled address (IPv6)",
            ),
        Chain::new("fence_in", "type filter hook prerouting priority -110")
            .rule("meta l4proto != tcp accept", "TCP only")
            .rule("iifname \"lo\" accept", "stays in the pod")
            .rule(format!("tcp dport {HBONE_PORT} accept"), "tunnels")
            .ports("tcp dport", &open, "accept", "excluded and plain ports")
            .rule_if(
                capture.refuses_plain,
                format!("{SYN} ip saddr @mandatory4 {refuse}"),
                "plaintext from a mandatory workload",
            )
            .rule_if(
                capture.refuses_plain,
                format!("{SYN} ip6 saddr @mandatory6 {refuse}"),
                "plaintext from a mandatory workload (IPv6)",
            ),
    ]
}

/// The fence of this capture, in a table that was written without it.
pub fn add_fence(capture: &Capture, cgroup: &CgroupPath) -> String {
    let standing = chains(capture, cgroup, false).len();
    let mut script = format!("table {TABLE} {{\n");
    for chain in chains(capture, cgroup, true).iter().skip(standing) {
        chain.write(&mut script);
    }
    script.push_str("}\n");
    script
}

/// A script that makes the table hold exactly `chains`, whatever it held. Sets and counters keep their content.
pub fn script(chains: &[Chain], cgroup: &CgroupPath) -> String {
    // A table takes its comment from the statement that makes it.
    let mut script = format!(
        "table {TABLE} {{\n\t{}\n}}\nflush table {TABLE}\ntable {TABLE} {{\n",
        owner(cgroup)
    );
    for (name, kind) in SETS {
        let _ = writeln!(script, "\tset {name} {{\n\t\ttype {kind}\n\t}}");
    }
    for name in COUNTERS {
        let _ = writeln!(script, "\tcounter {name} {{\n\t}}");
    }
    for (name, l3proto, _) in HALF_CLOSED {
        let _ = writeln!(
            script,
            "\tct timeout {name} {{\n\t\tprotocol tcp\n\t\tl3proto {l3proto}\n\t\tpolicy = {{ fin_wait : {HALF_CLOSED_SECONDS}, close_wait : {HALF_CLOSED_SECONDS} }}\n\t}}"
        );
    }
    // Declared even if not wanted, so that the deletion below always finds them.
    let unwanted: Vec<&str> = FENCE_CHAINS
        .into_iter()
        .filter(|name| !chains.iter().any(|chain| chain.name == *name))
        .collect();
    for name in &unwanted {
        let _ = writeln!(script, "\tchain {name} {{\n\t}}");
    }
    chains.iter().for_each(|chain| chain.write(&mut script));
    script.push_str("}\n");
    for name in unwanted {
        let _ = writeln!(script, "delete chain {TABLE} {name}");
    }
    script
}

/// Whose table it is, as the listing shows it: several simulated nodes may live on one machine.
pub fn owner(cgroup: &CgroupPath) -> String {
    format!(
        "comment \"Podveil capture and fence, proxy in {}\"",
        cgroup.path
    )
}

/// Replaces the addresses behind the fence.
pub fn replace_fence(fence: &Fence) -> String {
    let mut script = String::new();
    for (name, _) in &SETS[..4] {
        let _ = writeln!(script, "flush set {TABLE} {name}");
    }
    fence_elements(&mut script, "add", fence);
    script
}

pub fn change_fence(change: &FenceChange) -> String {
    let mut script = String::new();
    fence_elements(&mut script, "delete", &change.remove);
    fence_elements(&mut script, "add", &change.add);
    script
}

fn fence_elements(script: &mut String, verb: &str, fence: &Fence) {
    for (set, addresses) in [
        ("enrolled", &fence.enrolled),
        ("mandatory", &fence.mandatory),
    ] {
        for (version, is_v4) in [(4, true), (6, false)] {
            let list = addresses.iter().filter(|ip| ip.is_ipv4() == is_v4);
            elements(
                script,
                verb,
                &format!("{set}{version}"),
                list.map(IpAddr::to_string),
            );
        }
    }
}

/// Both families' connections older than capture, as the packets that the pod sends on them.
pub fn older(verb: &str, connections: &BTreeSet<Connection>) -> String {
    let mut script = String::new();
    for (set, is_v4) in OLDER_SETS.into_iter().zip([true, false]) {
        let list = connections
            .iter()
            .filter(|c| c.local.is_ipv4() == is_v4 && c.remote.is_ipv4() == is_v4);
        elements(
            &mut script,
            verb,
            set,
            list.map(|Connection { local, remote }| {
                format!(
                    "{} . {} . {} . {}",
                    local.ip(),
                    local.port(),
                    remote.ip(),
                    remote.port()
                )
            }),
        );
    }
    script
}

pub fn forget_older() -> String {
    OLDER_SETS
        .iter()
        .map(|set| format!("flush set {TABLE} {set}\n"))
        .collect()
}

fn elements(script: &mut String, verb: &str, set: &str, list: impl Iterator<Item = String>) {
    let list: Vec<String> = list.collect();
    for part in list.chunks(500) {
        let _ = writeln!(
            script,
            "{verb} element {TABLE} {set} {{ {} }}",
            part.join(", ")
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cgroup() -> CgroupPath {
        CgroupPath {
            level: 1,
            path: "unified/podveil-n1".into(),
        }
    }

    fn capture(phase: Phase) -> Capture {
        Capture {
            phase,
            exclude_outbound_ports: [25, 5432].into(),
            exclude_inbound_ports: [9090].into(),
            plain_inbound_ports: [8443].into(),
            refuses_plain: true,
        }
    }

    #[test]
    fn comments_are_unique_in_their_chain() {
        for chain in chains(&capture(Phase::Capturing), &cgroup(), true) {
            let all: Vec<_> = chain.comments().collect();
            let unique: BTreeSet<_> = all.iter().collect();
            assert_eq!(all.len(), unique.len(), "{}", chain.name);
            assert!(all.iter().all(|comment| comment.len() < 128));
        }
    }

    #[test]
    fn ports_and_cgroup_are_written() {
        let script = script(
            &chains(&capture(Phase::Capturing), &cgroup(), true),
            &cgroup(),
        );
        for line in [
            "socket cgroupv2 level 1 \"unified/podveil-n1\" return",
            "tcp dport { 25, 5432 } return",
            "tcp dport { 9090 } return",
            "tcp dport { 8443, 9090 } accept",
            "redirect to :15001",
            "redirect to :15006",
        ] {
            assert!(script.contains(line), "{line}");
        }
    }

    #[test]
    fn releasing_redirects_nothing_and_keeps_the_way_back() {
        let chains = chains(&capture(Phase::Releasing), &cgroup(), true);
        let script = script(&chains, &cgroup());
        assert!(!script.contains("redirect to"));
        assert!(script.contains("type nat hook output"));
        assert!(script.contains("chain local_replies"));
        assert!(script.contains("delete chain inet podveil fence_out\n"));
    }

    #[test]
    fn a_change_of_the_fence_touches_only_its_elements() {
        let change = FenceChange {
            add: Fence {
                enrolled: ["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()].into(),
                mandatory: BTreeSet::new(),
            },
            remove: Fence {
                enrolled: BTreeSet::new(),
                mandatory: ["10.0.0.2".parse().unwrap()].into(),
            },
        };
        assert_eq!(
            change_fence(&change),
            "delete element inet podveil mandatory4 { 10.0.0.2 }\n\
             add element inet podveil enrolled4 { 10.0.0.1 }\n\
             add element inet podveil enrolled6 { fd00::1 }\n"
        );
    }
}
