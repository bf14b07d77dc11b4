// SPDX-License-Identifier: Apache-2.0
//! Which of several replicas acts: an election by a `coordination.k8s.io` Lease.
//!
//! ```text
//!   Unknown ──▶ Other ──lease free, or not renewed for its whole duration──▶ Here
//!                 ▲                                                            │
//!                 └──another took it, or no renewal for two thirds of it───────┘
//! ```
//!
//! Clocks are never compared: a lease is over when *we* have not seen it renewed for its duration, and its holder steps
//! down well before that. Who acts on an old standing for a moment must be stopped by what it writes (compare-and-swap).

use futures::StreamExt;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::PostParams;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, ResourceExt};
use std::pin::pin;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

/// After this long without a renewal another replica takes over.
pub const LEASE_DURATION: Duration = Duration::from_secs(30);
/// One write in ten seconds, by the holder alone.
const RENEW_EVERY: Duration = Duration::from_secs(10);
/// A holder that could not renew for this long steps down: before anybody else can take the lease.
const STEP_DOWN_AFTER: Duration = Duration::from_secs(20);
const RETRY: Duration = Duration::from_secs(2);
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// For giving the lease back at the end; else the others wait out its duration.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(2);

/// Who acts, as far as this replica knows.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum Standing {
    /// This replica.
    Here,
    /// Another one, or nobody at the moment.
    Other { holder: Option<String> },
    /// The API server has not answered yet.
    #[default]
    Unknown,
}

impl Standing {
    pub fn is_here(&self) -> bool {
        *self == Self::Here
    }
}

/// A replica's part in the election, on a task of its own.
#[derive(Debug)]
pub struct Election {
    standing: watch::Receiver<Standing>,
    task: JoinHandle<()>,
}

impl Election {
    /// Takes part until `stop`. `me` names this replica: its pod's name, so that a restarted container goes on.
    pub fn start(
        client: Client,
        namespace: &str,
        name: &str,
        me: String,
        stop: CancellationToken,
    ) -> Self {
        let (sender, standing) = watch::channel(Standing::Unknown);
        let candidate = Candidate {
            leases: Api::namespaced(client, namespace),
            name: name.to_owned(),
            seen: Seen::default(),
            me,
            standing: sender,
            told: None,
        };
        Self {
            standing,
            task: tokio::spawn(candidate.run(stop)),
        }
    }

    pub fn standing(&self) -> watch::Receiver<Standing> {
        self.standing.clone()
    }

    /// Waits until the task has ended and the lease, if it was ours, is given back.
    pub async fn ended(self) {
        // It neither panics nor is it aborted; and at the end nothing is left to do about either.
        let _ = self.task.await;
    }
}

/// The lease as seen last.
#[derive(Clone, Debug, Default)]
struct Seen {
    /// `None`: not seen yet. `Some(None)`: there is none.
    lease: Option<Option<Lease>>,
    /// When it was seen to change, by our clock.
    at: Option<Instant>,
    /// Its holder has renewed it in this process. A restarted holder finds its own name, and cannot know how long the
    /// others have waited already.
    renewed: bool,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Next {
    Write,
    WaitUntil(Instant),
    /// Nothing is known: only the watch can tell.
    Wait,
}

impl Seen {
    /// A watch may lag behind the answers to our own writes.
    fn observe(&mut self, lease: Option<Lease>, now: Instant) {
        let version = |lease: &Lease| lease.resource_version()?.parse::<u64>().ok();
        if let (Some(Some(known)), Some(new)) = (&self.lease, &lease) {
            if known.resource_version() == new.resource_version() {
                return;
            }
            if let (Some(known), Some(new)) = (version(known), version(new))
                && new < known
            {
                return;
            }
        }
        let before = self.holder().map(ToOwned::to_owned);
        self.lease = Some(lease);
        self.at = Some(now);
        self.renewed &= self.holder() == before.as_deref();
    }

    fn spec(&self) -> Option<&LeaseSpec> {
        self.lease.as_ref()?.as_ref()?.spec.as_ref()
    }

    fn holder(&self) -> Option<&str> {
        self.spec()?
            .holder_identity
            .as_deref()
            .filter(|holder| !holder.is_empty())
    }

    fn next(&self, me: &str, now: Instant) -> Next {
        let (Some(_), Some(at)) = (&self.lease, self.at) else {
            return Next::Wait;
        };
        let due = match self.holder() {
            None => now,
            Some(holder) if holder == me && !self.renewed => now,
            Some(holder) if holder == me => at + RENEW_EVERY,
            Some(_) => {
                let seconds = self
                    .spec()
                    .and_then(|spec| spec.lease_duration_seconds)
                    .and_then(|seconds| u64::try_from(seconds).ok());
                at + seconds.map_or(LEASE_DURATION, Duration::from_secs)
            }
        };
        if due <= now {
            Next::Write
        } else {
            Next::WaitUntil(due)
        }
    }

