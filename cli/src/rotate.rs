// SPDX-License-Identifier: Apache-2.0
//! `podveilctl rotate`: asks the CA for a rotation and shows each step until its end.

use crate::ca::{self, Where};
use crate::cluster::CaAdmin;
use crate::failure::{Failure, OrCure, Outcome};
use crate::output::{Format, Output, Progress};
use clap::ValueEnum;
use podveil_proto::podveil::ca::v1::{RotateRequest, RotationEvent, RotationKind, RotationStep};
use serde::Serialize;
use std::path::Path;

#[derive(clap::Args)]
pub struct Arguments {
    /// What is replaced.
    what: What,
    /// Seconds to wait for a program that is connected and does not acknowledge; 0: the CA's default.
    #[arg(long, default_value_t = 0, value_name = "SECONDS")]
    timeout: u32,
    #[command(flatten)]
    ca: Where,
    #[command(flatten)]
    output: Output,
}

#[derive(Clone, Copy, ValueEnum)]
enum What {
    /// A new issuing intermediate and new certificates.
    Leaf,
    /// A new root as well, the old one withdrawn at the end.
    Root,
}

/// A rotation, from where it was joined to its end.
#[derive(Clone, Debug, Default, Serialize)]
struct Rotation {
    done: bool,
    steps: Vec<Event>,
}

/// One step of a rotation, as it is shown.
#[derive(Clone, Debug, Serialize)]
pub struct Event {
    step: &'static str,
    message: String,
    pub acknowledged: u32,
    pub expected: u32,
    /// At most 20 of them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    waiting_for: Vec<String>,
}

pub async fn run(arguments: &Arguments) -> anyhow::Result<Outcome> {
    let kind = match arguments.what {
        What::Leaf => RotationKind::Leaf,
        What::Root => RotationKind::Root,
    };
    let mut ca = arguments.ca.connect().await?;
    let output = arguments.output;
    let mut rotation = Rotation::default();
    let mut progress = Progress::new();
    let followed = follow(&mut ca, kind, arguments.timeout, |event| {
        rotation.steps.push(event.clone());
        match output.format {
            Format::Human => {
                // A reader that is gone does not end a rotation.
                let _gone = output.print(event, describe);
            }
            Format::Json => progress.say(&describe(event)),
        }
    })
    .await;
    drop(progress);
    rotation.done = followed.is_ok();
    if output.format == Format::Json {
        output.print(&rotation, |_| String::new())?;
    }
    followed.map(|()| Outcome::Good)
}

/// Runs one rotation to its end by the CA's own socket.
///
/// # Errors
/// If the CA cannot be reached or the rotation fails, with the programs that did not acknowledge.
pub async fn rotate(
    socket: &Path,
    kind: RotationKind,
    timeout_seconds: u32,
    progress: impl FnMut(&Event),
) -> anyhow::Result<()> {
    let mut ca = ca::connect(socket).await?;
    follow(&mut ca, kind, timeout_seconds, progress).await
}

async fn follow(
    ca: &mut CaAdmin,
    kind: RotationKind,
    timeout_seconds: u32,
    mut progress: impl FnMut(&Event),
) -> anyhow::Result<()> {
    let request = RotateRequest {
        kind: kind.into(),
        timeout_seconds,
    };
    let mut events = ca
        .client
        .rotate(request)
        .await
        .map_err(|status| anyhow::anyhow!("{}", status.message()))
        .or_cure(
            format!("asking the CA ({}) for a rotation", ca.found),
            "`podveilctl status` shows where the CA stands; a rotation under way ends first",
        )?
        .into_inner();
    let left = "the rotation goes on in the CA; `podveilctl status` shows where it stands, and `podveilctl rotate` again \
                follows it to its end";
    loop {
        let event = events
            .message()
            .await
            .map_err(|status| anyhow::anyhow!("{}", status.message()))
            .or_cure("the connection to the CA was lost", left)?
            .ok_or_else(|| {
                Failure::new("the CA ended the rotation's progress before its end", left)
            })?;
        progress(&Event::from(&event));
        match event.step() {
            RotationStep::Done => return Ok(()),
            RotationStep::Failed => {
                let cure = "bring back or remove the programs it waits for, then rotate again: it goes on from there";
                return Err(
                    Failure::new(format!("the rotation failed: {}", event.message), cure).into(),
                );
            }
            _ => {}
        }
    }
}

impl From<&RotationEvent> for Event {
    fn from(event: &RotationEvent) -> Self {
        Self {
            step: match event.step() {
                RotationStep::AddRoot => "add_root",
                RotationStep::SwitchIssuer => "switch_issuer",
                RotationStep::Reissue => "reissue",
                RotationStep::Withdraw => "withdraw",
                RotationStep::Done => "done",
                RotationStep::Failed => "failed",
                RotationStep::Unspecified => "unknown",
            },
            message: event.message.clone(),
            acknowledged: event.acknowledged,
            expected: event.expected,
            waiting_for: event.waiting_for.clone(),
        }
    }
}

fn describe(event: &Event) -> String {
    let step = match event.step {
        "add_root" => "add the new root",
        "switch_issuer" => "switch issuing",
        "reissue" => "issue again",
        "withdraw" => "withdraw the old root",
        other => other,
    };
    let mut line = format!(
        "{step:<22} {:>3}/{:<3} {}",
        event.acknowledged, event.expected, event.message
    );
    if !event.waiting_for.is_empty() {
        line.push_str(&format!(" (waiting for {})", event.waiting_for.join(", ")));
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_says_how_many_have_acknowledged_and_who_has_not() {
        let event = Event::from(&RotationEvent {
            step: RotationStep::AddRoot.into(),
            message: "bundle 2 sent".into(),
            acknowledged: 3,
            expected: 4,
            waiting_for: vec!["node/n1 (proxy)".into()],
        });
        assert_eq!(
            describe(&event),
            "add the new root         3/4   bundle 2 sent (waiting for node/n1 (proxy))"
        );
        assert_eq!(
            serde_json::to_string(&event).unwrap(),
            r#"{"step":"add_root","message":"bundle 2 sent","acknowledged":3,"expected":4,"waiting_for":["node/n1 (proxy)"]}"#
        );
    }
}
