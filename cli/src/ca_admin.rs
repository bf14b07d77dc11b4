// SPDX-License-Identifier: Apache-2.0
//! The CA's own Unix socket: its folder's permissions are the authorisation.

use anyhow::Context;
use hyper_util::rt::TokioIo;
use podveil_proto::podveil::ca::v1::admin_client::AdminClient;
use std::path::{Path, PathBuf};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

/// Where the chart and the CA's default put it.
pub const DEFAULT_SOCKET: &str = "/var/run/podveil-ca/admin.sock";

/// # Errors
/// If nobody listens there, or we may not.
pub async fn connect(socket: &Path) -> anyhow::Result<AdminClient<Channel>> {
    let path: PathBuf = socket.to_owned();
    // The address is never looked at: the connector below goes to the socket.
    let channel = Endpoint::from_static("http://ca.invalid")
        .connect_with_connector(tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        }))
        .await
        .with_context(|| format!("connecting to the CA's admin socket {}", socket.display()))?;
    Ok(AdminClient::new(channel))
}

/// A runtime for one command.
///
/// # Errors
/// If the system gives no event queue.
pub fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the runtime")
}
