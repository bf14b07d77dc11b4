// SPDX-License-Identifier: Apache-2.0
use podveil_ca_client::{ProgramCredentials, transport};
use podveil_identity::ProgramIdentity;
use podveil_xds_client::Servers;
use rand::seq::IteratorRandom;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

/// Between two looks for replicas. One that is new is found within this; an old one is kept as long as it is named.
const LOOK: Duration = Duration::from_secs(10);
/// The same where somebody has no stream.
const LOOK_SOON: Duration = Duration::from_secs(1);
/// A name server that does not answer.
const LOOK_BOUND: Duration = Duration::from_secs(5);
/// How long a stream that begins waits for a replica that answers. At the start that is soon found.
const FIRST_ANSWER: Duration = Duration::from_secs(1);
/// A deployment has a handful; an answer with more is cut there.
const MAX_REPLICAS: usize = 16;

/// By their addresses, in words.
pub(crate) type Known = BTreeMap<String, Replica>;

#[derive(Clone, Debug)]
pub(crate) struct Replica {
    pub channel: Channel,
    /// A report stream to it is open: it is there, and answers.
    pub open: bool,
}

/// The replicas of the controller: one connection to each, which all streams of the process share.
///
/// As [`Servers`], one at random of those that answer, and where a stream has ended, another one than that went to.
#[derive(Clone, Debug)]
pub struct Replicas {
    known: Arc<watch::Sender<Known>>,
    /// A look is wanted.
    soon: Arc<Notify>,
    /// To whichever is ready, on a connection of its own: where none is known or answers.
    otherwise: Option<Channel>,
    /// What connections wait for.
    credentials: Option<ProgramCredentials>,
    /// Where the last stream of this clone went to.
    last: Option<String>,
}

impl Replicas {
    /// All addresses of this `host:port`, by the resolver, which is asked again and again until `stop`. While it knows none,
    /// or none of them answers, streams go `otherwise`.
    pub fn named(
        address: String,
        credentials: ProgramCredentials,
        otherwise: Channel,
        stop: CancellationToken,
    ) -> Self {
        let replicas = Self {
            known: Arc::default(),
            soon: Arc::default(),
            otherwise: Some(otherwise),
            credentials: Some(credentials.clone()),
            last: None,
        };
        let channel = move |replica: &str| {
            transport::channel(replica, &credentials, ProgramIdentity::Controller)
        };
        let (known, soon) = (replicas.known.clone(), replicas.soon.clone());
        let looking = keep_looking(address, channel, known, soon);
        tokio::spawn(stop.run_until_cancelled_owned(looking));
        replicas
    }

    /// These, for ever, and at least one: for tests.
    pub fn fixed(channels: Vec<Channel>) -> Self {
        let replica = |(number, channel)| {
            let name = format!("replica {number}");
            let open = false;
            (name, Replica { channel, open })
        };
        let known: Known = channels.into_iter().enumerate().map(replica).collect();
        Self {
            known: Arc::new(watch::Sender::new(known)),
            soon: Arc::default(),
            otherwise: None,
            credentials: None,
            last: None,
        }
    }

    pub(crate) fn known(&self) -> watch::Receiver<Known> {
        self.known.subscribe()
    }

    pub(crate) fn set_open(&self, replica: &str, open: bool) {
        self.known.send_if_modified(|known| {
            let replica = known.get_mut(replica);
            replica.is_some_and(|replica| std::mem::replace(&mut replica.open, open) != open)
        });
    }

    /// There may be others by now.
    pub(crate) fn look_soon(&self) {
        self.soon.notify_one();
    }

    fn choose(&mut self) -> Option<Channel> {
        let known = self.known.borrow();
        let open = || known.iter().filter(|(_, replica)| replica.open);
        let is_another = |(name, _): &(&String, &Replica)| Some(*name) != self.last.as_ref();
        let mut random = rand::rng();
        let mut chosen = open().filter(is_another).choose(&mut random);
        chosen = chosen.or_else(|| open().next());
        // One after the other. What waits for a certificate would wait for it there as well.
        let has_failed = chosen.is_none() && self.last.is_some() && self.may_connect();
        if !(has_failed && self.otherwise.is_some()) {
            chosen = chosen
                .or_else(|| known.iter().filter(is_another).choose(&mut random))
                .or_else(|| known.iter().next());
        }
        let (last, channel) = match chosen {
            Some((name, replica)) => (Some(name.clone()), Some(replica.channel.clone())),
            None => (None, self.otherwise.clone()),
        };
        drop(known);
        self.last = last;
        channel
    }

    fn may_connect(&self) -> bool {
        let credentials = self.credentials.as_ref();
        credentials.is_none_or(|credentials| credentials.current().is_some())
    }
}

impl Servers for Replicas {
    async fn next(&mut self) -> Channel {
        self.look_soon();
        let mut known = self.known();
        let answers = known.wait_for(|known| known.values().any(|replica| replica.open));
        // Whether in time or not: what is known then decides.
        drop(tokio::time::timeout(FIRST_ANSWER, answers).await);
        match self.choose() {
            Some(channel) => channel,
            None => std::future::pending().await,
        }
    }
}

async fn keep_looking(
    address: String,
    channel: impl Fn(&str) -> Channel,
    known: Arc<watch::Sender<Known>>,
    soon: Arc<Notify>,
) {
    loop {
        match look_up(&address).await {
            Ok(found) => {
                known.send_if_modified(|known| follow(known, &found, &channel));
            }
            // Those that are known go on.
            Err(error) => {
                tracing::warn!(address, %error, "the controller's replicas cannot be looked up");
            }
        }
        // Spread, or all nodes would ask the name server in one moment for ever.
        let spread = rand::random_range(0.5..=1.0);
        tokio::select! {
            () = tokio::time::sleep(LOOK.mul_f64(spread)) => {}
            () = async {
                tokio::time::sleep(LOOK_SOON.mul_f64(spread)).await;
                soon.notified().await;
            } => {}
        }
    }
}

/// True if there is news.
fn follow(
    known: &mut Known,
    found: &BTreeSet<SocketAddr>,
    channel: impl Fn(&str) -> Channel,
) -> bool {
    let names: BTreeSet<String> = found.iter().map(ToString::to_string).collect();
    let before = known.len();
    known.retain(|replica, _| {
        let kept = names.contains(replica);
        if !kept {
            tracing::info!(replica, "a replica of the controller is gone");
        }
        kept
    });
    let mut news = known.len() != before;
    for replica in names {
        known.entry(replica).or_insert_with_key(|replica| {
            tracing::info!(replica, "a replica of the controller");
            news = true;
            Replica {
                channel: channel(replica),
                open: false,
            }
        });
    }
    news
}

/// The addresses of one family: a replica that has both is one replica.
async fn look_up(address: &str) -> io::Result<BTreeSet<SocketAddr>> {
    let found = tokio::time::timeout(LOOK_BOUND, tokio::net::lookup_host(address));
    let found = found.await.map_err(|_| io::ErrorKind::TimedOut)??;
    Ok(one_family(found))
}

fn one_family(found: impl Iterator<Item = SocketAddr>) -> BTreeSet<SocketAddr> {
    let (v4, v6): (BTreeSet<_>, BTreeSet<_>) = found.partition(SocketAddr::is_ipv4);
    let chosen = if v4.is_empty() { v6 } else { v4 };
    chosen.into_iter().take(MAX_REPLICAS).collect()
}

#[cfg(test)]
#[path = "replicas_tests.rs"]
mod tests;
