// SPDX-License-Identifier: Apache-2.0
use crate::Replicas;
use crate::replicas::Known;
use crate::stream::{Source, stream};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::transport::Channel;

/// While no replica is connected, others are looked for so often.
const ALONE: Duration = Duration::from_secs(1);
const FIRST_RETRY: Duration = Duration::from_millis(50);
const LAST_RETRY: Duration = Duration::from_secs(5);

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
    let report = report_to_all(&replicas, &source, &controllers);
    let _stopped: Option<()> = stop.run_until_cancelled(report).await;
}

async fn report_to_all<S: Source>(replicas: &Replicas, source: &S, controllers: &Controllers) {
    let mut known = replicas.known();
    let mut streams: BTreeMap<String, DropGuard> = BTreeMap::new();
    loop {
        let now: Known = known.borrow_and_update().clone();
        streams.retain(|replica, _| now.contains_key(replica));
        for (name, replica) in now {
            streams.entry(name).or_insert_with_key(|name| {
                let stop = CancellationToken::new();
                let link = Link {
                    replica: name.clone(),
                    replicas: replicas.clone(),
                    connected: controllers.connected.clone(),
                    open: false.into(),
                };
                let uninstalling = controllers.uninstalling.clone();
                let kept = keep(link, replica.channel, source.clone(), uninstalling);
                tokio::spawn(stop.clone().run_until_cancelled_owned(kept));
                stop.drop_guard()
            });
        }
        loop {
            match tokio::time::timeout(ALONE, known.changed()).await {
                Ok(Ok(())) => break,
                // Whoever looked for them has stopped.
                Ok(Err(_)) => std::future::pending().await,
                Err(_) if *controllers.connected.borrow() == 0 => replicas.look_soon(),
                Err(_) => {}
            }
        }
    }
}

/// Reports over `channel` for ever.
async fn keep(
    link: Link,
    channel: Channel,
    mut source: impl Source,
    uninstalling: watch::Sender<bool>,
) {
    let mut pause = FIRST_RETRY;
    loop {
        let opened = || link.set_open(true);
        let (ended, sent) = stream(&mut source, channel.clone(), opened, &uninstalling).await;
        link.set_open(false);
        if sent > 1 {
            pause = FIRST_RETRY;
        }
        let wait = pause.mul_f64(rand::random_range(0.5..=1.0));
        pause = (pause * 2).min(LAST_RETRY);
        tracing::warn!(
            replica = link.replica,
            code = ?ended.code(),
            reason = ended.message(),
            retry_ms = wait.as_millis() as u64,
            "no report stream to the controller"
        );
        tokio::time::sleep(wait).await;
    }
}

/// A stream to one replica, which counts as connected from when it is open, whatever ends it.
struct Link {
    replica: String,
    replicas: Replicas,
    connected: watch::Sender<usize>,
    open: AtomicBool,
}

impl Link {
    fn set_open(&self, open: bool) {
        if self.open.swap(open, Ordering::Relaxed) == open {
            return;
        }
        self.connected.send_modify(|count| match open {
            true => *count += 1,
            false => *count -= 1,
        });
        self.replicas.set_open(&self.replica, open);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.set_open(false);
    }
}

#[cfg(test)]
#[path = "run_tests.rs"]
mod tests;
