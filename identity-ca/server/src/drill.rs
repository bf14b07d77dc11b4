// SPDX-License-Identifier: Apache-2.0
//! The task that runs rotations: it performs what the [machine](crate::rotation) asks for, and tells who listens.

use crate::consumers::Consumers;
use crate::ledger::{Ledger, LedgerError};
use crate::refusal::with_sources;
use crate::rotation::{Action, Kind, Machine, Phase, Progress, Rotation, Step, Target, Timing};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

/// A listener that is slower than this misses the oldest events, never the last one.
const EVENTS: usize = 64;
const COMMANDS: usize = 8;
/// After a CA's very first start, programs are given this long to connect before a rotation counts them.
const SETTLE: Duration = Duration::from_secs(3);
/// An authority is replaced long before its end, so there is time to wait for a node that is down for a while.
const ABSENT_AFTER_UNASKED: Duration = Duration::from_secs(3600);
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
    reply: oneshot::Sender<Result<broadcast::Receiver<Event>, LedgerError>>,
}

/// Why a rotation did not begin.
#[derive(Debug, thiserror::Error)]
pub enum RotateError {
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    #[error("the CA is stopping")]
    Stopping,
}

impl Drills {
    /// Starts the task. A rotation found in the journal goes on at once.
    pub fn start(
        ledger: Arc<Ledger>,
        consumers: Arc<Consumers>,
        timeout: Duration,
        absent_after: Duration,
        stop: CancellationToken,
    ) -> Self {
        let (commands, received) = mpsc::channel(COMMANDS);
        let drill = Drill {
            started: Instant::now(),
            timeout,
            absent_after,
            machine: None,
            told: None,
            events: broadcast::Sender::new(EVENTS),
            ledger,
            consumers,
        };
        tokio::spawn(drill.run(received, stop));
        Self { commands }
    }

    /// Begins a rotation, takes one up that had stopped, or joins the one that runs. Dropping the receiver does not stop
    /// it. The last event is `Done` or `Failed`.
    ///
    /// # Errors
    /// [`LedgerError::Rotating`] while one of the other kind is under way.
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
        Ok(answer.await.map_err(|_| RotateError::Stopping)??)
    }
}

struct Drill {
    started: Instant,
    timeout: Duration,
    absent_after: Duration,
    machine: Option<Machine>,
    /// The last progress told, so that nothing is told twice.
    told: Option<Progress>,
    events: broadcast::Sender<Event>,
    ledger: Arc<Ledger>,
    consumers: Arc<Consumers>,
}

impl Drill {
    async fn run(mut self, mut commands: mpsc::Receiver<Command>, stop: CancellationToken) {
        if let Some(rotation) = self.ledger.current().rotation {
            tracing::info!(?rotation, "going on with the rotation found in the journal");
            // Who is there is not known yet: give everybody as long as one who has just left.
            self.enter(rotation, self.timeout, self.absent_after);
        }
        let mut changed = self.consumers.subscribe();
        let mut renewal = tokio::time::interval(RENEWAL_CHECK);
        renewal.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
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
                () = tokio::time::sleep_until(until.unwrap_or(self.started)), if until.is_some() => {}
                _ = renewal.tick(), if until.is_none() => self.renew_if_due().await,
            }
        }
    }

    fn poll(&self) -> Option<Step> {
        let machine = self.machine.as_ref()?;
        let snapshot = self.ledger.current();
        let target = Target {
            sequence: snapshot.sequence,
            generation: snapshot.certificate_generation,
        };
        Some(machine.poll(
            target,
            &self.consumers.acknowledged(),
            Instant::now().into_std(),
        ))
    }

    fn enter(&mut self, rotation: Rotation, timeout: Duration, absent_after: Duration) {
        // After a restart it is not known who was there before: everybody has as long to come as one who has just left.
        // Of a fresh CA nobody was.
        let settle = if self.ledger.is_fresh() {
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
        let begun = self.begin(command.kind).await;
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

    async fn begin(&self, kind: Kind) -> Result<Rotation, LedgerError> {
        let ledger = self.ledger.clone();
        tokio::task::spawn_blocking(move || ledger.begin(kind))
            .await
            .expect("the ledger does not panic")
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
        match self.begin(kind).await {
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
        let ledger = self.ledger.clone();
        let performed =
            tokio::task::spawn_blocking(move || ledger.perform(action, SystemTime::now()))
                .await
                .expect("the ledger does not panic");
        match performed {
            Ok(rotation) => {
                if let Some(machine) = &mut self.machine {
                    machine.on_performed(rotation, Instant::now().into_std());
                }
                self.told = None;
                self.tell_performed(action);
            }
            Err(error) => self.fail(&error),
        }
    }

    async fn finish(&mut self, progress: Progress) {
        let ledger = self.ledger.clone();
        let finished = tokio::task::spawn_blocking(move || ledger.finish())
            .await
            .expect("the ledger does not panic");
        match finished {
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
            Err(error) => self.fail(&error),
        }
    }

    fn fail(&mut self, error: &LedgerError) {
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
