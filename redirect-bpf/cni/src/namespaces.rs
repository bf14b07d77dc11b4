// SPDX-License-Identifier: Apache-2.0
use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Twenty thousand names of 63 bytes, and some to spare.
const MAX_BYTES: u64 = 2 << 20;
/// Ends the file, so that one that was cut off is not taken for all: no namespace has such a name.
const END: &str = ".";

/// The namespaces that are not enrolled, as the node program was told last, in a file beside its socket: while it is away,
/// their pods do not have to wait for it. What is not among them is enrolled, or nobody has told of it.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct NotEnrolled {
    /// Orders what was told; only the node program reads it.
    pub version: String,
    pub names: BTreeSet<String>,
}

impl NotEnrolled {
    /// The file, for the node program's socket.
    pub fn path(socket: &Path) -> PathBuf {
        socket.with_file_name("not-enrolled")
    }

    /// What stands in the file: the version and each name, a line each, and its end.
    pub fn encode(&self) -> String {
        let lines = std::iter::once(&self.version).chain(&self.names);
        lines.flat_map(|line| [line, "\n"]).chain([END]).collect()
    }

    /// `None` where nothing can be read, or not all of it.
    pub fn read(path: &Path) -> Option<Self> {
        let mut text = String::new();
        let file = File::open(path).ok()?;
        let length = file.take(MAX_BYTES + 1).read_to_string(&mut text).ok()?;
        if length as u64 > MAX_BYTES {
            return None;
        }
        let mut lines = text.strip_suffix(END)?.strip_suffix('\n')?.lines();
        Some(Self {
            version: lines.next()?.to_owned(),
            names: lines.map(str::to_owned).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn only_a_whole_file_says_that_a_namespace_is_not_enrolled() {
        let folder = tempfile::tempdir().unwrap();
        let path = NotEnrolled::path(&folder.path().join("cni.sock"));
        assert_eq!(NotEnrolled::read(&path), None, "there is none");
        for names in [&["bank", "shop"][..], &[]] {
            let told = NotEnrolled {
                version: "7.0".into(),
                names: names.iter().map(|name| (*name).to_owned()).collect(),
            };
            let whole = told.encode();
            for end in 0..whole.len() {
                fs::write(&path, &whole[..end]).unwrap();
                assert_eq!(NotEnrolled::read(&path), None, "{}", &whole[..end]);
            }
            fs::write(&path, whole).unwrap();
            assert_eq!(NotEnrolled::read(&path), Some(told));
        }
        for text in [&b"\xff\n."[..], b".", b"\n", &b"a\n".repeat(2 << 20)] {
            fs::write(&path, [text, b"\n."].concat()).unwrap();
            let read = NotEnrolled::read(&path);
            assert!(read.is_none_or(|read| read.names.is_empty()));
        }
    }
}
