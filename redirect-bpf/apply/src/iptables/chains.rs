// SPDX-License-Identifier: Apache-2.0
//! The rules as scripts for `iptables-restore --noflush` and `ipset restore`: those of `ruleset.rs`, in the words of
//! iptables. `nftables.rs` says why each is as it is; what iptables cannot say is at [`super::Iptables`].

use crate::Connection;
use crate::routes::Family;
use podveil_model::{HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT};
use podveil_netns::cgroup::CgroupPath;
use podveil_plan::{Capture, Fence, FenceChange, MARK, MARK_MASK, OWN_MARK, Phase, VERIFY_MARK};
use std::collections::BTreeSet;
use std::fmt::Write;
use std::net::IpAddr;

/// Every chain of ours begins so, and nobody else's.
pub const PREFIX: &str = "PODVEIL_";
pub const SET_PREFIX: &str = "podveil_";
/// Holds a rule exactly when the connections older than capture have been recorded.
pub const FENCE: &str = "PODVEIL_FENCE";
/// Those connections, and at its end what becomes of all others.
pub const OLDER: &str = "PODVEIL_OLDER";
pub const FENCE_IN: &str = "PODVEIL_FENCE_IN";
pub const LOST: &str = "PODVEIL_LOST";
/// From a chain of the kernel's to one of ours, by table.
pub const JUMPS: [(&str, &str, &str); 7] = [
    ("mangle", "PREROUTING", "PODVEIL_CLEAN"),
    ("mangle", "OUTPUT", "PODVEIL_MARKS"),
    ("mangle", "POSTROUTING", LOST),
    ("nat", "OUTPUT", "PODVEIL_CAPTURE"),
    ("nat", "PREROUTING", "PODVEIL_CAPTURE_IN"),
    ("filter", "OUTPUT", FENCE),
    ("filter", "INPUT", FENCE_IN),
];
const FENCE_TO: &str = "PODVEIL_FENCE_TO";

/// A capture in one address family.
pub struct Rules<'a> {
    pub capture: &'a Capture,
    pub cgroup: &'a CgroupPath,
    pub family: Family,
}

