// SPDX-License-Identifier: Apache-2.0
//! The task that runs rotations: it performs what the [machine](crate::rotation) asks for, and tells who listens.

use crate::consumers::Consumers;
use crate::ledger::{Ledger, LedgerError};
use crate::peers::Peers;
use crate::refusal::with_sources;
use crate::rotation::{Action, Kind, Machine, Phase, Progress, Rotation, Step, Target, Timing};
use crate::shared;
use podveil_kube::Standing;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

/// A listener that is slower than this misses the oldest events, never the last one.
const EVENTS: usize = 64;
const COMMANDS: usize = 8;
/// After a CA's very first start, programs are given this long to connect before a rotation counts them.
const SETTLE: Duration = Duration::from_secs(3);
/// An authority is replaced long before its end, so there is time to wait for a node that is down for a while.
const ABSENT_AFTER_UNASKED: Duration = Duration::from_secs(3600);
/// While the record cannot be written because the API server is away.
const RETRY: Duration = Duration::from_secs(1);
/// How often the ends of the authorities are looked at.
const RENEWAL_CHECK: Duration = Duration::from_secs(600);

/// One line of a rotation's story.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Event {
    pub stage: Stage,
    pub message: String,
    pub progress: Progress,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Stage {
    AddRoot,
    SwitchIssuer,
    Reissue,
    Withdraw,
    Done,
    /// Nothing is undone; the next rotation of this kind goes on from where it stands.
    Failed,
}

/// Asks the task to rotate.
#[derive(Clone, Debug)]
pub struct Drills {
    commands: mpsc::Sender<Command>,
}

#[derive(Debug)]
struct Command {
    kind: Kind,
    timeout: Option<Duration>,
    reply: oneshot::Sender<Result<broadcast::Receiver<Event>, RotateError>>,
}

/// Why a rotation did not begin.
#[derive(Debug, thiserror::Error)]
pub enum RotateError {
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    #[error("another replica acts: {}", holder.as_deref().unwrap_or("not known yet which"))]
    NotHere { holder: Option<String> },
    #[error("the CA is stopping")]
    Stopping,
}

impl Drills {
    /// Starts the task. A rotation found in the journal goes on as soon as this replica acts.
    pub fn start(
        ledger: Arc<Ledger>,
        consumers: Arc<Consumers>,
        replicas: Replicas,
        timeout: Duration,
        absent_after: Duration,
        stop: CancellationToken,
    ) -> Self {
        let (commands, received) = mpsc::channel(COMMANDS);
        let drill = Drill {
            started: Instant::now(),
            fresh: ledger.is_fresh(),
            timeout,
            absent_after,
            machine: None,
            told: None,
            events: broadcast::Sender::new(EVENTS),
            ledger,
            consumers,
            replicas,
        };
        tokio::spawn(drill.run(received, stop));
        Self { commands }
    }

    /// Begins a rotation, takes one up that had stopped, or joins the one that runs. Dropping the receiver does not stop
    /// it. The last event is `Done` or `Failed`.
    ///
    /// # Errors
    /// [`LedgerError::Rotating`] while one of the other kind is under way, [`RotateError::NotHere`] where another replica
    /// acts.
    pub async fn rotate(
        &self,
        kind: Kind,
        timeout: Option<Duration>,
    ) -> Result<broadcast::Receiver<Event>, RotateError> {
        let (reply, answer) = oneshot::channel();
        let command = Command {
            kind,
            timeout,
            reply,
        };
        self.commands
            .send(command)
            .await
            .map_err(|_| RotateError::Stopping)?;
        answer.await.map_err(|_| RotateError::Stopping)?
    }
}

/// Whether this replica acts, and what the consumers of the others have in use.
#[derive(Debug)]
pub struct Replicas {
    pub standing: watch::Receiver<Standing>,
    /// `None` for a CA that is alone.
    pub peers: Option<Peers>,
}

impl Replicas {
    /// For a CA that is alone.
    pub fn none() -> Self {
        Self {
            standing: watch::channel(Standing::Here).1,
            peers: None,
        }
    }

