// SPDX-License-Identifier: Apache-2.0
use crate::ca::{NODE, TestCa, bundle, trust_domain};
use crate::fake::{FakeCa, TOKEN};
use podveil_ca_client::{Module, ProgramConfig, ProgramCredentials};
use podveil_identity::ProgramIdentity;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

/// A program with files of its own, removed at the end.
pub struct Program {
    pub credentials: ProgramCredentials,
    pub directory: PathBuf,
    pub stop: CancellationToken,
    _stop: DropGuard,
}

impl Drop for Program {
    fn drop(&mut self) {
        self.stop.cancel();
        // A bundle that is being stored may come between the removal of the files and that of their folder.
        const TRIES: u32 = 1000;
        for _ in 0..TRIES {
            match std::fs::remove_dir_all(&self.directory) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    std::thread::yield_now();
                }
                _ => return,
            }
        }
    }
}

pub fn start(ca: &FakeCa, trusted: &[&TestCa], stored: Option<&TestCa>) -> Program {
    start_at(ca.address(), trusted, stored)
}

fn start_at(ca_address: String, trusted: &[&TestCa], stored: Option<&TestCa>) -> Program {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let directory = std::env::temp_dir().join(format!(
        "podveil-ca-client-{}-{}",
        std::process::id(),
        NUMBER.fetch_add(1, Ordering::Relaxed)
    ));
    std::fs::create_dir_all(directory.join("state")).unwrap();
    std::fs::write(directory.join("token"), format!("{TOKEN}\n")).unwrap();
    std::fs::write(directory.join("roots.pem"), bundle(0, trusted, 0).to_pem()).unwrap();
    if let Some(stored) = stored {
        let text = bundle(0, &[stored], 0).to_pem();
        std::fs::write(directory.join("state/bundle.pem"), text).unwrap();
    }
    let stop = CancellationToken::new();
    let config = ProgramConfig {
        trust_domain: trust_domain(),
        identity: ProgramIdentity::Node("n1".parse().unwrap()),
        ca_address,
        token_path: directory.join("token"),
        bootstrap_bundle: directory.join("roots.pem"),
        state_dir: directory.join("state"),
        module: Module::Proxy,
    };
    Program {
        credentials: ProgramCredentials::start(config, stop.clone()),
        directory,
        stop: stop.clone(),
        _stop: stop.drop_guard(),
    }
}

#[tokio::test]
async fn first_contact_is_by_token_and_renewal_by_the_svid_held() {
    let ca = Arc::new(TestCa::new("a"));
    let fake = FakeCa::start(ca.clone()).await;
    let program = start(&fake, &[&ca], None);
    let first = program.credentials.ready().await;
    assert_eq!(first.svid.id().to_string(), NODE);
    assert_eq!(first.svid.generation(), 1);
    assert_eq!(fake.log().programs, [(None, true)]);
    fake.send_bundle(bundle(2, &[&ca], 2));
    fake.issue_from(&ca, 2);
    let log = fake.until(|log| log.programs.len() > 1).await;
    assert_eq!(log.programs[1], (Some(NODE.to_owned()), false));
    let mut credentials = program.credentials.subscribe();
    let renewed = credentials
        .wait_for(|current| current.as_ref().unwrap().svid.generation() == 2)
        .await
        .unwrap()
        .clone()
        .unwrap();
    assert_ne!(renewed.svid.serial(), first.svid.serial());
}

#[tokio::test]
async fn a_bundle_is_put_in_use_stored_and_then_acknowledged() {
    let (old, new) = (Arc::new(TestCa::new("old")), Arc::new(TestCa::new("new")));
    let fake = FakeCa::start(old.clone()).await;
    let program = start(&fake, &[&old], None);
    let log = fake.until(|log| log.in_use.len() == 2).await;
    let said: Vec<_> = log
        .in_use
        .iter()
        .map(|said| (said.sequence, said.certificate_generation, said.module))
        .collect();
    assert_eq!(said, [(0, 1, 1), (1, 1, 1)]);

    let both = bundle(2, &[&old, &new], 1);
    fake.send_bundle(both.clone());
    fake.until(|log| log.in_use.last().unwrap().sequence == 2)
        .await;
    assert_eq!(**program.credentials.bundle().borrow(), *both);
    assert_eq!(*program.credentials.current().unwrap().bundle, *both);
    let stored = std::fs::read_to_string(program.directory.join("state/bundle.pem")).unwrap();
    assert_eq!(stored, both.to_pem());
}

#[tokio::test]
async fn a_root_rotation_reissues_and_reports_the_generation() {
    let (old, new) = (Arc::new(TestCa::new("old")), Arc::new(TestCa::new("new")));
    let fake = FakeCa::start(old.clone()).await;
    let program = start(&fake, &[&old], None);
    fake.send_bundle(bundle(2, &[&old, &new], 1));
    fake.until(|log| log.in_use.last().is_some_and(|said| said.sequence == 2))
        .await;
    fake.issue_from(&new, 2);
    fake.send_bundle(bundle(3, &[&old, &new], 2));
    fake.until(|log| log.in_use.last().unwrap().certificate_generation == 2)
        .await;
    fake.send_bundle(bundle(4, &[&new], 2));
    fake.until(|log| log.in_use.last().unwrap().sequence == 4)
        .await;
    let current = program.credentials.current().unwrap();
    assert_eq!(current.svid.generation(), 2);
    assert_eq!(current.bundle.roots, [new.root()]);
}

