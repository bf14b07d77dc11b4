// SPDX-License-Identifier: Apache-2.0
//! One HTTP request through the API's port-forward. The kubelet dials the pod's loopback; for a host-network pod that is
//! its node's.

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client};
use std::time::Duration;
use tokio::time::timeout;

/// The whole of it. The largest answers, a node's full state, are some 10 MB.
const TIMEOUT: Duration = Duration::from_secs(30);
/// A page larger than this is none of ours.
const MAX_BODY_BYTES: usize = 256 << 20;

pub(super) async fn get(
    client: &Client,
    namespace: &str,
    pod: &str,
    port: u16,
    path: &str,
) -> anyhow::Result<Bytes> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let asked = async {
        let mut forwarder = pods.portforward(pod, &[port]).await?;
        let stream = forwarder.take_stream(port).context("no stream")?;
        let refused = forwarder.take_error(port).context("no error channel")?;
        let answer = request(stream, path);
        tokio::pin!(answer, refused);
        let answer = tokio::select! {
            biased;
            answer = &mut answer => answer,
            // The kubelet's word about why is better than the end of the stream that follows it.
            Some(message) = &mut refused => bail!("{}", message.trim()),
        };
        match answer {
            Ok(body) => Ok(body),
            Err(error) => match timeout(Duration::from_secs(1), refused).await {
                Ok(Some(message)) => bail!("{}", message.trim()),
                _ => Err(error),
            },
        }
    };
    timeout(TIMEOUT, asked)
        .await
        .with_context(|| format!("no full answer within {TIMEOUT:?}"))?
}

async fn request(
    stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    path: &str,
) -> anyhow::Result<Bytes> {
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let driver = tokio::spawn(connection);
    let request = Request::get(path)
        .header(header::HOST, "localhost")
        .header(header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_BODY_BYTES)
        .collect()
        .await
        .map_err(anyhow::Error::from_boxed)?
        .to_bytes();
    driver.abort();
    ensure!(
        status == StatusCode::OK,
        "{status}: {}",
        String::from_utf8_lossy(&body).trim()
    );
    Ok(body)
}
