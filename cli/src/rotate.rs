// SPDX-License-Identifier: Apache-2.0
use crate::ca_admin;
use anyhow::bail;
use clap::ValueEnum;
use podveil_proto::podveil::ca::v1::{RotateRequest, RotationEvent, RotationKind, RotationStep};
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub struct Arguments {
    /// `leaf`: a new issuing intermediate and new certificates. `root`: a new root as well, the old one withdrawn.
    what: What,
    /// The CA's admin socket.
    #[arg(long, default_value = ca_admin::DEFAULT_SOCKET)]
    socket: PathBuf,
    /// Seconds to wait for a program that is connected and does not acknowledge; 0: the CA's default.
    #[arg(long, default_value_t = 0)]
    timeout: u32,
}

#[derive(Clone, Copy, ValueEnum)]
enum What {
    Leaf,
    Root,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let kind = match arguments.what {
        What::Leaf => RotationKind::Leaf,
        What::Root => RotationKind::Root,
    };
    ca_admin::runtime()?.block_on(rotate(
        &arguments.socket,
        kind,
        arguments.timeout,
        |event| {
            println!("{}", describe(event));
        },
    ))
}

/// Runs one rotation to its end.
///
/// # Errors
/// If the CA cannot be reached or the rotation fails, with the programs that did not acknowledge.
pub async fn rotate(
    socket: &Path,
    kind: RotationKind,
    timeout_seconds: u32,
    mut progress: impl FnMut(&RotationEvent),
) -> anyhow::Result<()> {
    let mut ca = ca_admin::connect(socket).await?;
    let mut events = ca
        .rotate(RotateRequest {
            kind: kind.into(),
            timeout_seconds,
        })
        .await?
        .into_inner();
    while let Some(event) = events.message().await? {
        progress(&event);
        match event.step() {
            RotationStep::Done => return Ok(()),
            RotationStep::Failed => bail!("the rotation failed: {}", event.message),
            _ => {}
        }
    }
    bail!(
        "the CA ended the rotation's progress before its end; `podveilctl status` shows where it stands"
    )
}

fn describe(event: &RotationEvent) -> String {
    let step = match event.step() {
        RotationStep::AddRoot => "add the new root",
        RotationStep::SwitchIssuer => "switch issuing",
        RotationStep::Reissue => "issue again",
        RotationStep::Withdraw => "withdraw the old root",
        RotationStep::Done => "done",
        RotationStep::Failed => "failed",
        RotationStep::Unspecified => "?",
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
