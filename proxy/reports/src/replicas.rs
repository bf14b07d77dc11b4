// SPDX-License-Identifier: Apache-2.0
use crate::stream::{Source, stream};
use podveil_ca_client::{ProgramCredentials, transport};
use podveil_identity::ProgramIdentity;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::transport::Channel;

/// Between two looks for replicas. One that is new is found within this; an old one is kept as long as it is named.
const LOOK: Duration = Duration::from_secs(10);
/// The same while no replica is connected.
const LOOK_ALONE: Duration = Duration::from_secs(1);
/// A name server that does not answer.
const LOOK_BOUND: Duration = Duration::from_secs(5);
const FIRST_RETRY: Duration = Duration::from_millis(50);
const LAST_RETRY: Duration = Duration::from_secs(5);
/// A deployment has a handful; an answer with more is cut there.
const MAX_REPLICAS: usize = 16;

/// Where the controller's replicas are.
#[derive(Clone, Debug)]
pub enum Replicas {
    /// All addresses of this `host:port`, by the resolver.
    Named {
        address: String,
        credentials: ProgramCredentials,
    },
    /// These, for ever: for tests.
    Fixed(Vec<Channel>),
}

/// What is known of the replicas, for whoever subscribes.
#[derive(Clone, Debug, Default)]
pub struct Controllers {
    /// How many are connected.
    pub connected: watch::Sender<usize>,
    /// Podveil is being uninstalled, as the replica says that spoke last. Stays as it is when none is connected.
    pub uninstalling: watch::Sender<bool>,
}

/// Reports `source` to every replica until `stop`; what they say is in `controllers`.
pub async fn run<S: Source>(
    replicas: Replicas,
    source: S,
    controllers: Controllers,
    stop: CancellationToken,
) {
    let report = async {
        match replicas {
            Replicas::Named {
                address,
                credentials,
            } => follow(&address, &credentials, &source, &controllers).await,
            Replicas::Fixed(channels) => {
                let mut streams = JoinSet::new();
                for (index, channel) in channels.into_iter().enumerate() {
                    let name = format!("replica {index}");
                    streams.spawn(keep(name, channel, source.clone(), controllers.clone()));
                }
                while streams.join_next().await.is_some() {}
            }
        }
    };
    let _stopped: Option<()> = stop.run_until_cancelled(report).await;
}

/// Keeps a stream to each address of `address`.
async fn follow<S: Source>(
    address: &str,
    credentials: &ProgramCredentials,
    source: &S,
    controllers: &Controllers,
) {
    // Without a certificate there is no link to report over.
    credentials.ready().await;
    let mut streams: BTreeMap<SocketAddr, DropGuard> = BTreeMap::new();
    loop {
        match look_up(address).await {
            Ok(found) => {
                streams.retain(|replica, _| {
                    let kept = found.contains(replica);
                    if !kept {
                        tracing::info!(%replica, "a replica of the controller is gone");
                    }
                    kept
                });
                for replica in found {
                    streams.entry(replica).or_insert_with(|| {
                        tracing::info!(%replica, "a replica of the controller");
                        let name = replica.to_string();
                        let channel =
                            transport::channel(&name, credentials, ProgramIdentity::Controller);
                        let stop = CancellationToken::new();
                        let kept = keep(name, channel, source.clone(), controllers.clone());
                        tokio::spawn(stop.clone().run_until_cancelled_owned(kept));
                        stop.drop_guard()
                    });
                }
            }
            // Those that are known go on.
            Err(error) => {
                tracing::warn!(address, %error, "the controller's replicas cannot be looked up");
            }
        }
        let alone = *controllers.connected.borrow() == 0;
        let pause = if alone { LOOK_ALONE } else { LOOK };
        tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..=1.0))).await;
    }
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

/// Reports over `channel` for ever.
async fn keep(
    replica: String,
    channel: Channel,
    mut source: impl Source,
    controllers: Controllers,
) {
    let mut pause = FIRST_RETRY;
    loop {
        let link = Link::new(&controllers.connected);
        let (opened, uninstalling) = (|| link.open(), &controllers.uninstalling);
        let (ended, sent) = stream(&mut source, channel.clone(), opened, uninstalling).await;
        drop(link);
        if sent > 1 {
            pause = FIRST_RETRY;
        }
        let wait = pause.mul_f64(rand::random_range(0.5..=1.0));
        pause = (pause * 2).min(LAST_RETRY);
        tracing::warn!(
            replica,
            code = ?ended.code(),
            reason = ended.message(),
            retry_ms = wait.as_millis() as u64,
            "no report stream to the controller"
        );
        tokio::time::sleep(wait).await;
    }
}

/// Counts a stream as connected from when it is open until this is dropped, whatever ends it.
struct Link<'a> {
    connected: &'a watch::Sender<usize>,
    open: std::sync::atomic::AtomicBool,
}

impl<'a> Link<'a> {
    fn new(connected: &'a watch::Sender<usize>) -> Self {
        Self {
            connected,
            open: false.into(),
        }
    }

    fn open(&self) {
        self.open.store(true, std::sync::atomic::Ordering::Relaxed);
        self.connected.send_modify(|count| *count += 1);
    }
}

impl Drop for Link<'_> {
    fn drop(&mut self) {
        if *self.open.get_mut() {
            self.connected.send_modify(|count| *count -= 1);
        }
    }
}

#[cfg(test)]
#[path = "replicas_tests.rs"]
mod tests;
