// SPDX-License-Identifier: Apache-2.0
use super::*;
use crate::rotation::Phase;
use crate::store::Directory;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

const LIVES: Lives = Lives {
    root: Duration::from_secs(3650 * 24 * 3600),
    issuing: Duration::from_secs(90 * 24 * 3600),
};

async fn open(folder: &Path) -> Result<Ledger, LedgerError> {
    open_as(folder, "cluster.local").await
}

async fn open_as(folder: &Path, trust_domain: &str) -> Result<Ledger, LedgerError> {
    Ledger::open(
        Store::Directory(Arc::new(Directory::open(folder).unwrap())),
        &TrustDomain::new(trust_domain).unwrap(),
        LIVES,
        SystemTime::now(),
    )
    .await
}

fn facts(snapshot: &Snapshot) -> (u64, u64, Vec<String>, Option<Rotation>) {
    (
        snapshot.sequence,
        snapshot.certificate_generation,
        snapshot.serials(),
        snapshot.rotation,
    )
}

#[tokio::test]
async fn a_restart_keeps_root_issuer_sequence_and_generation() {
    let folder = tempfile::tempdir().unwrap();
    let first = facts(&open(folder.path()).await.unwrap().current());
    assert_eq!((first.0, first.1, first.2.len()), (1, 1, 2));
    assert_eq!(facts(&open(folder.path()).await.unwrap().current()), first);
}

#[tokio::test]
async fn each_step_of_a_rotation_is_found_again_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let now = SystemTime::now();
    let ledger = open(folder.path()).await.unwrap();
    let old = ledger.current();
    ledger.begin(Kind::Root).await.unwrap();

    let mut expected = facts(&ledger.current());
    drop(ledger);
    for (action, phase, sequence, generation, roots) in [
        (Action::AddRoot, Phase::RootAdded, 2, 1, 2),
        (Action::SwitchIssuer, Phase::IssuerSwitched, 3, 2, 2),
        (Action::WithdrawRoots, Phase::RootWithdrawn, 4, 2, 1),
    ] {
        let ledger = open(folder.path()).await.unwrap();
        assert_eq!(facts(&ledger.current()), expected);
        let rotation = ledger
            .perform(ledger.current().rotation.unwrap(), action, now)
            .await
            .unwrap();
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
    let ledger = open(folder.path()).await.unwrap();
    ledger.finish().await.unwrap();
    let new = ledger.current();
    assert_eq!(new.rotation, None);
    assert_ne!(new.newest_root().serial(), old.newest_root().serial());
    assert_ne!(new.issuing.serial(), old.issuing.serial());
    let files = std::fs::read_dir(folder.path().join("authorities")).unwrap();
    assert_eq!(files.count(), 4, "key and certificate of two authorities");
}

#[tokio::test]
async fn a_second_rotation_of_another_kind_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let ledger = open(folder.path()).await.unwrap();
    ledger.begin(Kind::Leaf).await.unwrap();
    ledger.begin(Kind::Leaf).await.unwrap();
    assert!(matches!(
        ledger.begin(Kind::Root).await,
        Err(LedgerError::Rotating {
            running: Kind::Leaf
        })
    ));
}

#[tokio::test]
async fn a_damaged_journal_or_authority_is_refused_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let snapshot = open(folder.path()).await.unwrap().current();
    let journal = folder.path().join("journal.json");
    let good = std::fs::read_to_string(&journal).unwrap();
    for broken in [
        "",
        "{",
        "null",
        &good.replace("\"version\": 1", "\"version\": 2"),
    ] {
        std::fs::write(&journal, broken).unwrap();
        assert!(open(folder.path()).await.is_err(), "{broken}");
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
        open(folder.path()).await,
        Err(LedgerError::DamagedAuthority { .. })
    ));
}

#[tokio::test]
async fn a_lost_journal_is_refused_and_the_authorities_are_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    assert!(open(folder.path()).await.unwrap().is_fresh());
    let journal = folder.path().join("journal.json");
    let good = std::fs::read(&journal).unwrap();
    std::fs::remove_file(&journal).unwrap();
    assert!(matches!(
        open(folder.path()).await,
        Err(LedgerError::LostJournal { .. })
    ));
    std::fs::write(&journal, good).unwrap();
    std::fs::set_permissions(&journal, std::fs::Permissions::from_mode(0o600)).unwrap();
    assert!(!open(folder.path()).await.unwrap().is_fresh());
}

#[tokio::test]
async fn another_trust_domain_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    drop(open(folder.path()).await.unwrap());
    let other = open_as(folder.path(), "other.domain").await;
    assert!(matches!(other, Err(LedgerError::OtherTrustDomain { .. })));
}

#[tokio::test]
async fn a_step_of_a_rotation_that_has_moved_on_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let ledger = open(folder.path()).await.unwrap();
    let from = ledger.begin(Kind::Root).await.unwrap();
    let now = SystemTime::now();
    ledger.perform(from, Action::AddRoot, now).await.unwrap();
    let again = ledger.perform(from, Action::AddRoot, now).await;
    assert!(matches!(again, Err(LedgerError::Moved)));
    assert_eq!(ledger.current().roots.len(), 2);
}

#[tokio::test]
async fn a_life_past_the_year_9999_is_refused_before_anything_is_made() {
    let folder = tempfile::tempdir().unwrap();
    let lives = Lives {
        root: Duration::from_secs(8000 * 365 * 24 * 3600),
        ..LIVES
    };
    let trust_domain = TrustDomain::new("cluster.local").unwrap();
    let opened = Ledger::open(
        Store::Directory(Arc::new(Directory::open(folder.path()).unwrap())),
        &trust_domain,
        lives,
        SystemTime::now(),
    );
    let error = opened.await.unwrap_err();
    assert!(matches!(error, LedgerError::TooLong { what: "root_ttl" }));
    assert!(!folder.path().join("journal.json").exists());
}
