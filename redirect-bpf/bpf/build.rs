// SPDX-License-Identifier: Apache-2.0
//! Compiles the programs where there is a clang for BPF, and takes the committed objects where there is none.

#[path = "compile.rs"]
mod compile;

use compile::{OBJECTS, REFERENCE, compile};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

fn main() {
    // Read when it runs: a build script that is taken from a cache was compiled somewhere else.
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = env::var_os("OUT_DIR").expect("cargo sets it");
    for watched in ["build.rs", "compile.rs", "objects", "programs"] {
        println!("cargo::rerun-if-changed={watched}");
    }
    println!("cargo::rerun-if-env-changed=PATH");
    let clang = [REFERENCE, "clang"]
        .into_iter()
        .find(|clang| has_bpf(clang));
    for name in OBJECTS {
        let object = Path::new(&out).join(format!("{name}.bpf.o"));
        match clang {
            Some(clang) => {
                if let Err(error) = compile(clang, &root.join("programs"), name, &object) {
                    println!("cargo::error={clang} cannot compile {name}.bpf.c");
                    eprintln!("{error}");
                }
            }
            None => {
                let committed = root.join("objects").join(format!("{name}.bpf.o"));
                fs::copy(&committed, &object).expect("the committed object can be copied");
            }
        }
    }
}

fn has_bpf(clang: &str) -> bool {
    Command::new(clang)
        .arg("--print-targets")
        .output()
        .is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains("  bpf "))
}
