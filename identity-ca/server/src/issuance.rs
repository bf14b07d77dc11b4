// SPDX-License-Identifier: Apache-2.0
use crate::admission::{Admission, Caller};
use crate::entitlement::NotEntitled;
use crate::first_contact::FirstContact;
use crate::ledger::Ledger;
use crate::metrics::Metrics;
use crate::reading::{No, Reading};
use crate::refusal::{Refusal, with_sources};
use podveil_ca_issuer::{Csr, chain};
use podveil_identity::{KubernetesName, ProgramIdentity, SpiffeId, TrustDomain, WorkloadIdentity};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::time::Instant;

/// Shorter lives would have every clock a little off refuse them.
const MIN_LIFE: Duration = Duration::from_secs(60);

/// Decides on requests for certificates and answers them.
#[derive(Debug)]
pub struct Issuance {
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) reading: Reading,
    pub(crate) first_contact: FirstContact,
    pub(crate) admission: Admission,
    pub(crate) metrics: Metrics,
    pub(crate) leaf_life: Duration,
    pub(crate) program_life: Duration,
}

/// A chain as it is answered.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Issued {
    pub chain: Vec<String>,
    pub generation: u64,
}

impl Issuance {
    /// A workload's certificate, for the node whose SVID the caller proved. `life` is clamped, never refused.
    ///
    /// # Errors
    /// [`Refusal`]; counted and logged already.
    pub async fn workload(
        &self,
        peer: Option<&SpiffeId>,
        identity: Option<&str>,
        csr: &str,
        life: Duration,
    ) -> Result<Issued, Refusal> {
        self.metrics.received();
        let issued = self.workload_checked(peer, identity, csr, life).await;
        self.account(peer, &issued);
        issued
    }

    async fn workload_checked(
        &self,
        peer: Option<&SpiffeId>,
        identity: Option<&str>,
        csr: &str,
        life: Duration,
    ) -> Result<Issued, Refusal> {
        let peer = peer.ok_or(Refusal::NoCredential)?;
        let program = ProgramIdentity::try_from(peer).map_err(|_| Refusal::NotANode)?;
        self.admit(Caller::Program(&program))?;
        let ProgramIdentity::Node(node) = &program else {
            return Err(Refusal::NotANode);
        };
        let identity = workload_identity(identity.ok_or(Refusal::NoIdentity)?)?;
        let id = identity.spiffe_id();
        let csr = Csr::from_pem(csr).map_err(Refusal::Csr)?;
        names_only(&csr, &id)?;
        self.entitled(node, &identity).await?;
        let life = if life.is_zero() { self.leaf_life } else { life };
        let life = life.clamp(MIN_LIFE.min(self.leaf_life), self.leaf_life);
        self.issue(&csr, &id, life, &program)
    }

    /// A program's own certificate: renewed by the SVID held, first issued for a token.
    ///
    /// # Errors
    /// [`Refusal`]; counted and logged already.
    pub async fn program(
        &self,
        peer: Option<&SpiffeId>,
        token: Option<&str>,
        csr: &str,
    ) -> Result<Issued, Refusal> {
        self.metrics.received();
        let issued = self.program_checked(peer, token, csr).await;
        self.account(peer, &issued);
        issued
    }

    async fn program_checked(
        &self,
        peer: Option<&SpiffeId>,
        token: Option<&str>,
        csr: &str,
    ) -> Result<Issued, Refusal> {
        let program = match (peer, token) {
            (Some(peer), _) => {
                let program = ProgramIdentity::try_from(peer).map_err(|_| Refusal::NotRenewable)?;
                self.admit(Caller::Program(&program))?;
                program
            }
            (None, Some(token)) => {
                self.admit(Caller::FirstContact)?;
                self.first_contact
                    .program(token)
                    .await
                    .map_err(Refusal::Token)?
            }
            (None, None) => return Err(Refusal::NoCredential),
        };
        // The CA makes its own certificate by itself and never hands one out.
        if program == ProgramIdentity::Ca {
            return Err(Refusal::NotRenewable);
        }
        let id = program.spiffe_id(&self.trust_domain());
        let csr = Csr::from_pem(csr).map_err(Refusal::Csr)?;
        names_only(&csr, &id)?;
        self.reading
            .when(|read| read.check_program(&program), |_| true)
            .await?;
        self.issue(&csr, &id, self.program_life, &program)
    }

