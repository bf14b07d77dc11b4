// SPDX-License-Identifier: Apache-2.0
mod task;

use crate::renewal::{RenewalLimits, Renewals};
use crate::{ProgramCredentials, Svid};
use podveil_identity::WorkloadIdentity;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

/// The SVIDs of the workloads of this node: one per identity, whatever the number of its pods. Held in memory only.
///
/// The table is as large as the number of identities held, which the node's pods bound. One per [`ProgramCredentials`]:
/// its lowest generation goes into their acknowledgements.
#[derive(Clone, Debug)]
pub struct WorkloadCertificates {
    shared: Arc<Shared>,
}

/// As long as it lives, the identity's SVID is fetched, held and renewed.
#[derive(Debug)]
pub struct Held {
    identity: WorkloadIdentity,
    svid: watch::Receiver<Option<Arc<Svid>>>,
    shared: Arc<Shared>,
}

/// Why there is no SVID for a workload.
#[derive(Clone, Debug, thiserror::Error)]
pub enum WorkloadSvidError {
    #[error("no workload of {identity} is held here")]
    NotHeld { identity: WorkloadIdentity },
}

/// For the configuration dump.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum CertificateState {
    /// None is held that is valid now.
    Missing,
    Valid,
}

/// For the configuration dump.
#[derive(Clone, Debug)]
pub struct CertificateStatus {
    pub identity: WorkloadIdentity,
    pub state: CertificateState,
    /// Its serial, dates and generation; nothing secret is printed of it.
    pub svid: Option<Arc<Svid>>,
    /// Of the newest attempt, if it failed.
    pub last_error: Option<String>,
    /// When the CA is asked next; `None` while it is being asked.
    pub next_attempt: Option<SystemTime>,
}

/// Bounds of [`WorkloadCertificates`].
#[derive(Clone, Debug)]
pub struct WorkloadLimits {
    /// One answer of the CA may take so long.
    pub fetch_timeout: Duration,
    pub renewal: RenewalLimits,
}

impl Default for WorkloadLimits {
    fn default() -> Self {
        Self {
            // The CA waits up to 3 s for a pod that it has not read of yet.
            fetch_timeout: Duration::from_secs(10),
            renewal: RenewalLimits::default(),
        }
    }
}

struct Shared {
    table: Mutex<Table>,
    /// Wakes the task: an identity came or went.
    changed: Notify,
    credentials: ProgramCredentials,
}

struct Table {
    entries: HashMap<WorkloadIdentity, Entry>,
    renewals: Renewals<WorkloadIdentity>,
}

struct Entry {
    holders: usize,
    svid: watch::Sender<Option<Arc<Svid>>>,
    last_error: Option<String>,
}

