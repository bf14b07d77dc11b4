// SPDX-License-Identifier: Apache-2.0
//! What failed, told once more at the end: the output of a whole run is long, and who reads a log begins at its end.

use std::io::{BufRead, Write};

/// Lines that are told again of each test that failed: the message, not the whole of what the test printed.
const LINES: usize = 12;
/// And characters of them, since one line can hold a whole diff.
const CHARACTERS: usize = 600;

/// Passes the output of test programs on, and keeps the beginning of what each failed test said of its failure.
///
/// # Errors
/// If `from` cannot be read or `to` cannot be written.
pub fn forward(from: impl BufRead, mut to: impl Write) -> std::io::Result<Vec<Failure>> {
    let mut found = Found::default();
    for line in from.split(b'\n') {
        let line = line?;
        to.write_all(&line)?;
        to.write_all(b"\n")?;
        to.flush()?;
        found.line(&String::from_utf8_lossy(&line));
    }
    Ok(found.failures)
}

#[derive(Debug, Eq, PartialEq)]
pub struct Failure {
    test: String,
    said: Vec<String>,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "FAILED {}", self.test)?;
        let mut left = CHARACTERS;
        for line in &self.said {
            let line: String = line.chars().take(left).collect();
            left -= line.chars().count();
            write!(out, "\n    {line}")?;
            if left == 0 {
                break;
            }
        }
        Ok(())
    }
}

#[derive(Default)]
struct Found {
    failures: Vec<Failure>,
    /// Within what the last failure's test printed, from its panic on.
    panicked: bool,
}

impl Found {
    /// One line as `libtest` writes it: `---- <test> stdout ----`, what the test printed, and the list of `failures:`.
    fn line(&mut self, line: &str) {
        let heading = line
            .strip_prefix("---- ")
            .and_then(|rest| rest.strip_suffix(" stdout ----"));
        if let Some(test) = heading {
            self.failures.push(Failure {
                test: test.to_owned(),
                said: Vec::new(),
            });
            self.panicked = false;
        } else if line == "failures:" || line.eq_ignore_ascii_case("stack backtrace:") {
            self.panicked = false;
        } else if let Some(last) = self.failures.last_mut() {
            self.panicked |= line.contains(" panicked at ") || line.starts_with("Error: ");
            if self.panicked && last.said.len() < LINES && !line.is_empty() {
                last.said.push(line.to_owned());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_test_is_told_with_its_message_and_without_what_it_printed_before() {
        let output = "..F.\n\nfailures:\n\n---- a::one stdout ----\na step\n\nthread 'a::one' (7) panicked at a.rs:1:2:\nleft != right\n\
                      stack backtrace:\n   0: main\n\n---- two stdout ----\nError: no such file\n\nfailures:\n    a::one\n    two\n";
        let mut passed_on = Vec::new();
        let failures = forward(output.as_bytes(), &mut passed_on).unwrap();
        assert_eq!(String::from_utf8(passed_on).unwrap(), output);
        let told: Vec<String> = failures.iter().map(ToString::to_string).collect();
        assert_eq!(
            told,
            [
                "FAILED a::one\n    thread 'a::one' (7) panicked at a.rs:1:2:\n    left != right",
                "FAILED two\n    Error: no such file",
            ]
        );
    }

    #[test]
    fn a_long_message_is_cut() {
        let output = format!("---- one stdout ----\nError: {}\n", "x".repeat(9_000));
        let failures = forward(output.as_bytes(), std::io::sink()).unwrap();
        assert!(failures[0].to_string().len() < 700);
    }
}