#[tokio::test]
async fn a_bundle_stream_that_ends_is_opened_again_and_what_is_in_use_is_said_again() {
    let ca = Arc::new(TestCa::new("a"));
    let fake = FakeCa::start(ca.clone()).await;
    let program = start(&fake, &[&ca], None);
    fake.until(|log| log.in_use.len() == 2).await;
    fake.end_bundle_streams();
    let log = fake.until(|log| log.in_use.len() == 4).await;
    let said: Vec<_> = log.in_use.iter().map(|said| said.sequence).collect();
    assert_eq!(said, [0, 1, 0, 1]);
    assert_eq!(program.credentials.bundle().borrow().sequence, 1);
}

#[tokio::test]
async fn an_older_bundle_is_ignored() {
    let ca = Arc::new(TestCa::new("a"));
    let fake = FakeCa::start(ca.clone()).await;
    let program = start(&fake, &[&ca], None);
    fake.send_bundle(bundle(5, &[&ca], 1));
    fake.until(|log| log.in_use.last().is_some_and(|said| said.sequence == 5))
        .await;
    fake.send_bundle(bundle(4, &[], 1));
    fake.until(|log| log.sent.contains(&4)).await;
    fake.send_bundle(bundle(6, &[&ca], 1));
    fake.until(|log| log.in_use.last().unwrap().sequence == 6)
        .await;
    assert!(fake.log().in_use.iter().all(|said| said.sequence != 4));
    assert_eq!(program.credentials.bundle().borrow().roots.len(), 1);
}

#[tokio::test]
async fn a_stale_stored_bundle_does_not_lock_the_program_out() {
    let (ca, stale) = (Arc::new(TestCa::new("a")), TestCa::new("stale"));
    let fake = FakeCa::start(ca.clone()).await;
    let program = start(&fake, &[&ca], Some(&stale));
    let ready = program.credentials.ready().await;
    assert_eq!(ready.bundle.roots, [ca.root()]);
}

#[tokio::test]
async fn a_ca_that_is_not_trusted_never_sees_the_token() {
    let (ca, other) = (Arc::new(TestCa::new("a")), TestCa::new("other"));
    let fake = FakeCa::start(ca).await;
    let program = start(&fake, &[&other], None);
    let mut error = program.credentials.last_error();
    let error = error.wait_for(Option::is_some).await.unwrap().clone();
    assert!(error.unwrap().contains("UnknownIssuer"));
    assert!(program.credentials.current().is_none());
    assert!(fake.log().programs.is_empty());
}

#[tokio::test]
async fn the_token_leads_back_when_the_svid_held_is_no_longer_trusted() {
    let (old, new) = (Arc::new(TestCa::new("old")), Arc::new(TestCa::new("new")));
    let fake = FakeCa::start(old.clone()).await;
    let program = start(&fake, &[&old], None);
    fake.until(|log| log.in_use.len() == 2).await;
    // The rotation does not wait for this program: its SVID is of the root that is withdrawn.
    fake.issue_from(&new, 2);
    fake.send_bundle(bundle(2, &[&new], 2));
    fake.until(|log| {
        log.in_use
            .last()
            .is_some_and(|said| (said.sequence, said.certificate_generation) == (2, 2))
    })
    .await;
    let log = fake.log();
    assert_eq!(log.programs.first(), Some(&(None, true)));
    assert_eq!(log.programs.last(), Some(&(None, true)));
    assert_eq!(program.credentials.current().unwrap().svid.generation(), 2);
}

#[tokio::test]
async fn the_operators_bundle_leads_back_after_a_root_rotation_that_went_by() {
    let (old, new) = (Arc::new(TestCa::new("old")), Arc::new(TestCa::new("new")));
    let before = FakeCa::start(old.clone()).await;
    let after = FakeCa::start(new.clone()).await;
    after.issue_from(&new, 2);
    after.send_bundle(bundle(4, &[&new], 2));
    let network = Network::start(&before).await;
    let program = start_at(network.address.clone(), &[&old], None);
    before.until(|log| log.in_use.len() == 2).await;
    let operators = bundle(0, &[&new], 0).to_pem();
    std::fs::write(program.directory.join("roots.pem"), operators).unwrap();
    network.lead_to(&after);
    after
        .until(|log| {
            log.in_use
                .last()
                .is_some_and(|said| (said.sequence, said.certificate_generation) == (4, 2))
        })
        .await;
    let current = program.credentials.current().unwrap();
    assert_eq!(current.bundle.roots, [new.root()]);
}

/// Leads to one CA, then to another; what was connected to the first is cut.
struct Network {
    address: String,
    to: watch::Sender<String>,
}

impl Network {
    async fn start(ca: &FakeCa) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (to, mut target) = watch::channel(ca.address());
        tokio::spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                let ca = target.borrow_and_update().clone();
                let mut changed = target.clone();
                tokio::spawn(async move {
                    let mut far = TcpStream::connect(ca).await.unwrap();
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                        _ = changed.changed() => {}
                    }
                });
            }
        });
        Self { address, to }
    }

    fn lead_to(&self, ca: &FakeCa) {
        self.to.send_replace(ca.address());
    }
}

#[tokio::test]
async fn stop_ends_the_task_and_leaves_the_credentials() {
    let ca = Arc::new(TestCa::new("a"));
    let fake = FakeCa::start(ca.clone()).await;
    let program = start(&fake, &[&ca], None);
    program.credentials.ready().await;
    fake.until(|log| log.in_use.len() == 2).await;
    program.stop.cancel();
    fake.send_bundle(bundle(2, &[], 1));
    assert!(program.credentials.current().is_some());
}
