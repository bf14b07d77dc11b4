// SPDX-License-Identifier: Apache-2.0
use crate::journal;
use crate::rotation::{Action, Kind, Rotation};
use crate::store::{Store, StoreError};
use podveil_ca_issuer::{Authority, AuthorityError, end_of_life};
use podveil_identity::TrustDomain;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};
use tokio::sync::{Mutex, watch};

/// Writes of one change, each after another replica was faster.
const MAX_ATTEMPTS: usize = 5;
/// What holds at one moment: who signs, who is trusted. Read whole, so that no answer mixes two moments.
#[derive(Clone, Debug)]
pub struct Snapshot {
    pub trust_domain: TrustDomain,
    /// Grows by one with each change of what consumers are sent, across restarts.
    pub sequence: u64,
    /// Certificates issued before this generation are to be replaced. From 1.
    pub certificate_generation: u64,
    /// The bundle; the newest root last. INVARIANT: never empty.
    pub roots: Vec<Arc<Authority>>,
    pub issuing: Arc<Authority>,
    pub rotation: Option<Rotation>,
}

/// Authorities, bundle and rotation: every change is in the store before anybody sees it.
#[derive(Debug)]
pub struct Ledger {
    store: Mutex<Store>,
    lives: Lives,
    /// Made by this start: no program can have had anything from it before.
    fresh: bool,
    lost: AtomicBool,
    current: watch::Sender<Arc<Snapshot>>,
}

/// How long new authorities live.
#[derive(Clone, Copy, Debug)]
pub struct Lives {
    pub root: Duration,
    pub issuing: Duration,
}

/// Why the ledger cannot be opened or changed; for the operator.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    #[error("an authority could not be made")]
    Authority(#[source] AuthorityError),
    #[error("authority {serial} is damaged where it is kept")]
    DamagedAuthority {
        serial: String,
        #[source]
        source: AuthorityError,
    },
    #[error("the journal {place} is damaged")]
    DamagedJournal {
        place: String,
        #[source]
        source: serde_json::Error,
    },
    #[error("the journal says what cannot be: {what}")]
    Inconsistent { what: &'static str },
    #[error("authority {serial} is missing, although the journal names it")]
    LostAuthority { serial: String },
    #[error(
        "{place} is missing, although a CA has kept its record there: {sign} tells. Put the record back; to begin anew, \
         with another root for every program, remove that too"
    )]
    LostJournal { place: String, sign: String },
    #[error("the rotation has moved on meanwhile")]
    Moved,
    #[error("the CA's record belongs to trust domain {found}, the configuration says {wanted}")]
    OtherTrustDomain { found: String, wanted: String },
    #[error(
        "the CA's record was written by another version of this program (journal version {found})"
    )]
    OtherVersion { found: u32 },
    #[error("a {running:?} rotation is under way")]
    Rotating { running: Kind },
    #[error("the place of the CA's record cannot be used")]
    Store(#[source] StoreError),
    #[error("{what} is too long: certificates cannot end after the year 9999")]
    TooLong { what: &'static str },
    #[error("the record is older (sequence {found}) than what is in use (sequence {held})")]
    WentBack { found: u64, held: u64 },
}

impl LedgerError {
    /// Trying again may help.
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Store(error) if error.is_passing())
    }
}

impl Lives {
    /// Before anything is made of them, so that no later rotation is the one to fail.
    fn check(self, now: SystemTime) -> Result<(), LedgerError> {
        Self::check_one("root_ttl", self.root, now)?;
        Self::check_one("issuing_ttl", self.issuing, now)
    }

    /// # Errors
    /// [`LedgerError::TooLong`] if no certificate made now can live so long.
    pub fn check_one(
        what: &'static str,
        life: Duration,
        now: SystemTime,
    ) -> Result<(), LedgerError> {
        match end_of_life(now, life) {
            Some(_) => Ok(()),
            None => Err(LedgerError::TooLong { what }),
        }
    }
}

