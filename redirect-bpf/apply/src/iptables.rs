// SPDX-License-Identifier: Apache-2.0
mod chains;

use crate::backend::{ApplyError, Backend, FenceCount, Observed, VerifyError};
use crate::command::{CommandError, run_in};
use crate::connections::{Connection, Connections};
use crate::reference::scratch;
use crate::routes::{self, Family};
use crate::{BackEnd, Unusable, conntrack, nfnetlink};
use chains::{Rules, Table};
use podveil_netns::NetNs;
use podveil_netns::cgroup::CgroupPath;
use podveil_plan::{Capture, Fence, FenceStep, Phase};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

/// Past this many scripts all references are forgotten, as in `reference.rs`.
const MAX_SCRIPTS: usize = 256;

/// Which of the two programs called iptables.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Flavour {
    Legacy,
    Nft,
}

/// Capture by NAT in chains of our own (`PODVEIL_*`, by `iptables-restore` and `ip6tables-restore`), with sets of
/// addresses by `ipset`: for nodes whose tools or kernel have no nftables of the kind that [`crate::Nftables`] needs.
///
/// The rules are the same, and so are their reasons. What differs:
///
/// - Each table is written at once, and not all tables together: capture before the fence, and in the reverse order when
///   it ends.
/// - The fence refuses a peer's SYN after translation (iptables has no REJECT before it), by the port that conntrack
///   remembers.
/// - Connections older than capture are a rule each, since no kind of set holds two ports.
/// - Conntrack's patience with half-closed connections is the kernel's own: a minute or two without data in either
///   direction, then what comes is dropped at the pod's edge.
/// - Counters begin again whenever rules are written.
/// - The kernel's own tables of the legacy flavour, once there, stay in the namespace, empty.
#[derive(Clone, Debug)]
pub struct Iptables {
    cgroup: CgroupPath,
    flavour: Flavour,
    references: Arc<Mutex<BTreeMap<String, Arc<Saved>>>>,
}

/// What a namespace holds of ours in one family: rules by table and chain, those of other chains if they lead to ours.
type Saved = BTreeMap<(String, String), Vec<String>>;

impl Iptables {
    pub fn new(cgroup: CgroupPath, flavour: Flavour) -> Self {
        Self {
            cgroup,
            flavour,
            references: Arc::default(),
        }
    }

    /// Does this node take every rule there is?
    /// # Errors
    /// [`Unusable`]: what it lacks.
    pub async fn probe(&self) -> Result<(), Unusable> {
        let everything = Capture {
            phase: Phase::Capturing,
            exclude_outbound_ports: [1].into(),
            exclude_inbound_ports: [2].into(),
            plain_inbound_ports: [3].into(),
            refuses_plain: true,
        };
        for family in [Family::V4, Family::V6] {
            self.reference(&everything, family)
                .await
                .map_err(|error| Unusable::rules(BackEnd::Iptables, &error))?;
        }
        Ok(())
    }

