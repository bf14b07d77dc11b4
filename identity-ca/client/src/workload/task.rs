// SPDX-License-Identifier: Apache-2.0
//! The task behind [`super::WorkloadCertificates`]: does what the machine says, and tells it what came of it.

use super::{Shared, Table};
use crate::authority::{self, IssueError};
use crate::renewal::Attempt;
use crate::{Svid, TrustBundle};
use podveil_identity::WorkloadIdentity;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::transport::Channel;

type Answer = (Attempt<WorkloadIdentity>, Result<Svid, IssueError>);

/// CANCEL: fetches under way end with the future; certificates already held stay in use.
pub(super) async fn run(shared: Arc<Shared>, ca: Channel, fetch_timeout: Duration) {
    // Without the node's own SVID every attempt would fail and back off.
    shared.credentials.ready().await;
    let mut bundles = shared.credentials.bundle();
    let mut fetches: JoinSet<Answer> = JoinSet::new();
    loop {
        let generation = bundles.borrow_and_update().certificate_generation;
        let (due, wakeup, lowest) = shared.table().step(generation, SystemTime::now());
        shared.credentials.report_workload_generation(lowest);
        for attempt in due {
            fetches.spawn(fetch(ca.clone(), attempt, bundles.clone(), fetch_timeout));
        }
        tokio::select! {
            () = tokio::time::sleep(authority::wait_until(wakeup)) => {}
            () = shared.changed.notified() => {}
            // The sender is in `shared.credentials`.
            _ = bundles.changed() => {}
            Some(answer) = fetches.join_next() => match answer {
                Ok((attempt, result)) => shared.table().answered(&attempt, result, SystemTime::now()),
                Err(error) => {
                    if let Ok(panic) = error.try_into_panic() {
                        std::panic::resume_unwind(panic);
                    }
                }
            },
        }
    }
}

async fn fetch(
    ca: Channel,
    attempt: Attempt<WorkloadIdentity>,
    bundle: watch::Receiver<Arc<TrustBundle>>,
    timeout: Duration,
) -> Answer {
    let issued = authority::issue_workload(ca, &attempt.key, &bundle);
    let result = tokio::time::timeout(timeout, issued)
        .await
        .unwrap_or_else(|_| {
            Err(IssueError::TimedOut {
                id: attempt.key.spiffe_id(),
                after: timeout,
            })
        });
    (attempt, result)
}

impl Table {
    /// What to fetch now, when to come again, and the lowest generation in use.
    fn step(
        &mut self,
        generation: u64,
        now: SystemTime,
    ) -> (
        Vec<Attempt<WorkloadIdentity>>,
        Option<SystemTime>,
        Option<u64>,
    ) {
        self.renewals
            .require_generation(generation, now, rand::random);
        for identity in self.renewals.expire(now) {
            tracing::warn!(%identity, "certificate expired before it could be renewed");
            if let Some(entry) = self.entries.get(&identity) {
                entry.svid.send_replace(None);
            }
        }
        let due = std::iter::from_fn(|| self.renewals.poll(now)).collect();
        (
            due,
            self.renewals.next_wakeup(),
            self.renewals.lowest_generation(),
        )
    }

    fn answered(
        &mut self,
        attempt: &Attempt<WorkloadIdentity>,
        result: Result<Svid, IssueError>,
        now: SystemTime,
    ) {
        let identity = &attempt.key;
        match result {
            Ok(svid) => {
                let wanted = self
                    .renewals
                    .on_issued(attempt, svid.validity(), now, rand::random());
                if !wanted {
                    return;
                }
                tracing::info!(%identity, serial = svid.serial(), generation = svid.generation(), "certificate issued");
                if let Some(entry) = self.entries.get_mut(identity) {
                    entry.last_error = None;
                    entry.svid.send_replace(Some(Arc::new(svid)));
                }
            }
            Err(error) => {
                self.renewals.on_failed(attempt, now, rand::random());
                let error = authority::chain(&error);
                tracing::warn!(%identity, error, failures = attempt.failures + 1, "no certificate issued");
                if let Some(entry) = self.entries.get_mut(identity) {
                    entry.last_error = Some(error);
                }
            }
        }
    }
}
