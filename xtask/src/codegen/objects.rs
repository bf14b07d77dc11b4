// SPDX-License-Identifier: Apache-2.0
//! The committed objects of the eBPF programs: what a build without clang takes. They come from one compiler version, so
//! that they can be compared byte by byte; what another one makes of the same sources is as good, and different.

#[path = "../../../redirect-bpf/bpf/compile.rs"]
mod compile;

use crate::workspace;
use anyhow::{Context, bail, ensure};
use std::io;
use std::process::Command;

/// Compiles the programs, or with `check` fails if what is committed is another program.
pub fn run(check: bool) -> anyhow::Result<()> {
    match Command::new(compile::REFERENCE).arg("--version").output() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let missing = format!(
                "{} (and its llvm-strip) is missing: run ./xtask/setup.sh codegen",
                compile::REFERENCE
            );
            if check {
                bail!(missing);
            }
            println!("{missing}; redirect-bpf/bpf/objects stay as they are");
            return Ok(());
        }
        version => version.map(drop)?,
    }
    let root = workspace().join("redirect-bpf/bpf");
    let scratch = workspace().join("target/codegen-objects");
    std::fs::create_dir_all(&scratch)?;
    for name in compile::OBJECTS {
        let file = format!("{name}.bpf.o");
        let fresh = scratch.join(&file);
        compile::compile(compile::REFERENCE, &root.join("programs"), name, &fresh)
            .with_context(|| format!("compiling {name}.bpf.c"))?;
        let committed = root.join("objects").join(&file);
        if check {
            ensure!(
                std::fs::read(&fresh)? == std::fs::read(&committed).unwrap_or_default(),
                "redirect-bpf/bpf/objects/{file} is not what its source says: run `cargo xtask codegen`"
            );
        } else {
            std::fs::copy(&fresh, &committed)?;
        }
    }
    if !check {
        println!("{} objects in {}", compile::OBJECTS.len(), root.display());
    }
    Ok(())
}
