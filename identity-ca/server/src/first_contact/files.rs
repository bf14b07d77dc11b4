// SPDX-License-Identifier: Apache-2.0
use super::TokenError;
use podveil_identity::{KubernetesName, ProgramIdentity};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use zeroize::Zeroizing;

/// The directory is read again when it was last read longer ago than this.
const FRESH: Duration = Duration::from_secs(1);
/// Shorter ones could be guessed.
const MIN_TOKEN_BYTES: usize = 16;
const MAX_TOKEN_BYTES: u64 = 4096;
/// More programs than any cluster has nodes.
const MAX_TOKENS: usize = 20_000;

/// First-contact tokens: one file a program, `controller` or `node.<name>`, holding the token.
///
/// Only their SHA-256 is kept and looked up, so neither memory nor timing tells a token.
pub struct Tokens {
    folder: PathBuf,
    read: Mutex<Option<Read>>,
}

struct Read {
    at: Instant,
    /// `None`: two programs have this token, so it proves neither.
    programs: HashMap<[u8; 32], Option<ProgramIdentity>>,
}

impl Tokens {
    pub fn new(folder: PathBuf) -> Self {
        Self {
            folder,
            read: Mutex::new(None),
        }
    }

    /// Whose token this is. Reads the directory at most once a second.
    ///
    /// # Errors
    /// [`TokenError::Unknown`] if it is nobody's, or more than one program's.
    pub fn program(&self, token: &str, now: Instant) -> Result<ProgramIdentity, TokenError> {
        let digest: [u8; 32] = Sha256::digest(token.trim().as_bytes()).into();
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        let programs = match &*read {
            Some(known) if now.saturating_duration_since(known.at) < FRESH => &known.programs,
            _ => {
                let programs = read_folder(&self.folder)?;
                &read.insert(Read { at: now, programs }).programs
            }
        };
        programs
            .get(&digest)
            .cloned()
            .flatten()
            .ok_or(TokenError::Unknown)
    }
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Tokens").field(&self.folder).finish()
    }
}

fn read_folder(folder: &Path) -> Result<HashMap<[u8; 32], Option<ProgramIdentity>>, TokenError> {
    let failed = |source| TokenError::Read {
        path: folder.to_owned(),
        source,
    };
    let mut programs = HashMap::new();
    for (seen, entry) in fs::read_dir(folder).map_err(failed)?.enumerate() {
        if seen >= MAX_TOKENS {
            return Err(TokenError::TooMany {
                path: folder.to_owned(),
                max: MAX_TOKENS,
            });
        }
        let path = entry.map_err(failed)?.path();
        let Some(program) = path
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(program)
        else {
            // A mounted Secret has `..data` and the like beside its files.
            tracing::debug!(path = %path.display(), "not the name of a program's token");
            continue;
        };
        // One unreadable file must not lock every other program out.
        let Some(token) = read_token(&path) else {
            continue;
        };
        match programs.entry(Sha256::digest(token.trim().as_bytes()).into()) {
            Entry::Vacant(free) => {
                free.insert(Some(program));
            }
            Entry::Occupied(mut taken) => {
                tracing::error!(%program, "two programs have one token; it is good for neither");
                taken.insert(None);
            }
        }
    }
    Ok(programs)
}

fn program(file: &str) -> Option<ProgramIdentity> {
    match file {
        "controller" => Some(ProgramIdentity::Controller),
        _ => file
            .strip_prefix("node.")?
            .parse::<KubernetesName>()
            .ok()
            .map(ProgramIdentity::Node),
    }
}

fn read_token(path: &Path) -> Option<Zeroizing<String>> {
    let size = fs::metadata(path).map(|metadata| metadata.len());
    let text = match size {
        Ok(size) if size <= MAX_TOKEN_BYTES => fs::read_to_string(path).map(Zeroizing::new),
        Ok(_) => Err(io::Error::other("the file is too large for a token")),
        Err(error) => Err(error),
    };
    match text {
        Ok(text) if text.trim().len() >= MIN_TOKEN_BYTES => Some(text),
        Ok(_) => {
            tracing::error!(path = %path.display(), "a token has at least {MIN_TOKEN_BYTES} bytes");
            None
        }
        Err(error) => {
            tracing::error!(path = %path.display(), %error, "a token cannot be read");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(files: &[(&str, &str)]) -> (tempfile::TempDir, Tokens) {
        let folder = tempfile::tempdir().unwrap();
        for (name, content) in files {
            fs::write(folder.path().join(name), content).unwrap();
        }
        let tokens = Tokens::new(folder.path().to_owned());
        (folder, tokens)
    }

    #[test]
    fn a_token_names_its_program() {
        let (_folder, tokens) = tokens(&[
            ("controller", "controller-token-0123\n"),
            ("node.n1", "node-one-token-0123"),
            ("node.n2.example", "node-two-token-0123"),
        ]);
        let now = Instant::now();
        for (token, program) in [
            ("controller-token-0123", ProgramIdentity::Controller),
            (
                "node-one-token-0123",
                ProgramIdentity::Node("n1".parse().unwrap()),
            ),
            (
                "node-two-token-0123",
                ProgramIdentity::Node("n2.example".parse().unwrap()),
            ),
        ] {
            assert_eq!(tokens.program(token, now).unwrap(), program);
        }
    }

    #[test]
    fn a_token_of_nobody_of_two_or_too_short_is_refused() {
        let (_folder, tokens) = tokens(&[
            ("node.n1", "the-same-token-0123"),
            ("node.n2", "the-same-token-0123"),
            ("node.n3", "short"),
            ("node.n4", ""),
            ("ca", "a-token-for-the-ca-0123"),
            ("node.N5", "a-token-for-nobody-0123"),
        ]);
        for token in [
            "the-same-token-0123",
            "short",
            "",
            "a-token-for-the-ca-0123",
            "a-token-for-nobody-0123",
            "unknown-token-01234",
        ] {
            assert!(
                matches!(
                    tokens.program(token, Instant::now()),
                    Err(TokenError::Unknown)
                ),
                "{token}"
            );
        }
    }

    #[test]
    fn a_token_taken_away_is_refused_within_a_second() {
        let (folder, tokens) = tokens(&[("node.n1", "node-one-token-0123")]);
        let now = Instant::now();
        assert!(tokens.program("node-one-token-0123", now).is_ok());
        fs::remove_file(folder.path().join("node.n1")).unwrap();
        assert!(tokens.program("node-one-token-0123", now + FRESH).is_err());
    }

    #[test]
    fn a_missing_directory_is_an_error_of_its_own() {
        let tokens = Tokens::new("/nonexistent/tokens".into());
        assert!(matches!(
            tokens.program("node-one-token-0123", Instant::now()),
            Err(TokenError::Read { .. })
        ));
    }
}