    /// # Errors
    /// When the namespace cannot be read.
    pub async fn has_chains(&self, netns: &NetNs) -> Result<bool, ApplyError> {
        for family in Family::of(netns)? {
            if !self.saved(netns, family).await?.is_empty() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Are there sets, of whichever flavour? Routes come before them and go after them; chains come after and go before. They
    /// are asked for where routes show that anything has been begun with.
    /// # Errors
    /// When the namespace cannot be read.
    pub async fn has_sets(netns: &NetNs) -> Result<bool, ApplyError> {
        Ok(routes::stand(netns)? && !sets(netns).await?.is_empty())
    }

    fn rules<'a>(&'a self, capture: &'a Capture, family: Family) -> Rules<'a> {
        Rules {
            capture,
            cgroup: &self.cgroup,
            family,
        }
    }

    /// One program stands for all of a flavour, by its first argument.
    fn program(&self) -> &'static str {
        match self.flavour {
            Flavour::Legacy => "xtables-legacy-multi",
            Flavour::Nft => "xtables-nft-multi",
        }
    }

    async fn load(&self, netns: &NetNs, family: Family, script: &str) -> Result<(), ApplyError> {
        let restore = match family {
            Family::V4 => "iptables-restore",
            Family::V6 => "ip6tables-restore",
        };
        // Waits for others who hold the lock of the legacy flavour.
        let arguments = [restore, "--noflush", "-w", "5"];
        run_in(netns, self.program(), &arguments, script).await?;
        Ok(())
    }

    async fn saved(&self, netns: &NetNs, family: Family) -> Result<Saved, ApplyError> {
        Ok(parse(&self.text(netns, family).await?))
    }

    async fn text(&self, netns: &NetNs, family: Family) -> Result<String, ApplyError> {
        let save = match family {
            Family::V4 => "iptables-save",
            Family::V6 => "ip6tables-save",
        };
        let output = run_in(netns, self.program(), &[save, "-c"], "").await?;
        Ok(String::from_utf8_lossy(&output).into_owned())
    }

    /// The newer flavour makes the tables that it writes to, and leaves them there. The kernel's own of the legacy one are
    /// always there.
    async fn remove_empty_tables(&self, netns: &NetNs, family: Family) -> Result<(), ApplyError> {
        if self.flavour == Flavour::Legacy {
            return Ok(());
        }
        let text = self.text(netns, family).await?;
        let family = match family {
            Family::V4 => nfnetlink::NFPROTO_IPV4,
            Family::V6 => nfnetlink::NFPROTO_IPV6,
        };
        for table in left_empty(&text) {
            // What is listed need not be there: these are, since we have written to them.
            let chains: Vec<&str> = (chains::JUMPS.iter())
                .filter(|(ours, ..)| *ours == table)
                .map(|(_, chain, _)| *chain)
                .collect();
            let removed = nfnetlink::remove_empty_table(netns, family, table, &chains);
            removed.map_err(|source| ApplyError::Table {
                table: table.to_owned(),
                source,
            })?;
        }
        Ok(())
    }

    /// Writes tables, in this order, each with the jumps into it that are missing: who ends half-way leaves no table of
    /// which it cannot be told whose it is.
    async fn write(
        &self,
        netns: &NetNs,
        rules: &Rules<'_>,
        tables: &[Table],
    ) -> Result<(), ApplyError> {
        let saved = self.saved(netns, rules.family).await?;
        let owner = rules.owner();
        let mut script = String::new();
        for table in tables {
            let missing: String = (chains::JUMPS.iter())
                .filter(|(name, from, to)| {
                    let jump = format!("-j {to}");
                    let held = saved.get(&((*name).into(), (*from).into()));
                    *name == table.name
                        && !held.is_some_and(|held| held.iter().any(|rule| rule.ends_with(&jump)))
                })
                .map(|(_, from, to)| {
                    format!("-I {from} -m comment --comment \"{owner}\" -j {to}\n")
                })
                .collect();
            script += &table.script(&missing);
        }
        self.load(netns, rules.family, &script).await
    }

    /// What stands when nobody has touched it.
    async fn reference(&self, capture: &Capture, family: Family) -> Result<Arc<Saved>, ApplyError> {
        let rules = self.rules(capture, family);
        let nobody = BTreeSet::new();
        let tables = [rules.mangle(), rules.nat(), rules.filter(Some(&nobody))];
        let key = format!("{family:?} {tables:?}");
        let known = || {
            self.references
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
        };
        if let Some(found) = known().get(&key) {
            return Ok(found.clone());
        }
        let scratch = scratch()?;
        ipset(&scratch, &chains::create_sets(&[family])).await?;
        self.write(&scratch, &rules, &tables).await?;
        let saved = Arc::new(self.saved(&scratch, family).await?);
        let mut known = known();
        if known.len() >= MAX_SCRIPTS {
            known.clear();
        }
        known.insert(key, saved.clone());
        Ok(saved)
    }
}

async fn ipset(netns: &NetNs, script: &str) -> Result<(), ApplyError> {
    if !script.is_empty() {
        run_in(netns, "ipset", &["-exist", "restore"], script).await?;
    }
    Ok(())
}

/// Lines like `[1:60] -A CHAIN ...`, with `*table` and `:CHAIN ...` between them.
fn parse(text: &str) -> Saved {
    let mut saved = Saved::new();
    let mut table = "";
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = name;
        } else if let Some(chain) = line.strip_prefix(':') {
            let chain = chain.split(' ').next().unwrap_or_default();
            if chain.starts_with(chains::PREFIX) {
                saved.entry((table.into(), chain.into())).or_default();
            }
        } else if let Some((counted, rule)) = line.split_once(" -A ") {
            let chain = rule.split(' ').next().unwrap_or_default();
            if rule.contains(chains::PREFIX) {
                let rules = saved.entry((table.into(), chain.into())).or_default();
                rules.push(format!("{counted} {rule}"));
            }
        }
    }
    saved
}

