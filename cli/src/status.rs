// SPDX-License-Identifier: Apache-2.0
use crate::ca_admin;
use podveil_proto::podveil::ca::v1::{StatusRequest, StatusResponse};
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub struct Arguments {
    /// The CA's admin socket.
    #[arg(long, default_value = ca_admin::DEFAULT_SOCKET)]
    socket: PathBuf,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let status = ca_admin::runtime()?.block_on(status(&arguments.socket))?;
    println!(
        "trust domain {}, bundle {}, certificate generation {}",
        status.trust_domain, status.bundle_sequence, status.certificate_generation
    );
    for authority in &status.authorities {
        let kind = if authority.root {
            "root"
        } else {
            "intermediate"
        };
        let issuing = if authority.issuing { ", issuing" } else { "" };
        println!(
            "{kind:<12} {} serial {} until {}{issuing}",
            authority.subject,
            authority.serial,
            utc(authority.not_after)
        );
    }
    for consumer in &status.consumers {
        println!(
            "{} ({}): bundle {}, certificate generation {}",
            consumer.spiffe_id,
            consumer.module,
            consumer.bundle_sequence,
            consumer.certificate_generation
        );
    }
    Ok(())
}

/// # Errors
/// If the CA cannot be reached.
pub async fn status(socket: &Path) -> anyhow::Result<StatusResponse> {
    Ok(ca_admin::connect(socket)
        .await?
        .status(StatusRequest {})
        .await?
        .into_inner())
}

/// Unix seconds as a date for a person (RFC 3339, UTC).
fn utc(seconds: i64) -> String {
    match time::OffsetDateTime::from_unix_timestamp(seconds) {
        Ok(when) => format!(
            "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}Z",
            when.year(),
            u8::from(when.month()),
            when.day(),
            when.hour(),
            when.minute(),
            when.second()
        ),
        Err(_) => format!("{seconds} s after 1970"),
    }
}
