// SPDX-License-Identifier: Apache-2.0
use crate::backend::{ApplyError, Backend, FenceCount, Observed, VerifyError};
use crate::command::{CommandError, run_in};
use crate::connections::{Connection, Connections};
use crate::generations::Generations;
use crate::reference::{self, References};
use crate::{BackEnd, Unusable, conntrack, nfnetlink, routes, ruleset};
use podveil_netns::NetNs;
use podveil_netns::cgroup::CgroupPath;
use podveil_plan::{Capture, Fence, FenceStep, Phase};
use ruleset::{COUNTERS, FENCE_CHAIN, OLDER_SETS, TABLE};
use serde_json::Value;
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// Capture by NAT in `inet podveil`, IPv4 and IPv6 (Linux 5.13 or newer with `CONFIG_NF_CONNTRACK_TIMEOUT`, nft 1.0 or
/// newer).
///
/// What the kernel was seen to do (6.18; `tests/netns.rs` shows each), and what follows from it:
///
/// - A nat chain sees the first packet of a connection that conntrack knows. To conntrack, a connection that is older
///   than the table begins with its next packet, whatever that is: only the SYN match keeps NAT off it.
/// - Translation goes on while *any* nat chain is registered, even an empty one. Releasing therefore empties
///   `capture_out` and `capture_in` and keeps them until the last translated connection has ended.
/// - In the output hook the packet's outgoing device is the one of the first route look-up, also after `local_replies`
///   or NAT have sent it to `lo`. So `fence_out` lets the application's answers pass by their marks, and the true
///   device is looked at once more after routing, in `lost_replies`.
/// - A socket's cgroup is its creator's, an accepted socket's that of its listener. SYN-ACKs, the packets of
///   TIME-WAIT and resets have no such socket: the fence passes them by the conntrack mark that the connection's first
///   packet got, by the listeners' ports, and by being a reset.
/// - Conntrack knows nothing of what happens while no table stands, so that its entries of then are stale later: see
///   `conntrack.rs`.
/// - Conntrack forgets a connection of which one direction has ended after a minute or two of silence; what comes then is
///   neither translated nor marked. `ct timeout` gives it as long as an open one.
/// - `reject` in prerouting answers on the connection's own conntrack entry, and its reset passes `fence_out`.
/// - To an unconnected port the kernel answers the proxy with a reset over `lo`, because that answer too is a reply of a
///   connection marked [`podveil_plan::MARK`]. A mark on the accepted socket alone would lose it.
///
/// Known limits. The proxy's own packet to an application whose former connection from the same client address and port
/// is in TIME-WAIT may be answered by a bare ACK, which conntrack calls invalid: it is not brought back, and the hop waits
/// until the proxy gives up and takes another port. And while a plain connection `client:p -> pod:port` is translated, the proxy's own hop to the application
/// cannot use the same `client:p`; it would meet the translation and hang. A port that clients do not pick avoids both.
///
/// IPv6 link-local, IPv4 link-local (metadata services, node-local DNS) and loopback destinations are never peers and are
/// never captured.
#[derive(Clone, Debug)]
pub struct Nftables {
    cgroup: CgroupPath,
    references: References,
    generations: Generations,
}

/// What the table holds, as far as verification asks.
struct Listing(Value);