impl Ledger {
    /// Reads what is kept in `store`, or makes a root and an issuing authority where nothing is.
    ///
    /// # Errors
    /// If what is kept is damaged or of another trust domain. Nothing is ever made anew in its place: that would be
    /// another CA, and every program would have to be told.
    pub async fn open(
        mut store: Store,
        trust_domain: &TrustDomain,
        lives: Lives,
        now: SystemTime,
    ) -> Result<Self, LedgerError> {
        lives.check(now)?;
        let record = store.load().await.map_err(LedgerError::Store)?;
        let fresh = record.is_none();
        let snapshot = match record {
            Some(record) => journal::read(&record, trust_domain, &store.place())?,
            None if store.was_used().await.map_err(LedgerError::Store)? => {
                return Err(LedgerError::LostJournal {
                    place: store.place(),
                    sign: store.sign(),
                });
            }
            None => {
                let snapshot = first(trust_domain, lives, now)?;
                let record = journal::write(&snapshot);
                store.save(record).await.map_err(LedgerError::Store)?;
                tracing::info!(
                    root = snapshot.roots[0].subject(),
                    "made the first root of the trust domain"
                );
                snapshot
            }
        };
        store
            .settle(snapshot.bundle_pem(), snapshot.serials())
            .await
            .map_err(LedgerError::Store)?;
        Ok(Self {
            store: Mutex::new(store),
            lives,
            fresh,
            lost: AtomicBool::new(false),
            current: watch::Sender::new(Arc::new(snapshot)),
        })
    }

    /// Reads the record again if it is not of `version`: another replica may have written it.
    ///
    /// # Errors
    /// If it cannot be read or used; then what was held stays.
    pub async fn refresh(&self, version: Option<&str>) -> Result<(), LedgerError> {
        let mut store = self.store.lock().await;
        if version.is_some() && store.version() == version {
            return Ok(());
        }
        self.read_again(&mut store).await
    }

