// SPDX-License-Identifier: Apache-2.0
#![forbid(unsafe_code)]

use podveil_cni::run;
use std::io::{self, Write};
use std::process::ExitCode;

fn main() -> ExitCode {
    let variable = |name: &str| std::env::var(name).ok();
    let outcome = run(&variable, io::stdin().lock());
    let (text, code) = match outcome {
        Ok(text) => (text, ExitCode::SUCCESS),
        Err(failure) => (failure.to_string(), ExitCode::FAILURE),
    };
    // Who asked and does not read has no use for the answer either.
    match io::stdout().lock().write_all(text.as_bytes()) {
        Ok(()) => code,
        Err(_) => ExitCode::FAILURE,
    }
}