    fn trust_domain(&self) -> TrustDomain {
        self.ledger.current().trust_domain.clone()
    }

    fn admit(&self, caller: Caller<'_>) -> Result<(), Refusal> {
        self.admission
            .admit(caller, Instant::now().into_std())
            .map_err(Refusal::Exhausted)
    }

    /// Waits a little for the CA's own reading to catch up with the caller's.
    async fn entitled(
        &self,
        node: &KubernetesName,
        identity: &WorkloadIdentity,
    ) -> Result<(), Refusal> {
        self.reading
            .when(
                |read| read.check(node, identity, Instant::now().into_std()),
                |no| *no != NotEntitled::WrongTrustDomain,
            )
            .await?;
        Ok(())
    }

    fn issue(
        &self,
        csr: &Csr,
        id: &SpiffeId,
        life: Duration,
        caller: &ProgramIdentity,
    ) -> Result<Issued, Refusal> {
        let snapshot = self.ledger.current();
        let leaf = snapshot
            .issuing
            .issue(&csr.key, id, life, SystemTime::now())
            .map_err(Refusal::Issue)?;
        self.metrics.issued(leaf.clamped);
        tracing::info!(
            target: "podveil_ca::audit",
            %id,
            %caller,
            key = csr.key.fingerprint(),
            serial = %leaf.serial,
            not_after = crate::metrics::unix_seconds(leaf.not_after),
            generation = snapshot.certificate_generation,
            "issued"
        );
        if leaf.clamped {
            tracing::warn!(%id, "the certificate ends early, with its issuer: rotate");
        }
        Ok(Issued {
            chain: chain(
                &leaf,
                &snapshot.issuing,
                snapshot.roots.iter().map(AsRef::as_ref),
            ),
            generation: snapshot.certificate_generation,
        })
    }

    fn account(&self, peer: Option<&SpiffeId>, issued: &Result<Issued, Refusal>) {
        let Err(refusal) = issued else { return };
        self.metrics.refused(refusal);
        // Over the limit nothing is logged, so a caller writes no faster than it is admitted. Without any credential
        // there is no limit to hold it to.
        if matches!(refusal, Refusal::Exhausted(_) | Refusal::NoCredential) {
            tracing::debug!(reason = refusal.reason(), "no certificate");
            return;
        }
        tracing::warn!(
            target: "podveil_ca::audit",
            caller = peer.map_or_else(|| "first contact".into(), SpiffeId::to_string),
            reason = refusal.reason(),
            error = with_sources(refusal),
            "refused"
        );
    }
}

impl From<No<NotEntitled>> for Refusal {
    fn from(no: No<NotEntitled>) -> Self {
        match no {
            No::Because(error) => Self::NotEntitled(error),
            No::NotReady => Self::NotReady,
        }
    }
}

/// Parsed into parts, and only from the parts is anything built again.
fn workload_identity(text: &str) -> Result<WorkloadIdentity, Refusal> {
    let id = SpiffeId::new(text).map_err(|_| Refusal::BadIdentity)?;
    if id.path() == "/podveil" || id.path().starts_with("/podveil/") {
        return Err(Refusal::ProgramIdentity);
    }
    WorkloadIdentity::try_from(&id).map_err(|_| Refusal::BadIdentity)
}

/// A request may name nobody, or exactly whom it would be for: who is set up for another identity learns it here.
fn names_only(csr: &Csr, id: &SpiffeId) -> Result<(), Refusal> {
    let same = |uri: &String| SpiffeId::new(uri).is_ok_and(|named| named == *id);
    if csr.uris.iter().all(same) {
        Ok(())
    } else {
        Err(Refusal::CsrNamesAnother)
    }
}

#[cfg(test)]
#[path = "issuance_tests.rs"]
mod tests;
