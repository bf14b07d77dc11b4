// SPDX-License-Identifier: Apache-2.0
use super::*;
use crate::rotation::Phase;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

const LIVES: Lives = Lives {
    root: Duration::from_secs(3650 * 24 * 3600),
    issuing: Duration::from_secs(90 * 24 * 3600),
};

fn open(folder: &Path) -> Result<Ledger, LedgerError> {
    Ledger::open(
        Store::open(folder).unwrap(),
        &TrustDomain::new("cluster.local").unwrap(),
        LIVES,
        SystemTime::now(),
    )
}

fn facts(snapshot: &Snapshot) -> (u64, u64, Vec<String>, Option<Rotation>) {
    (
        snapshot.sequence,
        snapshot.certificate_generation,
        snapshot.serials(),
        snapshot.rotation,
    )
}

#[test]
fn a_restart_keeps_root_issuer_sequence_and_generation() {
    let folder = tempfile::tempdir().unwrap();
    let first = facts(&open(folder.path()).unwrap().current());
    assert_eq!((first.0, first.1, first.2.len()), (1, 1, 2));
    assert_eq!(facts(&open(folder.path()).unwrap().current()), first);
}

#[test]
fn each_step_of_a_rotation_is_found_again_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let now = SystemTime::now();
    let ledger = open(folder.path()).unwrap();
    let old = ledger.current();
    ledger.begin(Kind::Root).unwrap();

    let mut expected = facts(&ledger.current());
    drop(ledger);
    for (action, phase, sequence, generation, roots) in [
        (Action::AddRoot, Phase::RootAdded, 2, 1, 2),
        (Action::SwitchIssuer, Phase::IssuerSwitched, 3, 2, 2),
        (Action::WithdrawRoots, Phase::RootWithdrawn, 4, 2, 1),
    ] {
        let ledger = open(folder.path()).unwrap();
        assert_eq!(facts(&ledger.current()), expected);
        let rotation = ledger.perform(action, now).unwrap();
        assert_eq!(rotation.phase, phase);
        let snapshot = ledger.current();
        assert_eq!(
            (
                snapshot.sequence,
                snapshot.certificate_generation,
                snapshot.roots.len()
            ),
            (sequence, generation, roots)
        );
        expected = facts(&snapshot);
        let bundle = std::fs::read_to_string(folder.path().join("bundle.pem")).unwrap();
        assert_eq!(bundle, snapshot.bundle_pem());
    }
    let ledger = open(folder.path()).unwrap();
    ledger.finish().unwrap();
    let new = ledger.current();
    assert_eq!(new.rotation, None);
    assert_ne!(new.newest_root().serial(), old.newest_root().serial());
    assert_ne!(new.issuing.serial(), old.issuing.serial());
    let files = std::fs::read_dir(folder.path().join("authorities")).unwrap();
    assert_eq!(files.count(), 4, "key and certificate of two authorities");
}

#[test]
fn a_second_rotation_of_another_kind_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let ledger = open(folder.path()).unwrap();
    ledger.begin(Kind::Leaf).unwrap();
    ledger.begin(Kind::Leaf).unwrap();
    assert!(matches!(
        ledger.begin(Kind::Root),
        Err(LedgerError::Rotating {
            running: Kind::Leaf
        })
    ));
}

#[test]
fn a_damaged_journal_or_authority_is_refused_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let snapshot = open(folder.path()).unwrap().current();
    let journal = folder.path().join("journal.json");
    let good = std::fs::read_to_string(&journal).unwrap();
    for broken in [
        "",
        "{",
        "null",
        &good.replace("\"version\": 1", "\"version\": 2"),
    ] {
        std::fs::write(&journal, broken).unwrap();
        assert!(open(folder.path()).is_err(), "{broken}");
        assert_eq!(std::fs::read_to_string(&journal).unwrap(), broken);
    }
    std::fs::write(&journal, &good).unwrap();
    let key = folder
        .path()
        .join(format!("authorities/{}.key", snapshot.issuing.serial()));
    let root_key = folder.path().join(format!(
        "authorities/{}.key",
        snapshot.newest_root().serial()
    ));
    std::fs::copy(root_key, key).unwrap();
    assert!(matches!(
        open(folder.path()),
        Err(LedgerError::DamagedAuthority { .. })
    ));
}

#[test]
fn a_lost_journal_is_refused_and_the_authorities_are_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    assert!(open(folder.path()).unwrap().is_fresh());
    let journal = folder.path().join("journal.json");
    let good = std::fs::read(&journal).unwrap();
    std::fs::remove_file(&journal).unwrap();
    assert!(matches!(
        open(folder.path()),
        Err(LedgerError::LostJournal { .. })
    ));
    std::fs::write(&journal, good).unwrap();
    std::fs::set_permissions(&journal, std::fs::Permissions::from_mode(0o600)).unwrap();
    assert!(!open(folder.path()).unwrap().is_fresh());
}

#[test]
fn another_trust_domain_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    drop(open(folder.path()).unwrap());
    let other = Ledger::open(
        Store::open(folder.path()).unwrap(),
        &TrustDomain::new("other.domain").unwrap(),
        LIVES,
        SystemTime::now(),
    );
    assert!(matches!(other, Err(LedgerError::OtherTrustDomain { .. })));
}
