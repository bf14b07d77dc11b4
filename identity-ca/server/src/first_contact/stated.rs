// SPDX-License-Identifier: Apache-2.0
//! What a token says of itself. Nothing of it is believed: it only names the reason of a refusal, spares the API server
//! what can only be refused, and bounds how long the answer of the API server is kept.

use super::TokenError;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Deserialize;
use std::time::{Duration, SystemTime};

/// A ServiceAccount's token has about 1.2 KiB.
const MAX_BYTES: usize = 8 * 1024;
/// Between our clock and the API server's.
const CLOCKS: Duration = Duration::from_secs(60);

#[derive(Debug, Deserialize)]
pub(super) struct Stated {
    #[serde(default)]
    aud: Audiences,
    /// Unix seconds. A token without an end is none of a pod's.
    exp: u64,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Audiences {
    Many(Vec<String>),
    One(String),
}

impl Default for Audiences {
    fn default() -> Self {
        Self::Many(Vec::new())
    }
}

impl Stated {
    /// # Errors
    /// [`TokenError::Malformed`] for what is no JWT.
    pub(super) fn read(token: &str) -> Result<Self, TokenError> {
        let mut parts = token.split('.');
        let (Some(_), Some(payload), Some(_), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(TokenError::Malformed);
        };
        if token.len() > MAX_BYTES {
            return Err(TokenError::Malformed);
        }
        let payload = URL_SAFE_NO_PAD
            .decode(payload)
            .map_err(|_| TokenError::Malformed)?;
        serde_json::from_slice(&payload).map_err(|_| TokenError::Malformed)
    }

    /// # Errors
    /// [`TokenError::Expired`] or [`TokenError::OtherAudience`], which the API server would not tell apart.
    pub(super) fn check(&self, audience: &str, now: SystemTime) -> Result<(), TokenError> {
        let named = match &self.aud {
            Audiences::Many(audiences) => audiences.iter().any(|one| one == audience),
            Audiences::One(one) => one == audience,
        };
        if !named {
            return Err(TokenError::OtherAudience);
        }
        if self.end() + CLOCKS <= now {
            return Err(TokenError::Expired);
        }
        Ok(())
    }

    /// How much of its life is left.
    pub(super) fn left(&self, now: SystemTime) -> Duration {
        self.end().duration_since(now).unwrap_or_default()
    }

    fn end(&self) -> SystemTime {
        // A year of our era, whatever is said.
        SystemTime::UNIX_EPOCH + Duration::from_secs(self.exp.min(u64::from(u32::MAX)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(payload: &str) -> String {
        format!("e30.{}.c2lnbmF0dXJl", URL_SAFE_NO_PAD.encode(payload))
    }

    #[test]
    fn what_is_no_jwt_is_refused() {
        for text in [
            "",
            "abc",
            "a.b",
            "a.b.c",
            "e30.e30.c",
            "e30.!.c",
            "a.b.c.d",
            &token("[]"),
            &token(r#"{"exp": -1}"#),
            &token(&format!(
                r#"{{"exp": 1, "aud": "{}"}}"#,
                "a".repeat(MAX_BYTES)
            )),
        ] {
            assert!(
                matches!(Stated::read(text), Err(TokenError::Malformed)),
                "{text}"
            );
        }
    }

    #[test]
    fn another_audience_and_an_ended_life_have_their_own_reasons() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(10_000);
        for (payload, expected) in [
            (r#"{"aud": ["podveil-ca"], "exp": 10300}"#, "Ok(())"),
            (r#"{"aud": "podveil-ca", "exp": 10300}"#, "Ok(())"),
            (r#"{"aud": ["a", "podveil-ca"], "exp": 9950}"#, "Ok(())"),
            (r#"{"aud": ["podveil-ca"], "exp": 9940}"#, "Err(Expired)"),
            (
                r#"{"aud": ["istio-ca"], "exp": 10300}"#,
                "Err(OtherAudience)",
            ),
            (r#"{"exp": 10300}"#, "Err(OtherAudience)"),
        ] {
            let stated = Stated::read(&token(payload)).unwrap();
            let checked = stated.check("podveil-ca", now);
            assert_eq!(format!("{checked:?}"), expected, "{payload}");
        }
        let stated = Stated::read(&token(r#"{"exp": 18446744073709551615}"#)).unwrap();
        assert!(stated.left(now) > Duration::ZERO);
    }
}