/// Tables of those that we write to in which nothing stands but the kernel's own chains, as they are by themselves.
fn left_empty(text: &str) -> BTreeSet<&str> {
    let mut empty = BTreeSet::new();
    let mut table = "";
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = name;
            if chains::JUMPS.iter().any(|(ours, ..)| *ours == table) {
                empty.insert(table);
            }
        } else if let Some(chain) = line.strip_prefix(':') {
            let policy = chain.split(' ').nth(1);
            if policy != Some("ACCEPT") {
                empty.remove(table);
            }
        } else if line.contains(" -A ") {
            empty.remove(table);
        }
    }
    empty
}

/// A rule without its counter.
fn plain(rule: &str) -> &str {
    rule.split_once(' ').map_or(rule, |(_, rule)| rule)
}

/// The packets that the last rule of a chain has refused.
fn refused(saved: &Saved, table: &str, chain: &str) -> u64 {
    let rules = saved.get(&(table.into(), chain.into()));
    let refusing = rules
        .into_iter()
        .flatten()
        .filter(|rule| rule.ends_with("-j DROP") || rule.contains("-j REJECT"));
    refusing
        .filter_map(|rule| {
            rule.strip_prefix('[')?
                .split(':')
                .next()?
                .parse::<u64>()
                .ok()
        })
        .sum()
}

/// `PODVEIL_OLDER -s IP/32 -d IP/32 -p tcp -m tcp --sport PORT --dport PORT -j RETURN`
fn parse_older(rule: &str) -> Option<Connection> {
    let words: Vec<&str> = plain(rule).split(' ').collect();
    let after = |name: &str| {
        let place = words.iter().position(|word| *word == name)?;
        words.get(place + 1).copied()
    };
    let address = |ip: &str, port: &str| -> Option<SocketAddr> {
        let ip: IpAddr = after(ip)?.split('/').next()?.parse().ok()?;
        Some(SocketAddr::new(ip, after(port)?.parse().ok()?))
    };
    Some(Connection {
        local: address("-s", "--sport")?,
        remote: address("-d", "--dport")?,
    })
}

fn older(saved: &Saved) -> impl Iterator<Item = Connection> {
    let rules = saved.get(&("filter".into(), chains::OLDER.into()));
    rules
        .into_iter()
        .flatten()
        .filter_map(|rule| parse_older(rule))
}

/// What decides, in order, without counters and older connections.
fn decisive(saved: &Saved) -> BTreeMap<&(String, String), Vec<&str>> {
    saved
        .iter()
        .map(|(chain, rules)| {
            let rules = rules.iter().filter(|rule| parse_older(rule).is_none());
            (chain, rules.map(|rule| plain(rule)).collect())
        })
        .collect()
}

