// SPDX-License-Identifier: Apache-2.0
use std::fmt;
use std::str::FromStr;

/// `system_version_info`: which server, and which of its snapshots. Numbers of different servers are not comparable.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Version {
    /// Start of the server, milliseconds since 1970.
    pub instance: u64,
    /// Grows by one with each snapshot that differs from the one before it.
    pub number: u64,
}

#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{text:?} is not a version (<instance>-<number>)")]
pub struct VersionError {
    text: String,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.instance, self.number)
    }
}

impl FromStr for Version {
    type Err = VersionError;

    fn from_str(text: &str) -> Result<Self, VersionError> {
        let parsed = text.split_once('-').and_then(|(instance, number)| {
            Some(Self {
                instance: instance.parse().ok()?,
                number: number.parse().ok()?,
            })
        });
        parsed.ok_or_else(|| VersionError {
            text: text.chars().take(64).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_read_as_it_is_written() {
        let version = Version {
            instance: 1_700_000_000_000,
            number: 7,
        };
        assert_eq!(version.to_string(), "1700000000000-7");
        assert_eq!(version.to_string().parse(), Ok(version));
        for text in ["", "7", "-7", "a-7", "7-", "1-2-3"] {
            assert!(text.parse::<Version>().is_err(), "{text} was taken");
        }
    }
}