    fn standing(&self, me: &str, now: Instant) -> Standing {
        match (self.holder(), self.at) {
            (Some(holder), Some(at)) if holder == me => {
                if self.renewed && now < at + STEP_DOWN_AFTER {
                    Standing::Here
                } else {
                    Standing::Other { holder: None }
                }
            }
            (holder, Some(_)) => Standing::Other {
                holder: holder.map(ToOwned::to_owned),
            },
            (_, None) => Standing::Unknown,
        }
    }

    /// The lease with `me` as its holder, on top of the version seen.
    fn taken(&self, name: &str, me: &str, now: Timestamp) -> Lease {
        let mut lease = self.lease.clone().flatten().unwrap_or_default();
        lease.metadata.name = Some(name.to_owned());
        lease.metadata.managed_fields = None;
        let renewed = self.holder() == Some(me);
        let spec = lease.spec.get_or_insert_default();
        if !renewed {
            spec.lease_transitions = Some(spec.lease_transitions.unwrap_or(0).saturating_add(1));
            spec.acquire_time = Some(MicroTime(now));
        }
        spec.holder_identity = Some(me.to_owned());
        spec.lease_duration_seconds = Some(LEASE_DURATION.as_secs() as i32);
        spec.renew_time = Some(MicroTime(now));
        lease
    }
}

struct Candidate {
    leases: Api<Lease>,
    name: String,
    me: String,
    seen: Seen,
    standing: watch::Sender<Standing>,
    /// The last failure told, so that an outage is one line.
    told: Option<String>,
}

impl Candidate {
    async fn run(mut self, stop: CancellationToken) {
        // CANCEL: a write that is dropped half-way may have happened; the next replica sees it, or the release does.
        stop.run_until_cancelled(self.take_part()).await;
        if self.seen.holder() == Some(&self.me) {
            self.release().await;
        }
    }

    async fn take_part(&mut self) {
        let mut changes =
            pin!(watcher::watch_object(self.leases.clone(), &self.name).default_backoff());
        let mut not_before = Instant::now();
        loop {
            let now = Instant::now();
            self.tell(now);
            let wake = match self.seen.next(&self.me, now) {
                Next::Write if now >= not_before => {
                    if !self.write().await {
                        not_before = Instant::now() + RETRY;
                    }
                    continue;
                }
                Next::Write => Some(not_before),
                Next::WaitUntil(due) => Some(due),
                Next::Wait => None,
            };
            let wake = self.step_down_at(now).into_iter().chain(wake).min();
            tokio::select! {
                change = changes.next() => match change {
                    Some(Ok(lease)) => self.seen.observe(lease, Instant::now()),
                    Some(Err(error)) => self.failed(&error),
                    // It goes on after every error; an end would be a fault of the library's.
                    None => tokio::time::sleep(RETRY).await,
                },
                () = sleep_until(wake) => {}
            }
        }
    }

    fn step_down_at(&self, now: Instant) -> Option<Instant> {
        let at = self.seen.at? + STEP_DOWN_AFTER;
        (self.standing.borrow().is_here() && at > now).then_some(at)
    }

    fn tell(&self, now: Instant) {
        let standing = self.seen.standing(&self.me, now);
        self.standing.send_if_modified(|told| {
            let changed = *told != standing;
            if changed {
                tracing::info!(lease = self.name, ?standing, "who acts");
                *told = standing;
            }
            changed
        });
    }

    /// False if it failed and is to be tried again later.
    async fn write(&mut self) -> bool {
        let lease = self.seen.taken(&self.name, &self.me, Timestamp::now());
        match self.put(&lease).await {
            Ok(written) => {
                self.told = None;
                self.seen.observe(Some(written), Instant::now());
                self.seen.renewed = true;
                true
            }
            Err(error) => {
                let lost = matches!(&error, Failed::Api(kube::Error::Api(status)) if matches!(status.code, 404 | 409));
                if lost {
                    // Another was faster: look before the next attempt.
                    match timeout(REQUEST_TIMEOUT, self.leases.get_opt(&self.name)).await {
                        Ok(Ok(lease)) => {
                            self.seen.observe(lease, Instant::now());
                            return true;
                        }
                        Ok(Err(error)) => self.failed(&error),
                        Err(_) => self.failed(&Failed::TimedOut),
                    }
                } else {
                    self.failed(&error);
                }
                false
            }
        }
    }

    async fn put(&self, lease: &Lease) -> Result<Lease, Failed> {
        let params = PostParams::default();
        let exists = lease.metadata.resource_version.is_some();
        let answer = async {
            if exists {
                self.leases.replace(&self.name, &params, lease).await
            } else {
                self.leases.create(&params, lease).await
            }
        };
        timeout(REQUEST_TIMEOUT, answer)
            .await
            .map_err(|_| Failed::TimedOut)?
            .map_err(Failed::Api)
    }

