// SPDX-License-Identifier: Apache-2.0
use crate::consumers::Consumers;
use crate::drill::{Drills, Event, RotateError, Stage};
use crate::ledger::{Ledger, LedgerError};
use crate::metrics::unix_seconds;
use crate::refusal::with_sources;
use crate::rotation::{Kind, Presence};
use podveil_ca_issuer::Role;
use podveil_proto::podveil::ca::v1 as wire;
use podveil_proto::podveil::ca::v1::admin_server::Admin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

/// SPEC: `RotationEvent.waiting_for` names at most this many.
const MAX_NAMES: usize = 20;
/// Above what a person would wait for.
const MAX_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

/// For a person at the machine: reachable only through the Unix socket.
#[derive(Clone, Debug)]
pub(crate) struct AdminService {
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) consumers: Arc<Consumers>,
    pub(crate) drills: Drills,
}

#[tonic::async_trait]
impl Admin for AdminService {
    type RotateStream = ReceiverStream<Result<wire::RotationEvent, Status>>;

    async fn rotate(
        &self,
        request: Request<wire::RotateRequest>,
    ) -> Result<Response<Self::RotateStream>, Status> {
        let request = request.into_inner();
        let kind = match request.kind() {
            wire::RotationKind::Leaf => Kind::Leaf,
            wire::RotationKind::Root => Kind::Root,
            wire::RotationKind::Unspecified => {
                return Err(Status::invalid_argument("say what to rotate: leaf or root"));
            }
        };
        let timeout = match request.timeout_seconds {
            0 => None,
            seconds => Some(Duration::from_secs(seconds.into()).min(MAX_TIMEOUT)),
        };
        let events = self.drills.rotate(kind, timeout).await.map_err(to_status)?;
        let (told, answer) = mpsc::channel(1);
        tokio::spawn(forward(events, told));
        Ok(Response::new(ReceiverStream::new(answer)))
    }

    async fn status(
        &self,
        _request: Request<wire::StatusRequest>,
    ) -> Result<Response<wire::StatusResponse>, Status> {
        let snapshot = self.ledger.current();
        let authorities = snapshot
            .authorities()
            .map(|authority| wire::Authority {
                subject: authority.subject().to_owned(),
                serial: authority.serial().to_string(),
                not_after: unix_seconds(authority.not_after()),
                root: authority.role() == Role::Root,
                issuing: authority.role() == Role::Issuing,
            })
            .collect();
        let consumers = self
            .consumers
            .list()
            .into_iter()
            .filter(|(_, _, presence)| *presence == Presence::Connected)
            .map(|(name, in_use, _)| wire::Consumer {
                spiffe_id: name.program.spiffe_id(&snapshot.trust_domain).to_string(),
                module: name.module.as_str().to_owned(),
                bundle_sequence: in_use.sequence,
                certificate_generation: in_use.generation,
            })
            .collect();
        Ok(Response::new(wire::StatusResponse {
            trust_domain: snapshot.trust_domain.to_string(),
            bundle_sequence: snapshot.sequence,
            certificate_generation: snapshot.certificate_generation,
            authorities,
            consumers,
        }))
    }
}

/// Until the rotation's last event, or until nobody reads.
async fn forward(
    mut events: broadcast::Receiver<Event>,
    told: mpsc::Sender<Result<wire::RotationEvent, Status>>,
) {
    loop {
        let event = tokio::select! {
            () = told.closed() => return,
            event = events.recv() => match event {
                Ok(event) => event,
                Err(RecvError::Lagged(_)) => continue,
                Err(RecvError::Closed) => {
                    let stopping = Status::unavailable("the CA is stopping; it goes on when started");
                    let _ = told.send(Err(stopping)).await;
                    return;
                }
            },
        };
        let last = matches!(event.stage, Stage::Done | Stage::Failed);
        if told.send(Ok(to_wire(event))).await.is_err() || last {
            return;
        }
    }
}

fn to_wire(event: Event) -> wire::RotationEvent {
    let step = match event.stage {
        Stage::AddRoot => wire::RotationStep::AddRoot,
        Stage::SwitchIssuer => wire::RotationStep::SwitchIssuer,
        Stage::Reissue => wire::RotationStep::Reissue,
        Stage::Withdraw => wire::RotationStep::Withdraw,
        Stage::Done => wire::RotationStep::Done,
        Stage::Failed => wire::RotationStep::Failed,
    };
    let mut waiting_for = event.progress.waiting_for;
    waiting_for.truncate(MAX_NAMES);
    let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
    wire::RotationEvent {
        step: step.into(),
        message: event.message,
        acknowledged: count(event.progress.acknowledged),
        expected: count(event.progress.expected),
        waiting_for,
    }
}

fn to_status(error: RotateError) -> Status {
    let text = with_sources(&error);
    match error {
        RotateError::Ledger(LedgerError::Rotating { .. }) | RotateError::NotHere { .. } => {
            Status::failed_precondition(text)
        }
        RotateError::Ledger(_) => Status::internal(text),
        RotateError::Stopping => Status::unavailable(text),
    }
}