impl WorkloadCertificates {
    /// `ca`: a channel to the CA that shows this node's SVID. Starts the task, which ends with `stop`.
    pub fn new(
        ca: Channel,
        credentials: ProgramCredentials,
        limits: WorkloadLimits,
        stop: CancellationToken,
    ) -> Self {
        let shared = Arc::new(Shared {
            table: Mutex::new(Table {
                entries: HashMap::new(),
                renewals: Renewals::new(limits.renewal),
            }),
            changed: Notify::new(),
            credentials,
        });
        let task = task::run(shared.clone(), ca, limits.fetch_timeout);
        tokio::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = task => {}
            }
        });
        Self { shared }
    }

    /// Certificates that nobody fetches or renews, for tests: [`WorkloadCertificates::hold`] an identity, then
    /// [`WorkloadCertificates::put`] its SVID.
    pub fn fixed(credentials: ProgramCredentials) -> Self {
        Self {
            shared: Arc::new(Shared {
                table: Mutex::new(Table {
                    entries: HashMap::new(),
                    renewals: Renewals::new(RenewalLimits::default()),
                }),
                changed: Notify::new(),
                credentials,
            }),
        }
    }

    /// Puts an SVID in use for an identity that is held; see [`WorkloadCertificates::fixed`]. Does nothing if it is not
    /// held.
    pub fn put(&self, identity: &WorkloadIdentity, svid: Arc<Svid>) {
        if let Some(entry) = self.shared.table().entries.get_mut(identity) {
            entry.svid.send_replace(Some(svid));
        }
    }

    /// The first hold asks the CA at once; the drop of the last one forgets key and certificate.
    pub fn hold(&self, identity: &WorkloadIdentity) -> Held {
        let svid = {
            let mut table = self.shared.table();
            table.renewals.want(identity.clone(), SystemTime::now());
            let entry = table.entries.entry(identity.clone()).or_insert(Entry {
                holders: 0,
                svid: watch::Sender::new(None),
                last_error: None,
            });
            entry.holders += 1;
            entry.svid.subscribe()
        };
        self.shared.changed.notify_one();
        Held {
            identity: identity.clone(),
            svid,
            shared: self.shared.clone(),
        }
    }

    /// The SVID, valid now; waits until there is one. The caller sets the bound, and finds in
    /// [`WorkloadCertificates::last_error`] what it waited for.
    /// # Errors
    /// If nobody holds the identity, or nobody does any more.
    pub async fn svid(&self, identity: &WorkloadIdentity) -> Result<Arc<Svid>, WorkloadSvidError> {
        let mut svid = self.watch(identity);
        loop {
            let current = svid.borrow_and_update().clone();
            if let Some(current) = current.filter(|svid| svid.is_valid_at(SystemTime::now())) {
                return Ok(current);
            }
            svid.changed()
                .await
                .map_err(|_| WorkloadSvidError::NotHeld {
                    identity: identity.clone(),
                })?;
        }
    }

    /// `None` inside while there is no valid SVID. Its sender is gone when nobody holds the identity.
    pub fn watch(&self, identity: &WorkloadIdentity) -> watch::Receiver<Option<Arc<Svid>>> {
        match self.shared.table().entries.get(identity) {
            Some(entry) => entry.svid.subscribe(),
            None => watch::channel(None).1,
        }
    }

    /// Why the newest attempt for this identity failed, with all its causes; `None` if it did not.
    pub fn last_error(&self, identity: &WorkloadIdentity) -> Option<String> {
        self.shared
            .table()
            .entries
            .get(identity)?
            .last_error
            .clone()
    }

    /// The lowest generation among the certificates still served; `None` if there are none.
    pub fn lowest_generation(&self) -> Option<u64> {
        self.shared.table().renewals.lowest_generation()
    }

    /// Every identity held, sorted.
    pub fn snapshot(&self) -> Vec<CertificateStatus> {
        let now = SystemTime::now();
        let table = self.shared.table();
        let mut snapshot: Vec<_> = table
            .entries
            .iter()
            .map(|(identity, entry)| {
                let svid = entry.svid.borrow().clone();
                CertificateStatus {
                    identity: identity.clone(),
                    state: match &svid {
                        Some(svid) if svid.is_valid_at(now) => CertificateState::Valid,
                        _ => CertificateState::Missing,
                    },
                    svid,
                    last_error: entry.last_error.clone(),
                    next_attempt: table.renewals.due(identity),
                }
            })
            .collect();
        drop(table);
        snapshot.sort_by(|a, b| a.identity.cmp(&b.identity));
        snapshot
    }
}

impl Held {
    pub fn identity(&self) -> &WorkloadIdentity {
        &self.identity
    }

    /// `None` inside while there is no valid SVID.
    pub fn svid(&self) -> watch::Receiver<Option<Arc<Svid>>> {
        self.svid.clone()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut table = self.shared.table();
        let Some(entry) = table.entries.get_mut(&self.identity) else {
            return;
        };
        entry.holders -= 1;
        if entry.holders == 0 {
            table.entries.remove(&self.identity);
            table.renewals.forget(&self.identity);
            drop(table);
            self.shared.changed.notify_one();
        }
    }
}

impl Shared {
    /// Held for a look-up at a time, never over an await.
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("identities", &self.table().entries.len())
            .finish_non_exhaustive()
    }
}
