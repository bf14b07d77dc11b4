// SPDX-License-Identifier: Apache-2.0
use super::peer;
use crate::consumers::{Connection, Consumers, InUse, Name};
use crate::ledger::{Ledger, Snapshot};
use crate::refusal::with_sources;
use podveil_identity::ProgramIdentity;
use podveil_proto::podveil::node::v1 as wire;
use podveil_proto::podveil::node::v1::trust_bundles_server::TrustBundles;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

/// A caller says at once which of a node's programs it is.
const FIRST_MESSAGE: Duration = Duration::from_secs(10);

/// Pushes each bundle to every program and remembers what each has in use.
#[derive(Clone, Debug)]
pub(crate) struct BundlesService {
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) consumers: Arc<Consumers>,
    pub(crate) stop: CancellationToken,
}

#[tonic::async_trait]
impl TrustBundles for BundlesService {
    type StreamStream = ReceiverStream<Result<wire::TrustBundle, Status>>;

    async fn stream(
        &self,
        request: Request<Streaming<wire::BundleInUse>>,
    ) -> Result<Response<Self::StreamStream>, Status> {
        let program = peer(&request)
            .and_then(|id| ProgramIdentity::try_from(&id).ok())
            .ok_or_else(|| Status::unauthenticated("no_credential: show your SVID"))?;
        // One place: a slow reader gets the newest bundle when it reads, never a queue of old ones.
        let (bundles, answer) = mpsc::channel(1);
        let subscriber = Subscriber {
            service: self.clone(),
            program,
            received: request.into_inner(),
            bundles,
        };
        tokio::spawn(subscriber.run());
        Ok(Response::new(ReceiverStream::new(answer)))
    }
}

/// One stream. Its task ends with the stream, with `stop`, or when the same program opens another.
struct Subscriber {
    service: BundlesService,
    program: ProgramIdentity,
    received: Streaming<wire::BundleInUse>,
    bundles: mpsc::Sender<Result<wire::TrustBundle, Status>>,
}

impl Subscriber {
    async fn run(mut self) {
        let stop = self.service.stop.clone();
        tokio::select! {
            () = stop.cancelled() => {}
            ended = self.serve() => if let Err(status) = ended {
                tracing::debug!(program = %self.program, %status, "a bundle stream ended");
                // Its reader may be gone, or not reading: nobody waits for either.
                let _ = self.bundles.try_send(Err(status));
            },
        }
    }

    async fn serve(&mut self) -> Result<(), Status> {
        let first = tokio::time::timeout(FIRST_MESSAGE, self.received.message())
            .await
            .map_err(|_| Status::deadline_exceeded("no first message"))??;
        let Some(first) = first else { return Ok(()) };
        let name = Name {
            program: self.program.clone(),
            module: first.module().into(),
        };
        let consumer = self
            .service
            .consumers
            .connect(name, Instant::now().into_std())
            .map_err(|full| Status::resource_exhausted(full.to_string()))?;
        self.acknowledged(&consumer, first).await?;

        let mut ledger = self.service.ledger.subscribe();
        let mut consumers = self.service.consumers.subscribe();
        let mut unsent = Some(ledger.borrow_and_update().clone());
        loop {
            tokio::select! {
                message = self.received.message() => match message? {
                    Some(message) => self.acknowledged(&consumer, message).await?,
                    None => return Ok(()),
                },
                place = self.bundles.reserve(), if unsent.is_some() => {
                    let place = place.map_err(|_| Status::cancelled("the reader is gone"))?;
                    if let Some(snapshot) = unsent.take() {
                        place.send(Ok(to_wire(&snapshot)));
                    }
                }
                changed = ledger.changed() => {
                    changed.map_err(|_| Status::unavailable("the CA is stopping"))?;
                    unsent = Some(ledger.borrow_and_update().clone());
                }
                _ = consumers.changed() => if !consumer.is_current() {
                    return Err(taken_over());
                },
            }
        }
    }

    async fn acknowledged(
        &self,
        consumer: &Connection,
        message: wire::BundleInUse,
    ) -> Result<(), Status> {
        let ledger = &self.service.ledger;
        let is_ahead = || {
            let current = ledger.current();
            message.sequence > current.sequence
                || message.certificate_generation > current.certificate_generation
        };
        if is_ahead() && ledger.is_shared().await {
            // It came from another replica, which is a moment ahead of us.
            ledger.refresh(None).await.map_err(|error| {
                tracing::warn!(error = with_sources(&error), "the record cannot be read");
                Status::unavailable("the CA's record cannot be read at the moment")
            })?;
        }
        if is_ahead() {
            return Err(Status::invalid_argument(
                "what is acknowledged has not been sent: the data of another CA?",
            ));
        }
        let in_use = InUse {
            sequence: message.sequence,
            generation: message.certificate_generation,
        };
        if consumer.acknowledge(in_use) {
            Ok(())
        } else {
            Err(taken_over())
        }
    }
}

fn taken_over() -> Status {
    Status::aborted("another stream of this program has taken over")
}

fn to_wire(snapshot: &Snapshot) -> wire::TrustBundle {
    wire::TrustBundle {
        trust_domain: snapshot.trust_domain.to_string(),
        sequence: snapshot.sequence,
        roots: snapshot
            .roots
            .iter()
            .map(|root| root.certificate().to_vec())
            .collect(),
        certificate_generation: snapshot.certificate_generation,
    }
}
