// SPDX-License-Identifier: Apache-2.0
use super::{AddedWorkload, MAX_PACKET_BYTES, PacketError, Request, Session};
use crate::backoff::Backoff;
use podveil_model::Uid;
use podveil_netns::seqpacket::Connection;
use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

const FIRST_RETRY: Duration = Duration::from_millis(10);
/// An agent that is back is found within this. Peers wait up to 15 s, but a connect on this node costs nothing.
const LAST_RETRY: Duration = Duration::from_secs(1);

/// Who starts and ends pods at the agent's word. Each call is answered to the agent before the next packet is read.
pub trait Workloads: Send {
    /// Takes the pod; `Ok` once its listeners are served. The same pod again is success, another network namespace for
    /// the same uid replaces the pod. The error is one sentence for the agent's log.
    fn add(&mut self, workload: AddedWorkload) -> impl Future<Output = Result<(), String>> + Send;

    /// The pod is gone: everything of it ends at once.
    fn delete(&mut self, uid: &Uid) -> impl Future<Output = ()> + Send;

    /// Every pod that is not named is gone.
    fn retain(&mut self, named: &BTreeSet<Uid>) -> impl Future<Output = ()> + Send;
}

/// Where the connection to the agent stands.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Status {
    #[default]
    Disconnected,
    /// Connected; pods are being told.
    Snapshot,
    /// Every pod that the agent has is known.
    Live,
}

/// Why a connection to the agent ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectionError {
    #[error("the agent closed the connection")]
    Closed,
    #[error("cannot connect to the agent")]
    Connect(#[source] io::Error),
    #[error("cannot read from the agent")]
    Receive(#[source] io::Error),
    #[error("the agent broke the protocol")]
    Protocol(#[source] PacketError),
    #[error("cannot write to the agent")]
    Send(#[source] io::Error),
}

/// Speaks to the agent at `path` until `stop`, connecting again with a growing wait. Pods stay while it is away.
/// `take_over`: wait for a proxy that is connected and follow it, instead of being refused.
pub async fn run(
    path: &Path,
    take_over: bool,
    workloads: &mut impl Workloads,
    status: &watch::Sender<Status>,
    stop: &CancellationToken,
) {
    let mut backoff = Backoff::new(FIRST_RETRY, LAST_RETRY);
    // Whoever reads the log is told once that the agent is away.
    let mut told = false;
    let speak = async {
        loop {
            let ended = match Connection::connect(path).map_err(ConnectionError::Connect) {
                Ok(connection) => {
                    told = false;
                    serve(&connection, take_over, workloads, status).await
                }
                Err(error) => error,
            };
            if status.send_replace(Status::Disconnected) == Status::Live {
                backoff.reset();
            }
            if !std::mem::replace(&mut told, true) {
                log_lost(path, &ended);
            }
            tokio::time::sleep(backoff.next_wait()).await;
        }
    };
    let _stopped: Option<()> = stop.run_until_cancelled(speak).await;
}

fn log_lost(path: &Path, error: &(dyn std::error::Error + 'static)) {
    tracing::warn!(path = %path.display(), error, "no connection to the ZDS agent; trying again");
}

/// One connection, from hello to its end.
pub(super) async fn serve(
    connection: &Connection,
    take_over: bool,
    workloads: &mut impl Workloads,
    status: &watch::Sender<Status>,
) -> ConnectionError {
    match converse(connection, take_over, workloads, status).await {
        Err(error) => error,
        Ok(never) => match never {},
    }
}

async fn converse(
    connection: &Connection,
    take_over: bool,
    workloads: &mut impl Workloads,
    status: &watch::Sender<Status>,
) -> Result<std::convert::Infallible, ConnectionError> {
    let mut session = Session::default();
    connection
        .send(&Session::hello(take_over), &[])
        .await
        .map_err(ConnectionError::Send)?;
    status.send_replace(Status::Snapshot);
    loop {
        let packet = connection
            .recv(MAX_PACKET_BYTES)
            .await
            .map_err(ConnectionError::Receive)?
            .ok_or(ConnectionError::Closed)?;
        let (answer, fatal) = match session.receive(packet) {
            Ok(request) => (perform(request, workloads).await, None),
            Err(error) if error.ends_connection() => (Err(error.to_string()), Some(error)),
            Err(error) => {
                tracing::warn!(%error, "refused a packet of the ZDS agent");
                (Err(error.to_string()), None)
            }
        };
        let error = answer.err().unwrap_or_default();
        connection
            .send(&Session::ack(&error), &[])
            .await
            .map_err(ConnectionError::Send)?;
        if let Some(error) = fatal {
            return Err(ConnectionError::Protocol(error));
        }
        if session.is_live() {
            status
                .send_if_modified(|status| std::mem::replace(status, Status::Live) != Status::Live);
        }
    }
}

async fn perform(request: Request, workloads: &mut impl Workloads) -> Result<(), String> {
    match request {
        Request::Add(workload) => return workloads.add(workload).await,
        Request::Keep(uid) => tracing::debug!(%uid, "kept"),
        Request::Delete(uid) => workloads.delete(&uid).await,
        Request::SnapshotSent(named) => workloads.retain(&named).await,
    }
    Ok(())
}