    async fn release(&self) {
        let Some(Some(mut lease)) = self.seen.lease.clone() else {
            return;
        };
        lease.metadata.managed_fields = None;
        lease.spec.get_or_insert_default().holder_identity = None;
        let params = PostParams::default();
        let given = self.leases.replace(&self.name, &params, &lease);
        match timeout(RELEASE_TIMEOUT, given).await {
            Ok(Ok(_)) => tracing::info!(lease = self.name, "given back"),
            Ok(Err(error)) => tracing::warn!(lease = self.name, %error, "could not be given back"),
            Err(_) => tracing::warn!(lease = self.name, "could not be given back in time"),
        }
        self.standing.send_replace(Standing::Other { holder: None });
    }

    fn failed(&mut self, error: &(dyn std::error::Error + 'static)) {
        let text = error.to_string();
        if self.told.as_ref() != Some(&text) {
            tracing::warn!(lease = self.name, error, "the election cannot go on");
            self.told = Some(text);
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error("the API server refused")]
    Api(#[source] kube::Error),
    #[error("the API server did not answer in {REQUEST_TIMEOUT:?}")]
    TimedOut,
}

async fn sleep_until(wake: Option<Instant>) {
    match wake {
        Some(wake) => tokio::time::sleep_until(wake).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(version: u64, holder: &str) -> Lease {
        let mut lease = Seen::default().taken("podveil", holder, Timestamp::UNIX_EPOCH);
        lease.metadata.resource_version = Some(version.to_string());
        lease
    }

    fn seen(lease: Option<Lease>, at: Instant) -> Seen {
        let mut seen = Seen::default();
        seen.observe(lease, at);
        seen
    }

    #[test]
    fn before_the_first_answer_nobody_is_known_and_nothing_is_written() {
        let now = Instant::now();
        assert_eq!(Seen::default().next("a", now), Next::Wait);
        assert_eq!(Seen::default().standing("a", now), Standing::Unknown);
    }

    #[test]
    fn a_missing_or_free_lease_is_taken_at_once() {
        let now = Instant::now();
        for free in [None, Some(Lease::default()), Some(lease(1, ""))] {
            let seen = seen(free, now);
            assert_eq!(seen.next("a", now), Next::Write);
            assert_eq!(seen.standing("a", now), Standing::Other { holder: None });
        }
    }

    #[test]
    fn anothers_lease_is_taken_only_after_its_whole_duration_without_a_renewal() {
        let now = Instant::now();
        let mut seen = seen(Some(lease(1, "b")), now);
        assert_eq!(seen.next("a", now), Next::WaitUntil(now + LEASE_DURATION));
        let later = now + LEASE_DURATION / 2;
        seen.observe(Some(lease(2, "b")), later);
        assert_eq!(
            seen.next("a", now + LEASE_DURATION),
            Next::WaitUntil(later + LEASE_DURATION)
        );
        assert_eq!(seen.next("a", later + LEASE_DURATION), Next::Write);
    }

    #[test]
    fn a_holder_that_cannot_renew_steps_down_before_another_can_take_over() {
        let now = Instant::now();
        let mut seen = seen(Some(lease(1, "a")), now);
        seen.renewed = true;
        assert_eq!(seen.standing("a", now), Standing::Here);
        assert!(!seen.standing("a", now + STEP_DOWN_AFTER).is_here());
        assert!(STEP_DOWN_AFTER + REQUEST_TIMEOUT < LEASE_DURATION);
        assert_eq!(seen.next("a", now + RENEW_EVERY), Next::Write);
    }

    #[test]
    fn a_restarted_holder_renews_before_it_acts() {
        let now = Instant::now();
        let mut seen = seen(Some(lease(1, "a")), now);
        assert!(!seen.standing("a", now).is_here());
        assert_eq!(seen.next("a", now), Next::Write);
        seen.observe(Some(lease(2, "a")), now);
        seen.renewed = true;
        assert!(seen.standing("a", now).is_here());
        seen.observe(Some(lease(3, "b")), now);
        seen.observe(Some(lease(4, "a")), now);
        assert!(!seen.standing("a", now).is_here(), "lost in between");
    }

    #[test]
    fn an_older_version_from_the_watch_changes_nothing() {
        let now = Instant::now();
        let mut seen = seen(Some(lease(9, "a")), now);
        seen.observe(Some(lease(8, "b")), now);
        assert_eq!(seen.holder(), Some("a"));
        seen.observe(Some(lease(10, "b")), now);
        assert_eq!(seen.holder(), Some("b"));
    }

    #[test]
    fn a_take_over_counts_and_a_renewal_does_not() {
        let now = Instant::now();
        let seen = seen(Some(lease(1, "b")), now);
        let transitions = |lease: &Lease| lease.spec.as_ref().unwrap().lease_transitions;
        let taken = seen.taken("podveil", "a", Timestamp::UNIX_EPOCH);
        assert_eq!(transitions(&taken), Some(2));
        assert_eq!(taken.metadata.resource_version.as_deref(), Some("1"));
        let renewed = seen.taken("podveil", "b", Timestamp::UNIX_EPOCH);
        assert_eq!(transitions(&renewed), Some(1));
    }
}
