// SPDX-License-Identifier: Apache-2.0
//! The namespaces that are enrolled, as the node program was told last, in a file beside its socket: while it is away, no
//! pod of another namespace has to wait for it.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

const FILE: &str = "enrolled-namespaces";
/// Twenty thousand names of 63 bytes.
const MAX_BYTES: u64 = 2 << 20;
/// Ends the file, so that one that was cut off is not taken for all: no namespace has such a name.
const END: &str = ".";

/// The file, for the node program's socket.
pub fn path(socket: &Path) -> PathBuf {
    socket.with_file_name(FILE)
}

/// What stands in the file.
pub fn encode<N: AsRef<str>>(names: impl IntoIterator<Item = N>) -> String {
    let mut text = String::new();
    for name in names {
        text.push_str(name.as_ref());
        text.push('\n');
    }
    text.push_str(END);
    text
}

/// `None`: it is none, or not whole.
fn decode(text: &str) -> Option<BTreeSet<&str>> {
    let names = text.strip_suffix(END)?;
    (names.is_empty() || names.ends_with('\n')).then(|| names.lines().collect())
}

/// Is it known that this namespace is not enrolled? Whatever cannot be read says nothing.
pub(crate) fn is_other(socket: &Path, namespace: &str) -> bool {
    let mut text = String::new();
    let read = File::open(path(socket))
        .and_then(|file| file.take(MAX_BYTES + 1).read_to_string(&mut text))
        .is_ok_and(|length| length as u64 <= MAX_BYTES);
    read && decode(&text).is_some_and(|enrolled| !enrolled.contains(namespace))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_file_says_that_a_namespace_is_not_enrolled() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("cni.sock");
        assert!(!is_other(&socket, "other"), "there is none");
        for names in [&["bank", "shop"][..], &[]] {
            let whole = encode(names);
            for end in 0..=whole.len() {
                std::fs::write(path(&socket), &whole[..end]).unwrap();
                assert_eq!(is_other(&socket, "other"), end == whole.len(), "{end}");
            }
            for name in ["bank", "shop"] {
                assert_eq!(is_other(&socket, name), names.is_empty());
            }
        }
        std::fs::write(path(&socket), [0xff, b'.']).unwrap();
        assert!(!is_other(&socket, "other"), "no text");
        let long = "a\n".repeat(2 << 20) + END;
        std::fs::write(path(&socket), long).unwrap();
        assert!(!is_other(&socket, "other"), "too long");
    }
}
