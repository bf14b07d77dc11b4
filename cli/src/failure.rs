// SPDX-License-Identifier: Apache-2.0
//! How a command ends: exit codes, and errors that know their cure.

use std::fmt;
use std::process::ExitCode;

/// What a command that did its work found. An error is not one of these: [`ERROR`]; a wrong command line is clap's 2.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// 0: done, and nothing is wrong.
    Good,
    /// 3: done, and what was looked at is not as it should be: a check found a problem, a connection would be refused.
    Bad,
}

/// The command could not do its work.
pub const ERROR: u8 = 1;

impl Outcome {
    pub fn good_if(good: bool) -> Self {
        if good { Self::Good } else { Self::Bad }
    }
}

impl From<Outcome> for ExitCode {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Good => Self::SUCCESS,
            Outcome::Bad => Self::from(3),
        }
    }
}

/// What could not be done, and what the person can do about it.
#[derive(Clone, Debug)]
pub struct Failure {
    what: String,
    pub cure: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for Failure {}

impl Failure {
    pub fn new(what: impl Into<String>, cure: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            cure: cure.into(),
        }
    }
}

/// `.or_cure(what, cure)` where `anyhow` has `.context(what)`.
pub trait OrCure<T> {
    /// # Errors
    /// The error it had, behind a [`Failure`].
    fn or_cure(self, what: impl Into<String>, cure: impl Into<String>) -> anyhow::Result<T>;
}

impl<T, E: Into<anyhow::Error>> OrCure<T> for Result<T, E> {
    fn or_cure(self, what: impl Into<String>, cure: impl Into<String>) -> anyhow::Result<T> {
        self.map_err(|error| error.into().context(Failure::new(what, cure)))
    }
}

/// The whole chain in one sentence, and the cure on a line of its own.
pub fn describe(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        // Many errors of libraries have said already what their cause says.
        if text.contains(&cause) {
            continue;
        }
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&cause);
    }
    if let Some(failure) = error.downcast_ref::<Failure>() {
        text.push_str("\n  try: ");
        text.push_str(&failure.cure);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::{Context, anyhow};

    #[test]
    fn an_error_says_what_why_and_the_cure() {
        let refused: anyhow::Result<()> = Err(anyhow!("connection refused"))
            .or_cure("asking the controller", "start it")
            .context("reading the status");
        assert_eq!(
            describe(&refused.unwrap_err()),
            "reading the status: asking the controller: connection refused\n  try: start it"
        );
        assert_eq!(describe(&anyhow!("alone")), "alone");
    }

    #[test]
    fn what_an_error_has_said_of_its_cause_is_not_said_again() {
        let error = anyhow!("no such file").context("reading x: no such file");
        assert_eq!(
            describe(&error.context("finding the cluster")),
            "finding the cluster: reading x: no such file"
        );
    }
}
