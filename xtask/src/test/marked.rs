// SPDX-License-Identifier: Apache-2.0
//! Which tests a reason to ignore stands on: the test program itself chooses by name only.

use anyhow::{Context, ensure};
use std::fs;
use std::path::Path;

/// Names of the functions marked `#[ignore = "<reason>"]` in the Rust files below `folder`.
///
/// # Errors
/// If a file cannot be read, or a mark stands on nothing.
pub fn names(folder: &Path, reason: &str) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path.is_dir() {
            if name != "target" && !name.starts_with('.') {
                found.extend(names(&path, reason)?);
            }
        } else if name.ends_with(".rs") {
            let text = fs::read_to_string(&path)?;
            found.extend(in_file(&text, reason).with_context(|| path.display().to_string())?);
        }
    }
    Ok(found)
}

fn in_file(text: &str, reason: &str) -> anyhow::Result<Vec<String>> {
    let mark = format!("#[ignore = \"{reason}\"]");
    let mut found = Vec::new();
    let mut lines = text.lines().map(str::trim);
    while lines.any(|line| line == mark) {
        let function = lines
            .find(|line| !line.starts_with("#[") && !line.starts_with("//"))
            .and_then(|line| line.split_once("fn "))
            .and_then(|(_, rest)| rest.split_once('('));
        let name = function.map(|(name, _)| name).unwrap_or_default();
        ensure!(!name.is_empty(), "{mark} stands on no function");
        found.push(name.to_owned());
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_names_the_function_below_it() {
        let text = "#[test]\n#[ignore = \"all\"]\nfn one() {}\n\n#[tokio::test]\n#[ignore = \"all\"]\n\
                    // why\n#[other]\nasync fn two() {}\n#[test]\n#[ignore = \"cluster\"]\nfn three() {}\n";
        assert_eq!(in_file(text, "all").unwrap(), ["one", "two"]);
        assert!(in_file("#[ignore = \"all\"]\nstruct S;", "all").is_err());
    }
}
