// SPDX-License-Identifier: Apache-2.0
use anyhow::bail;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// What a demo has shown so far: one line each, checked or crossed.
#[derive(Debug)]
pub struct Report {
    held: usize,
    failed: usize,
    interrupted: Arc<AtomicBool>,
}

impl Report {
    pub fn new(interrupted: Arc<AtomicBool>) -> Self {
        Self {
            held: 0,
            failed: 0,
            interrupted,
        }
    }

    pub fn heading(&self, title: &str) {
        println!("\n{title}");
    }

    /// Writes one line: the promise, and what was seen or why it does not hold.
    ///
    /// # Errors
    /// Only if the user has interrupted; a promise that does not hold is counted and the report goes on.
    pub fn line(&mut self, promise: &str, outcome: anyhow::Result<String>) -> anyhow::Result<()> {
        if self.interrupted() {
            bail!("interrupted");
        }
        match outcome {
            Ok(ref seen) if seen.is_empty() => println!("  ✔ {promise}"),
            Ok(ref seen) => println!("  ✔ {promise}: {seen}"),
            Err(ref error) => println!("  ✘ {promise}: {error:#}"),
        }
        *(if outcome.is_ok() {
            &mut self.held
        } else {
            &mut self.failed
        }) += 1;
        Ok(())
    }

    pub fn interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }

    pub fn succeeded(&self) -> bool {
        self.failed == 0 && self.held > 0 && !self.interrupted()
    }

    pub fn summary(&self) -> String {
        match self.failed {
            0 => format!("all {} lines hold", self.held),
            failed => format!("{failed} of {} lines do NOT hold", failed + self.held),
        }
    }
}
