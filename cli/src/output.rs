// SPDX-License-Identifier: Apache-2.0
//! What a command says: for a person, or as JSON. Commands gather, make a report of plain data, and print it here.

mod age;
mod progress;
mod table;

pub use age::{age, utc};
pub use progress::Progress;
pub use table::Table;

use clap::ValueEnum;
use serde::Serialize;
use std::io::{self, Write};

#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Output {
    /// How the answer is written.
    #[arg(
        long = "output",
        short = 'o',
        value_enum,
        default_value_t,
        value_name = "FORMAT"
    )]
    pub format: Format,
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
pub enum Format {
    /// For a person.
    #[default]
    Human,
    /// One JSON document.
    Json,
}

impl Output {
    /// For what has no other form.
    pub const JSON: Self = Self {
        format: Format::Json,
    };

    /// Prints the report in the form that was asked for.
    ///
    /// # Errors
    /// If standard output cannot be written. A reader that has read enough is none.
    pub fn print<T: Serialize>(
        self,
        report: &T,
        human: impl FnOnce(&T) -> String,
    ) -> io::Result<()> {
        let mut text = match self.format {
            Format::Human => human(report),
            Format::Json => serde_json::to_string_pretty(report).map_err(io::Error::other)?,
        };
        if !text.ends_with('\n') {
            text.push('\n');
        }
        write(&text)
    }
}

fn write(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

/// `1 pod`, `2 pods`.
pub fn count(number: usize, one: &str) -> String {
    if number == 1 {
        format!("1 {one}")
    } else {
        format!("{number} {one}s")
    }
}
