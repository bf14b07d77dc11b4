// SPDX-License-Identifier: Apache-2.0
//! The shared libraries that a program needs, all of them, as this machine's loader finds them.

use anyhow::{Context, bail, ensure};
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

/// Paths of the libraries of `program` and of its loader; empty for a static program.
/// # Errors
/// A library is missing here, or `ldd` cannot be run.
pub fn libraries(program: &Path) -> anyhow::Result<BTreeSet<String>> {
    let output = Command::new("ldd")
        .arg(program)
        .env("LC_ALL", "C")
        .env_remove("LD_LIBRARY_PATH")
        .output()
        .context("ldd (libc-bin) cannot be run")?;
    let text = String::from_utf8_lossy(&output.stdout);
    if String::from_utf8_lossy(&output.stderr).contains("not a dynamic executable") {
        return Ok(BTreeSet::new());
    }
    ensure!(
        output.status.success(),
        "ldd {} failed: {text}",
        program.display()
    );
    parse(&text).with_context(|| format!("the libraries of {}", program.display()))
}

/// `name => /path (0x..)`, `/loader (0x..)`, and the kernel's own page, which has no file.
fn parse(text: &str) -> anyhow::Result<BTreeSet<String>> {
    let mut paths = BTreeSet::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        if line == "statically linked" {
            continue;
        }
        let found = line.split_once(" => ").map_or(line, |(_, found)| found);
        match found.split_once(" (0x").map(|(path, _)| path) {
            Some(path) if path.starts_with('/') => paths.insert(path.to_owned()),
            Some(path) if path.starts_with("linux-vdso") => false,
            _ => bail!("ldd says: {line}"),
        };
    }
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_and_the_loader_are_found_and_the_kernels_page_is_left_out() {
        let text = "\tlinux-vdso.so.1 (0x00007ffe)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f1)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f2)\n";
        let paths: Vec<String> = parse(text).unwrap().into_iter().collect();
        assert_eq!(
            paths,
            [
                "/lib/x86_64-linux-gnu/libc.so.6",
                "/lib64/ld-linux-x86-64.so.2"
            ]
        );
    }

    #[test]
    fn a_missing_library_is_refused() {
        let error = parse("\tlibgone.so.1 => not found\n").unwrap_err();
        assert!(error.to_string().contains("libgone.so.1"), "{error}");
    }
}
