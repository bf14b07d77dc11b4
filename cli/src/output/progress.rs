// SPDX-License-Identifier: Apache-2.0
use std::io::{self, IsTerminal, Write};

/// What is being done, on standard error and on one line that is written over. Nothing where that is not a terminal, so
/// that no file or pipe ever holds it.
#[derive(Debug)]
pub struct Progress {
    shown: bool,
    terminal: bool,
}

impl Progress {
    pub fn new() -> Self {
        Self {
            shown: false,
            terminal: io::stderr().is_terminal(),
        }
    }

    pub fn say(&mut self, what: &str) {
        if self.terminal {
            self.shown = true;
            let _closed = write!(io::stderr(), "\r\x1b[K{what}...");
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.shown {
            let _closed = write!(io::stderr(), "\r\x1b[K");
        }
    }
}
