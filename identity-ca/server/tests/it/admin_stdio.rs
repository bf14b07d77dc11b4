// SPDX-License-Identifier: Apache-2.0
use crate::harness::{DEADLINE, Place};
use podveil_proto::podveil::ca::v1::StatusRequest;
use podveil_proto::podveil::ca::v1::admin_client::AdminClient;
use std::process::Stdio;
use std::sync::Mutex;
use tokio::process::Command;
use tonic::transport::{Endpoint, Uri};

#[tokio::test]
async fn the_admin_service_is_reached_through_standard_input_and_output() {
    let place = Place::new();
    let ca = place.start().await;
    let mut bridge = Command::new(env!("CARGO_BIN_EXE_podveil-ca"))
        .arg("admin-stdio")
        .arg("--socket")
        .arg(place.path("run/admin.sock"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let ends = tokio::io::join(bridge.stdout.take().unwrap(), bridge.stdin.take().unwrap());
    let ends = Mutex::new(Some(hyper_util::rt::TokioIo::new(ends)));
    let channel = Endpoint::from_static("http://admin")
        .connect_with_connector(tower::service_fn(move |_: Uri| {
            let ends = ends.lock().unwrap().take();
            async move { ends.ok_or_else(|| std::io::Error::other("there is one connection")) }
        }))
        .await
        .unwrap();
    let mut admin = AdminClient::new(channel);
    let status = admin.status(StatusRequest {}).await.unwrap().into_inner();
    assert_eq!(status.bundle_sequence, 1);

    drop(admin);
    let ended = tokio::time::timeout(DEADLINE, bridge.wait()).await;
    assert!(ended.unwrap().unwrap().success(), "it ends with its caller");
    ca.stop().await;
}

#[tokio::test]
async fn without_a_ca_the_bridge_says_so() {
    let bridge = Command::new(env!("CARGO_BIN_EXE_podveil-ca"))
        .args(["admin-stdio", "--socket", "/nonexistent/admin.sock"])
        .stdin(Stdio::null())
        .output()
        .await
        .unwrap();
    assert!(!bridge.status.success());
    let said = String::from_utf8_lossy(&bridge.stderr);
    assert!(said.contains("/nonexistent/admin.sock"), "{said}");
}
