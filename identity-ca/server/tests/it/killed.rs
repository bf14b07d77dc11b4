// SPDX-License-Identifier: Apache-2.0
use crate::harness::{DEADLINE, Place, authorities};
use podveil_proto::podveil::ca::v1::{RotateRequest, RotationKind, RotationStep};
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// The binary, killed when dropped.
struct Process(Child);

impl Process {
    async fn start(place: &Place) -> Self {
        let config = place.config("127.0.0.1:0".parse().unwrap());
        let path = place.path("ca.yaml");
        // JSON is YAML.
        std::fs::write(&path, serde_json::to_string(&config).unwrap()).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_podveil-ca"))
            .arg("--config")
            .arg(path)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let process = Self(child);
        wait_for_socket(&place.path("run/admin.sock")).await;
        process
    }

    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn wait_for_socket(socket: &Path) {
    let poll = async {
        while tokio::net::UnixStream::connect(socket).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(DEADLINE, poll).await.unwrap();
}

#[tokio::test]
async fn after_kill_9_in_a_rotation_it_goes_on_where_it_was_written_down() {
    let place = Place::new();
    let process = Process::start(&place).await;
    let first = place.status().await;
    let mut admin = place.admin().await;
    let request = RotateRequest {
        kind: RotationKind::Root.into(),
        timeout_seconds: 0,
    };
    let mut events = admin.rotate(request).await.unwrap().into_inner();
    // A new rotation waits a while for programs to connect, so the kill falls into its first phase.
    while let Some(event) = events.message().await.unwrap() {
        if event.step() == RotationStep::AddRoot {
            break;
        }
    }
    process.kill();

    let journal = std::fs::read_to_string(place.path("data/journal.json")).unwrap();
    assert!(journal.contains("\"root_added\""), "{journal}");
    let _process = Process::start(&place).await;
    let done = place
        .status_when("the rotation is over", |status| {
            status.certificate_generation == 2 && status.authorities.len() == 2
        })
        .await;
    assert_eq!(first.bundle_sequence, 1);
    assert_eq!(done.bundle_sequence, 4);
    assert!(
        authorities(&done)
            .iter()
            .all(|serial| !authorities(&first).contains(serial))
    );
}

#[tokio::test]
async fn after_kill_9_root_and_sequence_are_kept() {
    let place = Place::new();
    let process = Process::start(&place).await;
    let first = place.status().await;
    process.kill();
    let _process = Process::start(&place).await;
    assert_eq!(place.status().await, first);
}
