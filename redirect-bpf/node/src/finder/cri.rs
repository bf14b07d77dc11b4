// SPDX-License-Identifier: Apache-2.0
//! The container runtime's own word on which process holds a pod's sandbox (CRI). It saves the look through `/proc`;
//! whether the process is the pod's is read there all the same.

mod wire;

use hyper_util::rt::TokioIo;
use podveil_model::Uid;
use serde::Deserialize;
use std::path::PathBuf;
use std::time::Duration;
use tokio::net::UnixStream;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Request, Status};
use tonic_prost::ProstCodec;
use wire::{
    ListPodSandboxRequest, ListPodSandboxResponse, PodSandboxFilter, PodSandboxStatusRequest,
    PodSandboxStatusResponse,
};

/// For each question. A runtime that is slower is busy starting what is asked for.
const BOUND: Duration = Duration::from_secs(2);
/// The kubelet's label on each sandbox.
const UID: &str = "io.kubernetes.pod.uid";
const READY: i32 = 0;
const LIST: &str = "/runtime.v1.RuntimeService/ListPodSandbox";
const STATUS: &str = "/runtime.v1.RuntimeService/PodSandboxStatus";

#[derive(Debug, thiserror::Error)]
pub enum CriError {
    #[error("the container runtime does not answer")]
    Call(#[source] Status),
    #[error("the container runtime tells no process of sandbox {sandbox}")]
    NoPid { sandbox: String },
}

/// A client of the runtime's socket, which connects when it is first asked and again whenever it must.
#[derive(Clone, Debug)]
pub struct Cri {
    channel: Channel,
}

/// Of what a runtime says about a sandbox, what is read.
#[derive(Deserialize)]
struct Info {
    pid: Option<i32>,
}

impl Cri {
    /// Must be called on a runtime.
    pub fn new(socket: PathBuf) -> Self {
        let connect = move |_: Uri| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        };
        // The name is only there because HTTP wants one.
        let channel = Endpoint::from_static("http://runtime")
            .connect_timeout(BOUND)
            .timeout(BOUND)
            .connect_with_connector_lazy(tower::service_fn(connect));
        Self { channel }
    }

    /// The first process of the pod's newest sandbox that is ready, numbered as the runtime sees it. `None` if there is no
    /// such sandbox.
    /// # Errors
    /// See [`CriError`].
    pub async fn sandbox(&self, uid: &Uid) -> Result<Option<i32>, CriError> {
        let label_selector = [(UID.to_owned(), uid.to_string())].into();
        let filter = Some(PodSandboxFilter { label_selector });
        let listed: ListPodSandboxResponse =
            self.ask(LIST, ListPodSandboxRequest { filter }).await?;
        let ready = (listed.items.into_iter()).filter(|sandbox| sandbox.state == READY);
        let Some(sandbox) = ready.max_by_key(|sandbox| sandbox.created_at) else {
            return Ok(None);
        };
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: sandbox.id.clone(),
            verbose: true,
        };
        let status: PodSandboxStatusResponse = self.ask(STATUS, request).await?;
        match pid(&status) {
            Some(pid) => Ok(Some(pid)),
            None => Err(CriError::NoPid {
                sandbox: sandbox.id,
            }),
        }
    }

    async fn ask<Q, A>(&self, method: &'static str, question: Q) -> Result<A, CriError>
    where
        Q: prost::Message + 'static,
        A: prost::Message + Default + 'static,
    {
        let mut client = Grpc::new(self.channel.clone());
        let asking = async {
            client
                .ready()
                .await
                .map_err(|error| Status::from_error(error.into()))?;
            let codec = ProstCodec::<Q, A>::default();
            let path = PathAndQuery::from_static(method);
            client.unary(Request::new(question), path, codec).await
        };
        let answer = match tokio::time::timeout(BOUND, asking).await {
            Ok(answer) => answer,
            Err(_) => Err(Status::deadline_exceeded("no answer in time")),
        };
        answer
            .map(|answer| answer.into_inner())
            .map_err(CriError::Call)
    }
}

/// A process's number is positive; 0 is that of a sandbox without one.
fn pid(status: &PodSandboxStatusResponse) -> Option<i32> {
    let info: Info = serde_json::from_str(status.info.get("info")?).ok()?;
    info.pid.filter(|pid| *pid > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_process_that_is_one_is_believed() {
        for (info, found) in [
            (r#"{"pid": 4711, "processStatus": "running"}"#, Some(4711)),
            (r#"{"pid": 0}"#, None),
            (r#"{"pid": -1}"#, None),
            (r#"{"pid": "4711"}"#, None),
            (r#"{"pid": 99999999999}"#, None),
            ("{}", None),
            ("garbage", None),
        ] {
            let status = PodSandboxStatusResponse {
                info: [("info".to_owned(), info.to_owned())].into(),
            };
            assert_eq!(pid(&status), found, "{info}");
        }
        assert_eq!(pid(&PodSandboxStatusResponse::default()), None);
    }

    #[tokio::test]
    async fn a_runtime_that_is_not_there_is_an_error_in_time() {
        let cri = Cri::new("/nowhere/containerd.sock".into());
        let asked = std::time::Instant::now();
        let error = cri.sandbox(&"u".into()).await.unwrap_err();
        assert!(matches!(error, CriError::Call(_)), "{error}");
        assert!(asked.elapsed() < BOUND * 2);
    }
}