impl Rules<'_> {
    /// The path from the root of cgroup2, wherever that is mounted.
    fn proxy(&self) -> String {
        let parts: Vec<&str> = self.cgroup.path.split('/').collect();
        let own = parts.len().saturating_sub(self.cgroup.level as usize);
        format!("-m cgroup --path {}", parts[own..].join("/"))
    }

    /// Whose rules they are, as a jump shows it: several simulated nodes may live on one machine.
    pub fn owner(&self) -> String {
        format!("Podveil, proxy in {}", self.cgroup.path)
    }

    /// Marks and the way back, which stand as long as anything does.
    pub fn mangle(&self) -> Table {
        let proxy = self.proxy();
        table(
            "mangle",
            &["PODVEIL_CLEAN", "PODVEIL_MARKS", LOST],
            &[
                format!(
                    "PODVEIL_CLEAN ! -i lo -m mark --mark {MARK:#x}/{MARK_MASK:#x} -j MARK --set-mark 0"
                ),
                format!(
                    "PODVEIL_MARKS -p tcp -o lo -m conntrack --ctstate NEW {proxy} -j CONNMARK --set-mark {MARK:#x}"
                ),
                format!(
                    "PODVEIL_MARKS -p tcp ! -o lo -m conntrack --ctstate NEW {proxy} -j CONNMARK --set-mark {OWN_MARK:#x}"
                ),
                format!(
                    "PODVEIL_MARKS -p tcp -m connmark --mark {MARK:#x} -m conntrack --ctdir REPLY -j MARK --set-mark {MARK:#x}"
                ),
                format!(
                    "{LOST} -p tcp ! -o lo -m connmark --mark {MARK:#x} -m conntrack --ctdir REPLY -j DROP"
                ),
            ],
        )
    }

    /// Capture itself; empty while releasing, when translation goes on for those connections that have it.
    pub fn nat(&self) -> Table {
        let mut rules = Vec::new();
        if self.capture.phase == Phase::Capturing {
            let out = "PODVEIL_CAPTURE";
            rules.push(format!("{out} ! -p tcp -j RETURN"));
            rules.push(format!("{out} -o lo -j RETURN"));
            let nearby: &[&str] = match self.family {
                Family::V4 => &["127.0.0.0/8", "169.254.0.0/16"],
                Family::V6 => &["::1/128", "fe80::/10"],
            };
            rules.extend(nearby.iter().map(|ips| format!("{out} -d {ips} -j RETURN")));
            rules.push(format!(
                "{out} -m mark ! --mark {VERIFY_MARK:#x} {} -j RETURN",
                self.proxy()
            ));
            rules.extend(ports(out, "--dport", &self.capture.exclude_outbound_ports));
            rules.push(format!(
                "{out} -p tcp --syn -j REDIRECT --to-ports {OUTBOUND_PORT}"
            ));
            let inward = "PODVEIL_CAPTURE_IN";
            rules.push(format!("{inward} ! -p tcp -j RETURN"));
            rules.push(format!("{inward} -i lo -j RETURN"));
            rules.extend(ports(inward, "--dport", &[HBONE_PORT].into()));
            rules.extend(ports(
                inward,
                "--dport",
                &self.capture.exclude_inbound_ports,
            ));
            rules.push(format!(
                "{inward} -p tcp --syn -m addrtype --dst-type LOCAL -j REDIRECT --to-ports {INBOUND_PORT}"
            ));
        }
        table("nat", &["PODVEIL_CAPTURE", "PODVEIL_CAPTURE_IN"], &rules)
    }

    /// The fence; empty where `older` is not known, and while releasing.
    pub fn filter(&self, older: Option<&BTreeSet<Connection>>) -> Table {
        let mut rules = Vec::new();
        if let (Some(older), Phase::Capturing) = (older, self.capture.phase) {
            self.fence(&mut rules, older);
        }
        table("filter", &[OLDER, FENCE_TO, FENCE, FENCE_IN], &rules)
    }

    fn fence(&self, rules: &mut Vec<String>, older: &BTreeSet<Connection>) {
        let [enrolled, mandatory] = set_names(self.family);
        rules.push(format!(
            "{FENCE} -p tcp ! -o lo -m set --match-set {enrolled} dst -g {FENCE_TO}"
        ));
        rules.push(format!(
            "{FENCE_TO} -m connmark --mark {OWN_MARK:#x} -j RETURN"
        ));
        rules.push(format!(
            "{FENCE_TO} -m connmark --mark {MARK:#x} -m mark --mark {MARK:#x} -j RETURN"
        ));
        rules.push(format!("{FENCE_TO} {} -j RETURN", self.proxy()));
        rules.extend(ports(
            FENCE_TO,
            "--sport",
            &[INBOUND_PORT, HBONE_PORT].into(),
        ));
        rules.push(format!(
            "{FENCE_TO} -p tcp --tcp-flags RST RST -m length --length 0:99 -j RETURN"
        ));
        rules.extend(ports(
            FENCE_TO,
            "--dport",
            &self.capture.exclude_outbound_ports,
        ));
        rules.extend(ports(
            FENCE_TO,
            "--sport",
            &self.capture.exclude_inbound_ports,
        ));
        rules.push(format!("{FENCE_TO} -g {OLDER}"));
        rules.extend(older.iter().filter(|one| self.has(one)).map(one_older));
        rules.push(format!("{OLDER} -p tcp -j REJECT --reject-with tcp-reset"));
        rules.push(format!("{FENCE_IN} ! -p tcp -j RETURN"));
        rules.push(format!("{FENCE_IN} -i lo -j RETURN"));
        let open = &self.capture.exclude_inbound_ports | &self.capture.plain_inbound_ports;
        // After translation; what the peer dialled is in conntrack.
        for port in open.iter().chain(&[HBONE_PORT]) {
            rules.push(format!(
                "{FENCE_IN} -p tcp -m conntrack --ctorigdstport {port} -j RETURN"
            ));
        }
        if self.capture.refuses_plain {
            rules.push(format!(
                "{FENCE_IN} -p tcp --syn -m set --match-set {mandatory} src -j REJECT --reject-with tcp-reset"
            ));
        }
    }

    pub fn has(&self, connection: &Connection) -> bool {
        is_of(self.family, connection.remote.ip())
    }
}