    async fn changed(&mut self) {
        let peers = async {
            match &mut self.peers {
                Some(peers) => peers.changed().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = shared::changed(&mut self.standing) => {}
            () = peers => {}
        }
    }
}

struct Drill {
    /// When this replica began to act.
    started: Instant,
    /// Nobody can have had anything from this CA before.
    fresh: bool,
    timeout: Duration,
    absent_after: Duration,
    machine: Option<Machine>,
    /// The last progress told, so that nothing is told twice.
    told: Option<Progress>,
    events: broadcast::Sender<Event>,
    ledger: Arc<Ledger>,
    consumers: Arc<Consumers>,
    replicas: Replicas,
}

impl Drill {
    async fn run(mut self, mut commands: mpsc::Receiver<Command>, stop: CancellationToken) {
        let mut here = false;
        let mut changed = self.consumers.subscribe();
        let mut renewal = tokio::time::interval(RENEWAL_CHECK);
        renewal.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let acts = self.replicas.standing.borrow_and_update().is_here();
            if acts != here {
                here = acts;
                self.turn(here);
            }
            changed.mark_unchanged();
            let until = match self.poll() {
                Some(Step::Perform(action)) => {
                    self.perform(action).await;
                    continue;
                }
                Some(Step::Wait { progress, until }) => {
                    self.tell_progress(progress);
                    Some(Instant::from_std(until))
                }
                Some(Step::TimedOut(progress)) => {
                    self.machine = None;
                    let message = "connected programs have not acknowledged in time; nothing is \
                                   undone, rotate again to go on";
                    self.tell(Stage::Failed, message.into(), progress);
                    continue;
                }
                Some(Step::Done(progress)) => {
                    self.finish(progress).await;
                    continue;
                }
                None => None,
            };
            tokio::select! {
                () = stop.cancelled() => return,
                command = commands.recv() => match command {
                    Some(command) => self.command(command).await,
                    None => return,
                },
                // The sender is in `self`.
                _ = changed.changed(), if until.is_some() => {}
                () = self.replicas.changed() => {}
                () = tokio::time::sleep_until(until.unwrap_or(self.started)), if until.is_some() => {}
                _ = renewal.tick(), if until.is_none() && here => self.renew_if_due().await,
            }
        }
    }

    /// This replica begins to act, or another one does now.
    fn turn(&mut self, here: bool) {
        if !here {
            self.fresh = false;
            if self.machine.take().is_some() {
                let message = "another replica acts now, and goes on with it";
                self.tell(Stage::Failed, message.into(), Progress::default());
            }
            return;
        }
        self.started = Instant::now();
        if let Some(rotation) = self.ledger.current().rotation {
            tracing::info!(?rotation, "going on with the rotation found in the journal");
            // Who is there is not known yet: give everybody as long as one who has just left.
            self.enter(rotation, self.timeout, self.absent_after);
        }
    }

    fn poll(&self) -> Option<Step> {
        let machine = self.machine.as_ref()?;
        let snapshot = self.ledger.current();
        let target = Target {
            sequence: snapshot.sequence,
            generation: snapshot.certificate_generation,
        };
        let now = Instant::now().into_std();
        let own = self.consumers.acknowledged();
        let all = match &self.replicas.peers {
            Some(peers) => peers.acknowledged(own, now),
            None => own,
        };
        Some(machine.poll(target, &all, now))
    }

    fn enter(&mut self, rotation: Rotation, timeout: Duration, absent_after: Duration) {
        // After a restart it is not known who was there before: everybody has as long to come as one who has just left.
        // Of a fresh CA nobody was.
        let settle = if self.fresh {
            SETTLE.min(absent_after)
        } else {
            absent_after
        };
        let timing = Timing {
            timeout,
            absent_after,
            settled: (self.started + settle).into_std(),
        };
        self.machine = Some(Machine::new(rotation, timing, Instant::now().into_std()));
        self.told = None;
    }

    async fn command(&mut self, command: Command) {
        let listener = self.events.subscribe();
        let begun = match &*self.replicas.standing.borrow() {
            Standing::Here => Ok(()),
            Standing::Other { holder } => Err(RotateError::NotHere {
                holder: holder.clone(),
            }),
            Standing::Unknown => Err(RotateError::NotHere { holder: None }),
        };
        let begun = match begun {
            Ok(()) => self
                .ledger
                .begin(command.kind)
                .await
                .map_err(RotateError::from),
            Err(error) => Err(error),
        };
        let answer = begun.map(|rotation| {
            if self.machine.is_none() {
                let timeout = command.timeout.unwrap_or(self.timeout);
                self.enter(rotation, timeout, self.absent_after);
            }
            // Who joins is told how it stands.
            self.told = None;
            listener
        });
        // Who asked may be gone; the rotation goes on.
        let _ = command.reply.send(answer);
    }