impl Backend for Iptables {
    async fn apply(
        &self,
        netns: &NetNs,
        capture: &Capture,
        fence: &Arc<Fence>,
    ) -> Result<BTreeSet<Connection>, ApplyError> {
        routes::ensure(netns, routes::Sources::default())?;
        let families = Family::of(netns)?;
        let mut recorded = true;
        let mut stood = false;
        let mut held = BTreeSet::new();
        for family in &families {
            let saved = self.saved(netns, *family).await?;
            stood |= !saved.is_empty();
            recorded &= (saved.get(&("filter".into(), chains::FENCE.into())))
                .is_some_and(|rules| !rules.is_empty());
            held.extend(older(&saved));
        }
        if capture.phase == Phase::Releasing {
            for family in &families {
                let rules = self.rules(capture, *family);
                let tables = [rules.filter(None), rules.nat(), rules.mangle()];
                self.write(netns, &rules, &tables).await?;
            }
            ipset(netns, &chains::replace_sets(&families, &Fence::default())).await?;
            return Ok(BTreeSet::new());
        }
        ipset(netns, &chains::replace_sets(&families, fence)).await?;
        for family in &families {
            let rules = self.rules(capture, *family);
            self.write(netns, &rules, &[rules.mangle(), rules.nat()])
                .await?;
        }
        if !recorded {
            // Capture first: from then on no connection is born past the proxy, so that those found afterwards are all
            // there will ever be. Then the fence, which knows them.
            if let Err(error) = conntrack::forget_untranslated(netns, !stood) {
                tracing::warn!(
                    %error,
                    "stale conntrack entries stay: a connection that meets one is refused by the fence"
                );
            }
            held = Connections::list(netns)?.direct();
        }
        for family in &families {
            let rules = self.rules(capture, *family);
            self.write(netns, &rules, &[rules.filter(Some(&held))])
                .await?;
        }
        Ok(held)
    }

    async fn change_fence(&self, netns: &NetNs, step: &FenceStep) -> Result<(), ApplyError> {
        ipset(
            netns,
            &chains::change_sets(&Family::of(netns)?, &step.change),
        )
        .await
    }

    async fn verify(&self, netns: &NetNs, capture: &Capture) -> Result<(), VerifyError> {
        for family in Family::of(netns).map_err(ApplyError::from)? {
            let expected = self.reference(capture, family).await?;
            let found = self.saved(netns, family).await?;
            let (expected, found) = (decisive(&expected), decisive(&found));
            for (chain, rules) in &expected {
                let stands = found.get(chain).map(Vec::as_slice).unwrap_or_default();
                if stands != rules.as_slice() {
                    return Err(VerifyError::IptablesChain {
                        table: chain.0.clone(),
                        chain: chain.1.clone(),
                    });
                }
            }
        }
        routes::verify(netns, routes::Sources::default())
    }

    async fn stands(&self, netns: &NetNs) -> Result<bool, ApplyError> {
        Ok(routes::stand(netns)? || self.has_chains(netns).await?)
    }

    async fn owns(&self, netns: &NetNs) -> Result<bool, ApplyError> {
        let release = Capture::release();
        let mut nothing = true;
        for family in Family::of(netns)? {
            let saved = self.saved(netns, family).await?;
            let owner = format!("\"{}\"", self.rules(&release, family).owner());
            if saved.values().flatten().any(|rule| rule.contains(&owner)) {
                return Ok(true);
            }
            nothing &= saved.is_empty();
        }
        // Begun with, by whomever.
        Ok(nothing && routes::stand(netns)?)
    }

    async fn observe(
        &self,
        netns: &NetNs,
        older: &mut BTreeSet<Connection>,
    ) -> Result<Observed, ApplyError> {
        let connections = Connections::list(netns)?;
        let ended = connections.ended(older);
        let mut fence = FenceCount::default();
        for family in Family::of(netns)? {
            let of_family: Vec<&Connection> = (ended.iter())
                .filter(|one| chains::is_of(family, one.remote.ip()))
                .collect();
            if !of_family.is_empty() {
                self.load(netns, family, &chains::forget(&of_family))
                    .await?;
            }
            let saved = self.saved(netns, family).await?;
            fence.out_packets += refused(&saved, "filter", chains::OLDER);
            fence.in_packets += refused(&saved, "filter", chains::FENCE_IN);
            fence.lost_reply_packets += refused(&saved, "mangle", chains::LOST);
        }
        older.retain(|connection| !ended.contains(connection));
        Ok(Observed {
            captured: connections.captured(),
            older: older.len(),
            fence,
            no_listener_syns: 0,
            back_end: Some(BackEnd::Iptables),
        })
    }

    async fn remove(&self, netns: &NetNs) -> Result<(), ApplyError> {
        let mut begun = Self::has_sets(netns).await?;
        let families = Family::of(netns)?;
        for family in &families {
            let saved = self.saved(netns, *family).await?;
            let tables = ["filter", "nat", "mangle"].map(|table| take_out(&saved, table));
            if !saved.is_empty() {
                self.load(netns, *family, &tables.concat()).await?;
                begun = true;
            }
        }
        if begun {
            for family in &families {
                self.remove_empty_tables(netns, *family).await?;
            }
        }
        remove_sets(netns).await?;
        // Last: as long as they stand, a removal that was broken off is seen to be one.
        routes::remove(netns)
    }
}