fn one_older(connection: &Connection) -> String {
    format!(
        "{OLDER} -s {} -d {} -p tcp --sport {} --dport {} -j RETURN",
        connection.local.ip(),
        connection.remote.ip(),
        connection.local.port(),
        connection.remote.port()
    )
}

/// Takes connections that have ended out of the fence.
pub fn forget(ended: &[&Connection]) -> String {
    let rules: String = ended
        .iter()
        .map(|one| format!("-D {}\n", one_older(one)))
        .collect();
    format!("*filter\n{rules}COMMIT\n")
}

fn ports(chain: &str, which: &str, ports: &BTreeSet<u16>) -> Vec<String> {
    let rule = |port| format!("{chain} -p tcp {which} {port} -j RETURN");
    ports.iter().map(rule).collect()
}

/// One table's chains and their rules.
#[derive(Debug)]
pub struct Table {
    pub name: &'static str,
    /// Lines of the script.
    lines: String,
}

impl Table {
    /// Writes it in one step, with these lines at its end.
    pub fn script(&self, more: &str) -> String {
        format!("*{}\n{}{more}COMMIT\n", self.name, self.lines)
    }
}

/// A table's chains, emptied, with these rules.
fn table(name: &'static str, chains: &[&str], rules: &[String]) -> Table {
    let mut lines = String::new();
    for chain in chains {
        let _ = writeln!(lines, ":{chain} - [0:0]");
    }
    for rule in rules {
        let _ = writeln!(lines, "-A {rule}");
    }
    Table { name, lines }
}

pub fn is_of(family: Family, ip: IpAddr) -> bool {
    match family {
        Family::V4 => ip.is_ipv4(),
        Family::V6 => ip.is_ipv6(),
    }
}

/// Of enrolled, and of mandatory peers.
pub fn set_names(family: Family) -> [String; 2] {
    ["enrolled", "mandatory"].map(|kind| format!("{SET_PREFIX}{kind}{}", family.version()))
}

fn create(name: &str, family: Family) -> String {
    let family = match family {
        Family::V4 => "inet",
        Family::V6 => "inet6",
    };
    format!("create {name} hash:ip family {family} maxelem 1048576\n")
}

pub fn create_sets(families: &[Family]) -> String {
    let of = |family: &Family| {
        set_names(*family)
            .map(|name| create(&name, *family))
            .concat()
    };
    families.iter().map(of).collect()
}

/// Replaces the addresses behind the fence, each set at once.
pub fn replace_sets(families: &[Family], fence: &Fence) -> String {
    let mut script = create_sets(families);
    for family in families {
        for (name, ips) in set_names(*family)
            .iter()
            .zip([&fence.enrolled, &fence.mandatory])
        {
            let next = format!("{name}_next");
            script += &create(&next, *family);
            let _ = writeln!(script, "flush {next}");
            for ip in ips.iter().filter(|ip| is_of(*family, **ip)) {
                let _ = writeln!(script, "add {next} {ip}");
            }
            let _ = write!(script, "swap {next} {name}\ndestroy {next}\n");
        }
    }
    script
}

pub fn change_sets(families: &[Family], change: &FenceChange) -> String {
    let mut script = String::new();
    for (verb, fence) in [("del", &change.remove), ("add", &change.add)] {
        for family in families {
            for (name, ips) in set_names(*family)
                .iter()
                .zip([&fence.enrolled, &fence.mandatory])
            {
                for ip in ips.iter().filter(|ip| is_of(*family, **ip)) {
                    let _ = writeln!(script, "{verb} {name} {ip}");
                }
            }
        }
    }
    script
}