    /// An authority with a third of its life left is replaced without being asked for.
    async fn renew_if_due(&mut self) {
        let snapshot = self.ledger.current();
        let now = SystemTime::now();
        let due = |authority: &podveil_ca_issuer::Authority| {
            let life = authority
                .not_after()
                .duration_since(authority.not_before())
                .unwrap_or_default();
            authority
                .not_after()
                .duration_since(now)
                .unwrap_or_default()
                < life / 3
        };
        let wanted = if due(snapshot.newest_root()) {
            Kind::Root
        } else if due(&snapshot.issuing) {
            Kind::Leaf
        } else {
            return;
        };
        // One that has failed goes on first: left standing, it would keep the authority from ever being replaced.
        let kind = snapshot.rotation.map_or(wanted, |failed| failed.kind);
        tracing::info!(?kind, "an authority nears its end: rotating");
        match self.ledger.begin(kind).await {
            Ok(rotation) => {
                let absent_after = self.absent_after.max(ABSENT_AFTER_UNASKED);
                self.enter(rotation, self.timeout, absent_after);
            }
            Err(error) => tracing::error!(
                error = &error as &dyn std::error::Error,
                "could not begin a rotation"
            ),
        }
    }

    async fn perform(&mut self, action: Action) {
        let Some(machine) = &mut self.machine else {
            return;
        };
        let performed = self
            .ledger
            .perform(machine.rotation(), action, SystemTime::now())
            .await;
        match performed {
            Ok(rotation) => {
                machine.on_performed(rotation, Instant::now().into_std());
                self.told = None;
                self.tell_performed(action);
            }
            Err(error) => self.failed(&error).await,
        }
    }

    async fn finish(&mut self, progress: Progress) {
        match self.ledger.finish().await {
            Ok(()) => {
                self.machine = None;
                let snapshot = self.ledger.current();
                let message = format!(
                    "certificates are of generation {}, issued by {}",
                    snapshot.certificate_generation,
                    snapshot.issuing.subject()
                );
                self.tell(Stage::Done, message, progress);
            }
            Err(error) => self.failed(&error).await,
        }
    }

    async fn failed(&mut self, error: &LedgerError) {
        // It comes back, or another replica takes over.
        if error.is_passing() {
            tracing::warn!(error = with_sources(error), "the rotation waits");
            tokio::time::sleep(RETRY).await;
            return;
        }
        self.machine = None;
        self.tell(Stage::Failed, with_sources(error), Progress::default());
    }

    fn tell_performed(&self, action: Action) {
        let snapshot = self.ledger.current();
        let (stage, message) = match action {
            Action::AddRoot => (
                Stage::AddRoot,
                format!("added {}", snapshot.newest_root().subject()),
            ),
            Action::SwitchIssuer => (
                Stage::SwitchIssuer,
                format!("{} issues now", snapshot.issuing.subject()),
            ),
            Action::WithdrawRoots => (
                Stage::Withdraw,
                format!("only {} is left", snapshot.newest_root().subject()),
            ),
        };
        self.tell(stage, message, Progress::default());
    }

    fn tell_progress(&mut self, progress: Progress) {
        let Some(machine) = &self.machine else { return };
        if self.told.as_ref() == Some(&progress) {
            return;
        }
        let (stage, what) = match machine.rotation().phase {
            Phase::Begun | Phase::RootAdded => (Stage::AddRoot, "trust the new root"),
            Phase::IssuerSwitched => (Stage::Reissue, "have replaced their certificates"),
            Phase::RootWithdrawn => (Stage::Withdraw, "no longer trust the old root"),
        };
        let mut message = format!(
            "{} of {} programs {what}",
            progress.acknowledged, progress.expected
        );
        if !progress.skipped.is_empty() {
            message = format!("{message}; away: {}", progress.skipped.join(", "));
        }
        self.told = Some(progress.clone());
        self.tell(stage, message, progress);
    }

    fn tell(&self, stage: Stage, message: String, progress: Progress) {
        tracing::info!(
            ?stage,
            message,
            acknowledged = progress.acknowledged,
            expected = progress.expected,
            "rotation"
        );
        // Nobody may be listening.
        let _ = self.events.send(Event {
            stage,
            message,
            progress,
        });
    }
}
