// SPDX-License-Identifier: Apache-2.0
//! The CA's admin service through the API's exec: a small program in the CA's container carries HTTP/2 between the
//! exec's streams and the Unix socket beside it, so the permission to exec there is the permission to administer.

use super::ProgramPod;
use crate::failure::OrCure;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{AttachParams, AttachedProcess};
use kube::{Api, Client};
use podveil_proto::podveil::ca::v1::admin_client::AdminClient;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, Join, ReadBuf, ReadHalf, SimplexStream, WriteHalf};
use tonic::transport::{Channel, Endpoint, Uri};

/// Carries stdin and stdout to the CA's admin socket.
const BRIDGE: [&str; 2] = ["podveil-ca", "admin-stdio"];
/// Of each direction, in memory.
const BUFFER_BYTES: usize = 64 << 10;

/// The CA's admin service, and where it was found.
#[derive(Debug)]
pub struct CaAdmin {
    pub client: AdminClient<Channel>,
    /// For sentences: the replica that answers, or the socket.
    pub found: String,
    /// `None` where it was not found as a pod.
    pub replica: Option<String>,
}

pub(super) async fn ca_admin(
    client: &Client,
    namespace: &str,
    pod: &ProgramPod,
) -> anyhow::Result<CaAdmin> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let mut params = AttachParams::default()
        .stdin(true)
        .stdout(true)
        .stderr(false)
        .max_stdin_buf_size(BUFFER_BYTES)
        .max_stdout_buf_size(BUFFER_BYTES);
    if let Some(container) = &pod.container {
        params = params.container(container);
    }
    let what = || format!("running `{}` in {namespace}/{}", BRIDGE.join(" "), pod.name);
    let cure = format!(
        "`kubectl auth can-i create pods --subresource=exec -n {namespace}` says whether you may; on the CA's own \
         machine `--socket` needs no API"
    );
    let process = pods
        .exec(&pod.name, BRIDGE, &params)
        .await
        .or_cure(what(), cure.clone())?;
    let mut bridge = Some(Bridge::new(process));
    // The address is never looked at: the connector gives the one stream that there is.
    let channel = Endpoint::from_static("http://ca.invalid")
        .connect_with_connector(tower::service_fn(move |_: Uri| {
            let bridge = bridge.take();
            std::future::ready(match bridge {
                Some(bridge) => Ok(TokioIo::new(bridge)),
                None => Err(io::Error::from(io::ErrorKind::NotConnected)),
            })
        }))
        .await
        .or_cure(what(), cure)?;
    Ok(CaAdmin {
        client: AdminClient::new(channel),
        found: pod.name.clone(),
        replica: Some(pod.name.clone()),
    })
}

/// A process at the other end of the API, as one stream.
struct Bridge {
    stream: Join<ReadHalf<SimplexStream>, WriteHalf<SimplexStream>>,
    /// Ends when it is dropped.
    _process: AttachedProcess,
}

impl Bridge {
    fn new(mut process: AttachedProcess) -> Self {
        let stdout = process.stdout().expect("asked for");
        let stdin = process.stdin().expect("asked for");
        Self {
            stream: tokio::io::join(stdout, stdin),
            _process: process,
        }
    }
}

impl AsyncRead for Bridge {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Bridge {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