    /// Writes what is in use into a record that is gone.
    ///
    /// # Errors
    /// If it is not gone, or cannot be written.
    pub async fn restore(&self) -> Result<(), LedgerError> {
        let mut store = self.store.lock().await;
        if store.load().await.map_err(LedgerError::Store)?.is_some() {
            return Err(LedgerError::Moved);
        }
        let record = journal::write(&self.current());
        store.save(record).await.map_err(LedgerError::Store)?;
        self.lost.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// Is the record gone from where it is kept? What is in use is then in memory alone: certificates are issued and
    /// renewed by it, and nothing of it is changed.
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// Do other replicas write it too?
    pub async fn is_shared(&self) -> bool {
        matches!(*self.store.lock().await, Store::Secret(_))
    }

    async fn read_again(&self, store: &mut Store) -> Result<(), LedgerError> {
        let held = self.current();
        let record = store.load().await.map_err(LedgerError::Store)?;
        self.lost.store(record.is_none(), Ordering::Relaxed);
        let record = record.ok_or_else(|| match store.missing() {
            Some(missing) => LedgerError::Store(missing),
            None => LedgerError::LostJournal {
                place: store.place(),
                sign: store.sign(),
            },
        })?;
        let read = journal::read(&record, &held.trust_domain, &store.place())?;
        if read.sequence < held.sequence {
            return Err(LedgerError::WentBack {
                found: read.sequence,
                held: held.sequence,
            });
        }
        if !read.is_same(&held) {
            tracing::info!(
                sequence = read.sequence,
                generation = read.certificate_generation,
                "the record was changed by another replica"
            );
            self.current.send_replace(Arc::new(read));
        }
        Ok(())
    }

    /// Was it made by this start?
    pub fn is_fresh(&self) -> bool {
        self.fresh
    }

    pub fn current(&self) -> Arc<Snapshot> {
        self.current.borrow().clone()
    }

    pub fn subscribe(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.current.subscribe()
    }

    /// Writes down that a rotation has begun. One that is under way goes on if it is of the same kind.
    ///
    /// # Errors
    /// [`LedgerError::Rotating`] while one of the other kind is under way.
    pub async fn begin(&self, kind: Kind) -> Result<Rotation, LedgerError> {
        let snapshot = self.change(|now| {
            Ok(match now.rotation {
                Some(rotation) if rotation.kind == kind => None,
                Some(rotation) => {
                    return Err(LedgerError::Rotating {
                        running: rotation.kind,
                    });
                }
                None => Some(Snapshot {
                    rotation: Some(Rotation::begin(kind)),
                    ..now.clone()
                }),
            })
        });
        Ok(snapshot.await?.rotation.expect("set or found just above"))
    }

    /// Does the next step of the rotation under way, which stands at `from`.
    ///
    /// # Errors
    /// If an authority cannot be made or kept, or if the rotation stands elsewhere; then nothing has changed.
    pub async fn perform(
        &self,
        from: Rotation,
        action: Action,
        at: SystemTime,
    ) -> Result<Rotation, LedgerError> {
        let after = from.after(action);
        let changed = self.change(|now| {
            if now.rotation != Some(from) {
                return Err(LedgerError::Moved);
            }
            let mut next = Snapshot {
                rotation: Some(after),
                sequence: now.sequence + 1,
                ..now.clone()
            };
            match action {
                Action::AddRoot => next.roots.push(Arc::new(
                    Authority::new_root(&now.trust_domain, at, self.lives.root)
                        .map_err(LedgerError::Authority)?,
                )),
                Action::SwitchIssuer => {
                    next.issuing = Arc::new(
                        now.newest_root()
                            .new_issuing(at, self.lives.issuing)
                            .map_err(LedgerError::Authority)?,
                    );
                    next.certificate_generation += 1;
                }
                Action::WithdrawRoots => next.roots = vec![now.newest_root().clone()],
            }
            Ok(Some(next))
        });
        changed.await.map(|_| after)
    }

    /// Writes down that the rotation is over.
    ///
    /// # Errors
    /// If the journal cannot be written.
    pub async fn finish(&self) -> Result<(), LedgerError> {
        let changed = self.change(|now| {
            Ok(Some(Snapshot {
                rotation: None,
                ..now.clone()
            }))
        });
        changed.await.map(drop)
    }

    async fn change(
        &self,
        make: impl Fn(&Snapshot) -> Result<Option<Snapshot>, LedgerError>,
    ) -> Result<Arc<Snapshot>, LedgerError> {
        let mut store = self.store.lock().await;
        for _ in 0..MAX_ATTEMPTS {
            let before = self.current();
            let Some(next) = make(&before)? else {
                return Ok(before);
            };
            match store.save(journal::write(&next)).await {
                Ok(()) => return Ok(self.changed(&mut store, next).await),
                Err(error) if error.is_conflict() => self.read_again(&mut store).await?,
                Err(error) => return Err(LedgerError::Store(error)),
            }
        }
        Err(LedgerError::Moved)
    }

    async fn changed(&self, store: &mut Store, next: Snapshot) -> Arc<Snapshot> {
        let next = Arc::new(next);
        self.current.send_replace(next.clone());
        // The record holds; the next start settles what could not be settled now.
        if let Err(error) = store.settle(next.bundle_pem(), next.serials()).await {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "could not bring the files in line with the record"
            );
        }
        next
    }
}

impl Snapshot {
    pub fn newest_root(&self) -> &Arc<Authority> {
        self.roots.last().expect("a ledger always has a root")
    }

    pub fn bundle_pem(&self) -> String {
        self.roots
            .iter()
            .map(|root| root.certificate_pem())
            .collect()
    }

    /// Serials name their authorities.
    fn is_same(&self, other: &Self) -> bool {
        self.sequence == other.sequence
            && self.certificate_generation == other.certificate_generation
            && self.rotation == other.rotation
            && self.serials() == other.serials()
    }

    fn serials(&self) -> Vec<String> {
        self.authorities()
            .map(|authority| authority.serial().to_string())
            .collect()
    }

    /// Roots, then who issues.
    pub fn authorities(&self) -> impl Iterator<Item = &Arc<Authority>> {
        self.roots.iter().chain([&self.issuing])
    }
}

fn first(
    trust_domain: &TrustDomain,
    lives: Lives,
    now: SystemTime,
) -> Result<Snapshot, LedgerError> {
    let root =
        Authority::new_root(trust_domain, now, lives.root).map_err(LedgerError::Authority)?;
    let issuing = root
        .new_issuing(now, lives.issuing)
        .map_err(LedgerError::Authority)?;
    Ok(Snapshot {
        trust_domain: trust_domain.clone(),
        sequence: 1,
        certificate_generation: 1,
        roots: vec![Arc::new(root)],
        issuing: Arc::new(issuing),
        rotation: None,
    })
}

#[cfg(test)]
#[path = "ledger_tests.rs"]
mod tests;
