// SPDX-License-Identifier: Apache-2.0
use tokio::signal::unix::{SignalKind, signal};

/// Resolves on SIGTERM or SIGINT, with its name.
///
/// # Panics
/// If the runtime has no signal driver: a mistake in the program that calls.
pub async fn shutdown_signal() -> &'static str {
    let mut terminate = signal(SignalKind::terminate()).expect("the runtime has a signal driver");
    let mut interrupt = signal(SignalKind::interrupt()).expect("the runtime has a signal driver");
    tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    }
}
