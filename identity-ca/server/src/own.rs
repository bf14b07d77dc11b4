// SPDX-License-Identifier: Apache-2.0
use crate::consumers::{Connection, InUse};
use crate::ledger::{Ledger, Snapshot};
use podveil_ca_client::{
    BundleError, Credentials, Key, KeyError, ProgramCredentials, Svid, SvidError, TrustBundle,
};
use podveil_ca_issuer::{Csr, CsrError, IssueError};
use podveil_identity::ProgramIdentity;
use rand::Rng;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio_util::sync::CancellationToken;

/// Where in its life the certificate is replaced; drawn once for each.
const RENEWAL: std::ops::Range<f64> = 0.35..0.45;
/// After a failure, which can only be a fault of the machine's.
const RETRY: Duration = Duration::from_secs(5);
/// The machine may sleep, and timers with it; certificates go by the wall clock.
const LOOK_AGAIN: Duration = Duration::from_secs(30);

/// The CA's own SVID, `/podveil/ca`, from its own chain. One task keeps it and the bundle that clients are checked by.
#[derive(Debug)]
pub struct OwnSvid {
    ledger: Arc<Ledger>,
    life: Duration,
    credentials: ProgramCredentials,
    renewal: SystemTime,
}

#[derive(Debug, thiserror::Error)]
pub enum OwnSvidError {
    #[error("the trust bundle cannot be used")]
    Bundle(#[source] BundleError),
    #[error("the own request was not taken")]
    Csr(#[source] CsrError),
    #[error("the own certificate was not issued")]
    Issue(#[source] IssueError),
    #[error("making the own key")]
    Key(#[source] KeyError),
    #[error("the own certificate cannot be used")]
    Svid(#[source] SvidError),
}

impl OwnSvid {
    /// # Errors
    /// [`OwnSvidError::Issue`] if the issuing authority has ended; the rest are faults of ours.
    pub fn new(ledger: Arc<Ledger>, life: Duration) -> Result<Self, OwnSvidError> {
        let snapshot = ledger.current();
        let (svid, renewal) = issue(&snapshot, life)?;
        Ok(Self {
            ledger,
            life,
            credentials: ProgramCredentials::fixed(Credentials {
                svid: Arc::new(svid),
                bundle: Arc::new(bundle(&snapshot)?),
            }),
            renewal,
        })
    }

    pub fn credentials(&self) -> ProgramCredentials {
        self.credentials.clone()
    }

    /// Follows the ledger until `stop`, and acknowledges as any other consumer of the bundle does.
    pub async fn run(mut self, consumer: Connection, stop: CancellationToken) {
        let mut ledger = self.ledger.subscribe();
        loop {
            let snapshot = ledger.borrow_and_update().clone();
            match self.follow(&snapshot) {
                Ok(in_use) => {
                    consumer.acknowledge(in_use);
                }
                Err(error) => {
                    tracing::error!(
                        error = &error as &dyn std::error::Error,
                        "could not replace the CA's own certificate"
                    );
                    self.renewal = self.renewal.max(SystemTime::now() + RETRY);
                }
            }
            let wait = self
                .renewal
                .duration_since(SystemTime::now())
                .unwrap_or_default()
                .min(LOOK_AGAIN);
            tokio::select! {
                () = stop.cancelled() => return,
                changed = ledger.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    fn follow(&mut self, snapshot: &Snapshot) -> Result<InUse, OwnSvidError> {
        let held = self.credentials.current().expect("made with credentials");
        let now = SystemTime::now();
        let stale = held.svid.generation() < snapshot.certificate_generation;
        // A clock that ran ahead and was set right leaves a certificate that nobody takes yet.
        let early = held.svid.not_before() > now;
        let mut svid = held.svid.clone();
        if stale || early || now >= self.renewal {
            let (new, renewal) = issue(snapshot, self.life)?;
            svid = Arc::new(new);
            self.renewal = renewal;
        }
        let in_use = InUse {
            sequence: snapshot.sequence,
            generation: svid.generation(),
        };
        if !Arc::ptr_eq(&svid, &held.svid) || held.bundle.sequence != snapshot.sequence {
            self.credentials.replace(Credentials {
                svid,
                bundle: Arc::new(bundle(snapshot)?),
            });
        }
        Ok(in_use)
    }
}

fn issue(snapshot: &Snapshot, life: Duration) -> Result<(Svid, SystemTime), OwnSvidError> {
    let id = ProgramIdentity::Ca.spiffe_id(&snapshot.trust_domain);
    let key = Key::generate().map_err(OwnSvidError::Key)?;
    let request = key.request(&id).map_err(OwnSvidError::Key)?;
    let csr = Csr::from_pem(&request).map_err(OwnSvidError::Csr)?;
    let now = SystemTime::now();
    let leaf = snapshot
        .issuing
        .issue(&csr.key, &id, life, now)
        .map_err(OwnSvidError::Issue)?;
    let left = leaf.not_after.duration_since(now).unwrap_or_default();
    let renewal = now + left.mul_f64(rand::rng().random_range(RENEWAL));
    let chain = vec![leaf.certificate, snapshot.issuing.certificate().clone()];
    let svid =
        Svid::new(chain, &key, snapshot.certificate_generation).map_err(OwnSvidError::Svid)?;
    Ok((svid, renewal))
}

pub(crate) fn bundle(snapshot: &Snapshot) -> Result<TrustBundle, OwnSvidError> {
    TrustBundle::new(
        snapshot.trust_domain.clone(),
        snapshot.sequence,
        snapshot
            .roots
            .iter()
            .map(|root| root.certificate().clone())
            .collect(),
        snapshot.certificate_generation,
    )
    .map_err(OwnSvidError::Bundle)
}
