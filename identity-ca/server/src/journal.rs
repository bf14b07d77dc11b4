// SPDX-License-Identifier: Apache-2.0
//! Between what holds ([`Snapshot`]) and what is kept of it ([`Record`]).

use crate::ledger::{LedgerError, Snapshot};
use crate::rotation::Rotation;
use crate::store::{Kept, Record};
use podveil_ca_issuer::{Authority, Role};
use podveil_identity::TrustDomain;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

const JOURNAL_VERSION: u32 = 1;

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

pub(crate) fn write(snapshot: &Snapshot) -> Record {
    let serial = |authority: &Arc<Authority>| authority.serial().to_string();
    let journal = Journal {
        version: JOURNAL_VERSION,
        trust_domain: snapshot.trust_domain.to_string(),
        sequence: snapshot.sequence,
        certificate_generation: snapshot.certificate_generation,
        roots: snapshot.roots.iter().map(serial).collect(),
        issuing: serial(&snapshot.issuing),
        rotation: snapshot.rotation,
    };
    let authorities = snapshot.authorities().map(|authority| {
        let kept = Kept {
            certificate: authority.certificate_pem().to_owned(),
            key: authority.key_pem(),
        };
        (serial(authority), kept)
    });
    Record {
        journal: serde_json::to_string_pretty(&journal).expect("plain data is always JSON"),
        authorities: authorities.collect(),
    }
}

/// `place` is where the record is kept, for messages.
///
/// # Errors
/// If it is damaged, of another version of this program or of another trust domain.
pub(crate) fn read(
    record: &Record,
    trust_domain: &TrustDomain,
    place: &str,
) -> Result<Snapshot, LedgerError> {
    let journal: Journal =
        serde_json::from_str(&record.journal).map_err(|source| LedgerError::DamagedJournal {
            place: place.to_owned(),
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
        let kept = record
            .authorities
            .get(serial)
            .ok_or_else(|| LedgerError::LostAuthority {
                serial: serial.clone(),
            })?;
        let authority = Authority::from_pem(&kept.certificate, &kept.key).map_err(|source| {
            LedgerError::DamagedAuthority {
                serial: serial.clone(),
                source,
            }
        })?;
        if authority.role() != role
            || authority.serial().to_string() != *serial
            || authority.trust_domain() != trust_domain
        {
            return Err(LedgerError::Inconsistent {
                what: "in an authority's place is another one",
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
