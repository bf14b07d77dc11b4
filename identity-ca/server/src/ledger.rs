// SPDX-License-Identifier: Apache-2.0
use crate::rotation::{Action, Kind, Rotation};
use crate::store::{Store, StoreError};
use podveil_ca_issuer::{Authority, AuthorityError, Role};
use podveil_identity::TrustDomain;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::sync::watch;

const JOURNAL_VERSION: u32 = 1;

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

/// Authorities, bundle and rotation, kept in the data directory: every change is on disk before anybody sees it.
#[derive(Debug)]
pub struct Ledger {
    store: Mutex<Store>,
    lives: Lives,
    /// Made by this start: no program can have had anything from it before.
    fresh: bool,
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
    #[error("authority {serial} in the data directory is damaged")]
    DamagedAuthority {
        serial: String,
        #[source]
        source: AuthorityError,
    },
    #[error("the journal {} is damaged", path.display())]
    DamagedJournal {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("the journal says what cannot be: {what}")]
    Inconsistent { what: &'static str },
    #[error("{} is missing, although the data directory has been in use", path.display())]
    LostJournal { path: PathBuf },
    #[error("the data directory belongs to trust domain {found}, the configuration says {wanted}")]
    OtherTrustDomain { found: String, wanted: String },
    #[error(
        "the data directory was written by another version of this program (journal version {found})"
    )]
    OtherVersion { found: u32 },
    #[error("a {running:?} rotation is under way")]
    Rotating { running: Kind },
    #[error("the data directory cannot be used")]
    Store(#[source] StoreError),
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Journal {
    version: u32,
    trust_domain: String,
    sequence: u64,
    certificate_generation: u64,
    /// Serials, the newest last.
    roots: Vec<String>,
    issuing: String,
    rotation: Option<Rotation>,
}

impl Ledger {
    /// Reads what is kept in `store`, or makes a root and an issuing authority where nothing is.
    ///
    /// # Errors
    /// If what is kept is damaged or of another trust domain. Nothing is ever made anew in its place: that would be
    /// another CA, and every program would have to be told.
    pub fn open(
        store: Store,
        trust_domain: &TrustDomain,
        lives: Lives,
        now: SystemTime,
    ) -> Result<Self, LedgerError> {
        let journal = store.read_journal().map_err(LedgerError::Store)?;
        let fresh = journal.is_none();
        let snapshot = match journal {
            Some(text) => load(&store, &text, trust_domain)?,
            // The bundle is written after the first journal.
            None if store.has_bundle() => {
                return Err(LedgerError::LostJournal {
                    path: store.journal_path(),
                });
            }
            None => {
                let snapshot = first(trust_domain, lives, now)?;
                save(&store, None, &snapshot)?;
                tracing::info!(
                    root = snapshot.roots[0].subject(),
                    "made the first root of the trust domain"
                );
                snapshot
            }
        };
        let bundle: String = snapshot.bundle_pem();
        store.write_bundle(&bundle).map_err(LedgerError::Store)?;
        store
            .keep_only(&snapshot.serials())
            .map_err(LedgerError::Store)?;
        Ok(Self {
            store: Mutex::new(store),
            lives,
            fresh,
            current: watch::Sender::new(Arc::new(snapshot)),
        })
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
    pub fn begin(&self, kind: Kind) -> Result<Rotation, LedgerError> {
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
        })?;
        Ok(snapshot.rotation.expect("set or found just above"))
    }

    /// Does one step of the rotation under way. Blocks on the disk.
    ///
    /// # Errors
    /// If an authority cannot be made or kept; then nothing has changed.
    pub fn perform(&self, action: Action, at: SystemTime) -> Result<Rotation, LedgerError> {
        let mut after = None;
        self.change(|now| {
            let rotation = now
                .rotation
                .ok_or(LedgerError::Inconsistent {
                    what: "no rotation is under way",
                })?
                .after(action);
            after = Some(rotation);
            let mut next = Snapshot {
                rotation: Some(rotation),
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
        })?;
        Ok(after.expect("the change was made"))
    }

    /// Writes down that the rotation is over.
    ///
    /// # Errors
    /// If the journal cannot be written.
    pub fn finish(&self) -> Result<(), LedgerError> {
        self.change(|now| {
            Ok(Some(Snapshot {
                rotation: None,
                ..now.clone()
            }))
        })
        .map(drop)
    }

    fn change(
        &self,
        make: impl FnOnce(&Snapshot) -> Result<Option<Snapshot>, LedgerError>,
    ) -> Result<Arc<Snapshot>, LedgerError> {
        let store = self.store.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.current();
        let Some(next) = make(&before)? else {
            return Ok(before);
        };
        save(&store, Some(&before), &next)?;
        let next = Arc::new(next);
        self.current.send_replace(next.clone());
        // What is left over has no meaning any more; the next start removes it too.
        if let Err(error) = store.keep_only(&next.serials()) {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "could not remove a replaced authority"
            );
        }
        Ok(next)
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

fn load(store: &Store, text: &str, trust_domain: &TrustDomain) -> Result<Snapshot, LedgerError> {
    let journal: Journal =
        serde_json::from_str(text).map_err(|source| LedgerError::DamagedJournal {
            path: store.journal_path(),
            source,
        })?;
    if journal.version != JOURNAL_VERSION {
        return Err(LedgerError::OtherVersion {
            found: journal.version,
        });
    }
    if journal.trust_domain != trust_domain.as_str() {
        return Err(LedgerError::OtherTrustDomain {
            found: journal.trust_domain,
            wanted: trust_domain.to_string(),
        });
    }
    let authority = |serial: &String, role: Role| {
        let damaged = |source| LedgerError::DamagedAuthority {
            serial: serial.clone(),
            source,
        };
        let (certificate, key) = store.read_authority(serial).map_err(LedgerError::Store)?;
        let authority = Authority::from_pem(&certificate, &key).map_err(damaged)?;
        if authority.role() != role || authority.serial().to_string() != *serial {
            return Err(LedgerError::Inconsistent {
                what: "an authority's file holds another one",
            });
        }
        Ok(Arc::new(authority))
    };
    if journal.roots.is_empty() {
        return Err(LedgerError::Inconsistent {
            what: "there is no root",
        });
    }
    Ok(Snapshot {
        trust_domain: trust_domain.clone(),
        sequence: journal.sequence,
        certificate_generation: journal.certificate_generation,
        roots: journal
            .roots
            .iter()
            .map(|serial| authority(serial, Role::Root))
            .collect::<Result<_, _>>()?,
        issuing: authority(&journal.issuing, Role::Issuing)?,
        rotation: journal.rotation,
    })
}

/// Authorities first, then the journal that names them, then what is derived from it.
fn save(store: &Store, before: Option<&Snapshot>, next: &Snapshot) -> Result<(), LedgerError> {
    for authority in next.authorities() {
        let known = before.is_some_and(|before| {
            before
                .authorities()
                .any(|known| known.serial() == authority.serial())
        });
        if !known {
            store
                .write_authority(
                    &authority.serial().to_string(),
                    authority.certificate_pem(),
                    &authority.key_pem(),
                )
                .map_err(LedgerError::Store)?;
        }
    }
    let serials = |authorities: &[Arc<Authority>]| {
        authorities
            .iter()
            .map(|authority| authority.serial().to_string())
            .collect()
    };
    let journal = Journal {
        version: JOURNAL_VERSION,
        trust_domain: next.trust_domain.to_string(),
        sequence: next.sequence,
        certificate_generation: next.certificate_generation,
        roots: serials(&next.roots),
        issuing: next.issuing.serial().to_string(),
        rotation: next.rotation,
    };
    let text = serde_json::to_string_pretty(&journal).expect("plain data is always JSON");
    store.write_journal(&text).map_err(LedgerError::Store)?;
    store
        .write_bundle(&next.bundle_pem())
        .map_err(LedgerError::Store)
}

#[cfg(test)]
#[path = "ledger_tests.rs"]
mod tests;