impl Nftables {
    /// `cgroup`: where every socket of the proxy is made. It must exist whenever rules are written.
    pub fn new(cgroup: CgroupPath) -> Self {
        Self {
            cgroup,
            references: References::default(),
            generations: Generations::default(),
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
        let chains = ruleset::chains(&everything, &self.cgroup, true);
        let script = ruleset::script(&chains, &self.cgroup);
        match self.references.of(&script).await {
            Ok(_) => Ok(()),
            Err(error) => Err(Unusable::rules(BackEnd::Nftables, &error)),
        }
    }

    /// # Errors
    /// When the namespace cannot be read.
    pub async fn has_table(&self, netns: &NetNs) -> Result<bool, ApplyError> {
        Ok(self.list(netns).await?.is_some())
    }

    async fn list(&self, netns: &NetNs) -> Result<Option<Listing>, ApplyError> {
        if has_none(netns) {
            return Ok(None);
        }
        match run_in(
            netns,
            "nft",
            &["-j", "-t", "list", "table", "inet", "podveil"],
            "",
        )
        .await
        {
            Ok(output) => json(&output).map(|listing| Some(Listing(listing))),
            Err(CommandError::Failed { message, .. })
                if message.contains("No such file or directory") =>
            {
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn older(&self, netns: &NetNs) -> Result<BTreeSet<Connection>, ApplyError> {
        let mut older = BTreeSet::new();
        for set in OLDER_SETS {
            let arguments = ["-j", "list", "set", "inet", "podveil", set];
            let listing = json(&run_in(netns, "nft", &arguments, "").await?)?;
            older.extend(elements(&listing).filter_map(parse_older));
        }
        Ok(older)
    }

    async fn load(&self, netns: &NetNs, script: &str) -> Result<(), ApplyError> {
        run_in(netns, "nft", &["-f", "-"], script).await?;
        Ok(())
    }
}

impl Backend for Nftables {
    async fn apply(
        &self,
        netns: &NetNs,
        capture: &Capture,
        fence: &Arc<Fence>,
    ) -> Result<BTreeSet<Connection>, ApplyError> {
        routes::ensure(netns, routes::Sources::default())?;
        if capture.phase == Phase::Releasing {
            // The fence first: a transaction changes chain after chain, and a connection that is no longer captured must not
            // meet the fence. Its chains are gone when this returns.
            if self
                .list(netns)
                .await?
                .is_some_and(|listing| listing.chain_stands(FENCE_CHAIN))
            {
                let capturing = Capture {
                    phase: Phase::Capturing,
                    ..capture.clone()
                };
                let chains = ruleset::chains(&capturing, &self.cgroup, false);
                self.load(netns, &ruleset::script(&chains, &self.cgroup))
                    .await?;
            }
            let chains = ruleset::chains(capture, &self.cgroup, false);
            let script = ruleset::script(&chains, &self.cgroup)
                + &ruleset::replace_fence(&Fence::default())
                + &ruleset::forget_older();
            self.load(netns, &script).await?;
            return Ok(BTreeSet::new());
        }
        let began = self.generations.now(netns);
        let listing = self.list(netns).await?;
        let recorded = (listing.as_ref()).is_some_and(|listing| listing.chain_stands(FENCE_CHAIN));
        if recorded {
            let chains = ruleset::chains(capture, &self.cgroup, true);
            let script = ruleset::script(&chains, &self.cgroup) + &ruleset::replace_fence(fence);
            self.load(netns, &script).await?;
            return self.older(netns).await;
        }
        // Capture first: from then on no connection is born past the proxy, so that those found afterwards are all
        // there will ever be. Then the fence, which knows them.
        let capture_alone =
            ruleset::script(&ruleset::chains(capture, &self.cgroup, false), &self.cgroup)
                + &ruleset::forget_older();
        self.load(netns, &capture_alone).await?;
        match conntrack::forget_untranslated(netns, listing.is_none()) {
            Ok(forgotten) => tracing::debug!(forgotten, "conntrack entries without translation"),
            Err(error) => tracing::warn!(
                %error,
                "stale conntrack entries stay: a connection that meets one is refused by the fence"
            ),
        }
        let older = Connections::list(netns)?.direct();
        let fenced = ruleset::add_fence(capture, &self.cgroup)
            + &ruleset::replace_fence(fence)
            + &ruleset::older("add", &older);
        self.load(netns, &fenced).await?;
        // What stands is what was written, if nobody else wrote anything since there was no table.
        if listing.is_none() {
            let ours = self.generations.after(began, 2, netns);
            self.generations.know(ours, capture);
        }
        Ok(older)
    }

    async fn change_fence(&self, netns: &NetNs, step: &FenceStep) -> Result<(), ApplyError> {
        if step.change.is_empty() {
            return Ok(());
        }
        let before = self.generations.now(netns);
        self.load(netns, &ruleset::change_fence(&step.change))
            .await?;
        self.generations.follow(before, netns);
        Ok(())
    }

    async fn verify(&self, netns: &NetNs, capture: &Capture) -> Result<(), VerifyError> {
        let now = self.generations.now(netns);
        if self.generations.are(now, capture) {
            return routes::verify(netns, routes::Sources::default());
        }
        let listing = self.list(netns).await?.ok_or(VerifyError::Table)?;
        let chains = ruleset::chains(capture, &self.cgroup, true);
        let expected = self
            .references
            .of(&ruleset::script(&chains, &self.cgroup))
            .await?;
        let found = reference::chains(&listing.0);
        for chain in &chains {
            let of = |side: &reference::Chains| side.get(chain.name).cloned().unwrap_or_default();
            let (expected, found) = (of(&expected), of(&found));
            if found != expected {
                return Err(VerifyError::Chain {
                    chain: chain.name,
                    expected: expected.len().saturating_sub(1),
                    found: (found.iter())
                        .skip(1)
                        .filter(|rule| expected.contains(rule))
                        .count(),
                });
            }
        }
        self.generations.know(now, capture);
        routes::verify(netns, routes::Sources::default())
    }

    async fn stands(&self, netns: &NetNs) -> Result<bool, ApplyError> {
        Ok(self.list(netns).await?.is_some() || routes::stand(netns)?)
    }

    async fn owns(&self, netns: &NetNs) -> Result<bool, ApplyError> {
        if has_none(netns) {
            return routes::stand(netns);
        }
        match run_in(
            netns,
            "nft",
            &["-t", "list", "table", "inet", "podveil"],
            "",
        )
        .await
        {
            Ok(listing) => {
                Ok(String::from_utf8_lossy(&listing).contains(&ruleset::owner(&self.cgroup)))
            }
            Err(CommandError::Failed { message, .. })
                if message.contains("No such file or directory") =>
            {
                routes::stand(netns)
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn observe(
        &self,
        netns: &NetNs,
        older: &mut BTreeSet<Connection>,
    ) -> Result<Observed, ApplyError> {
        let connections = Connections::list(netns)?;
        let ended = connections.ended(older);
        if !ended.is_empty() {
            let before = self.generations.now(netns);
            self.load(netns, &ruleset::older("delete", &ended)).await?;
            self.generations.follow(before, netns);
            older.retain(|connection| !ended.contains(connection));
        }
        let arguments = ["-j", "list", "counters", "table", "inet", "podveil"];
        let counters = json(&run_in(netns, "nft", &arguments, "").await?)?;
        let [out_packets, in_packets, lost_reply_packets] =
            COUNTERS.map(|name| packets(&counters, name));
        Ok(Observed {
            captured: connections.captured(),
            older: older.len(),
            fence: FenceCount {
                out_packets,
                in_packets,
                lost_reply_packets,
            },
            // NAT answers such a SYN by a reset, and nobody counts it.
            no_listener_syns: 0,
            back_end: Some(BackEnd::Nftables),
        })
    }

    async fn remove(&self, netns: &NetNs) -> Result<(), ApplyError> {
        // Declared first, so that there is something to delete.
        self.load(netns, &format!("table {TABLE}\ndelete table {TABLE}\n"))
            .await?;
        routes::remove(netns)
    }
}

/// Asked before `nft`, which takes milliseconds to say the same.
fn has_none(netns: &NetNs) -> bool {
    matches!(nfnetlink::has_table(netns, "podveil"), Ok(false))
}

impl Listing {
    fn items<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a Value> {
        items(&self.0, kind)
    }

    fn chain_stands(&self, name: &str) -> bool {
        self.items("chain").any(|chain| chain["name"] == name)
    }
}

fn json(output: &[u8]) -> Result<Value, ApplyError> {
    serde_json::from_slice(output).map_err(|source| ApplyError::Output {
        program: "nft",
        source,
    })
}

fn items<'a>(listing: &'a Value, kind: &'a str) -> impl Iterator<Item = &'a Value> {
    listing["nftables"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(move |item| item.get(kind))
}

fn elements(listing: &Value) -> impl Iterator<Item = &Value> {
    items(listing, "set")
        .filter_map(|set| set.get("elem")?.as_array())
        .flatten()
}

fn parse_older(element: &Value) -> Option<Connection> {
    let [local_ip, local_port, remote_ip, remote_port] =
        element.get("concat")?.as_array()?.as_slice()
    else {
        return None;
    };
    let address = |ip: &Value, port: &Value| {
        let ip: IpAddr = ip.as_str()?.parse().ok()?;
        Some(SocketAddr::new(ip, port.as_u64()?.try_into().ok()?))
    };
    Some(Connection {
        local: address(local_ip, local_port)?,
        remote: address(remote_ip, remote_port)?,
    })
}

fn packets(listing: &Value, counter: &str) -> u64 {
    items(listing, "counter")
        .find(|item| item["name"] == counter)
        .and_then(|item| item["packets"].as_u64())
        .unwrap_or_default()
}
