// SPDX-License-Identifier: Apache-2.0
//! How the programs are compiled, for `build.rs` and for `cargo xtask codegen`.

use std::io;
use std::path::Path;
use std::process::Command;

/// One object each: `programs/<name>.bpf.c`.
pub const OBJECTS: [&str; 2] = ["node", "pod"];

/// The compiler whose output is committed: another one makes other instructions of the same programs.
pub const REFERENCE: &str = "clang-19";

/// Compiles one object and takes the debugger's part out; BTF stays.
/// # Errors
/// When clang cannot be run, lacks the target, or finds a mistake.
pub fn compile(clang: &str, programs: &Path, name: &str, object: &Path) -> io::Result<()> {
    // In the folder and with names relative to it, so that the object is the same wherever the checkout lies.
    run(Command::new(clang)
        .current_dir(programs)
        .args(["-target", "bpf", "-mcpu=v3", "-O2", "-g"])
        .args(["-Wall", "-Wextra", "-Werror", "-Wno-unknown-warning-option"])
        .args(["-fdebug-compilation-dir=.", "-c"])
        .arg(format!("{name}.bpf.c"))
        .arg("-o")
        .arg(object))?;
    let strip = clang.replace("clang", "llvm-strip");
    match run(Command::new(strip).arg("--strip-debug").arg(object)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

fn run(command: &mut Command) -> io::Result<()> {
    let output = command.output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(
        String::from_utf8_lossy(&output.stderr).into_owned(),
    ))
}