/// What takes everything of ours out of one table, at once.
fn take_out(saved: &Saved, table: &str) -> String {
    let (mut jumps, mut emptied, mut removed) = (String::new(), String::new(), String::new());
    for ((_, chain), rules) in saved.iter().filter(|((of, _), _)| of == table) {
        if chain.starts_with(chains::PREFIX) {
            emptied += &format!("-F {chain}\n");
            removed += &format!("-X {chain}\n");
        } else {
            jumps.extend(rules.iter().map(|rule| format!("-D {}\n", plain(rule))));
        }
    }
    match jumps.len() + emptied.len() {
        0 => String::new(),
        _ => format!("*{table}\n{jumps}{emptied}{removed}COMMIT\n"),
    }
}

/// The sets of ours that stand.
async fn sets(netns: &NetNs) -> Result<Vec<String>, ApplyError> {
    let names = match run_in(netns, "ipset", &["list", "-name"], "").await {
        // Without the program nobody has made any.
        Err(CommandError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            return Ok(Vec::new());
        }
        names => names?,
    };
    Ok(String::from_utf8_lossy(&names)
        .lines()
        .filter(|name| name.starts_with(chains::SET_PREFIX))
        .map(str::to_owned)
        .collect())
}

async fn remove_sets(netns: &NetNs) -> Result<(), ApplyError> {
    let sets = sets(netns).await?;
    let script: String = (sets.iter())
        .map(|name| format!("destroy {name}\n"))
        .collect();
    ipset(netns, &script).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_that_holds_anything_of_anybodys_is_not_empty() {
        let text = "*raw\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n*nat\n:OUTPUT ACCEPT [0:0]\n:PREROUTING ACCEPT [1:60]\nCOMMIT\n\
                    *filter\n:INPUT DROP [0:0]\nCOMMIT\n";
        assert_eq!(left_empty(text), BTreeSet::from(["nat"]));
        for other in [
            "*nat\n:OUTPUT ACCEPT [0:0]\n:OTHER - [0:0]\nCOMMIT\n",
            "*nat\n:OUTPUT ACCEPT [0:0]\n[0:0] -A OUTPUT -j ACCEPT\nCOMMIT\n",
            "# Table `nat' is incompatible, use 'nft' tool.\n",
        ] {
            assert_eq!(left_empty(other), BTreeSet::new(), "{other}");
        }
    }

    #[test]
    fn what_stands_is_read_back_as_it_was_written() {
        let saved = parse(
            "# Generated\n*filter\n:OUTPUT ACCEPT [0:0]\n:PODVEIL_OLDER - [0:0]\n:OTHER - [0:0]\n\
             [3:180] -A OUTPUT -m comment --comment \"Podveil, proxy in x\" -j PODVEIL_FENCE\n\
             [1:60] -A OTHER -j DROP\n\
             [0:0] -A PODVEIL_OLDER -s 10.0.0.1/32 -d 10.0.0.2/32 -p tcp -m tcp --sport 40000 --dport 80 -j RETURN\n\
             [7:420] -A PODVEIL_OLDER -p tcp -j REJECT --reject-with tcp-reset\nCOMMIT\n",
        );
        let chains: Vec<&str> = saved.keys().map(|(_, chain)| chain.as_str()).collect();
        assert_eq!(chains, ["OUTPUT", "PODVEIL_OLDER"]);
        let connection = Connection {
            local: "10.0.0.1:40000".parse().unwrap(),
            remote: "10.0.0.2:80".parse().unwrap(),
        };
        assert!(older(&saved).eq([connection]));
        assert_eq!(refused(&saved, "filter", "PODVEIL_OLDER"), 7);
        let decisive = decisive(&saved);
        let rules = &decisive[&("filter".to_owned(), "PODVEIL_OLDER".to_owned())];
        assert_eq!(
            rules,
            &["PODVEIL_OLDER -p tcp -j REJECT --reject-with tcp-reset"]
        );
    }
}
