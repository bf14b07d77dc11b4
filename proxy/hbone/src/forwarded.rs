// SPDX-License-Identifier: Apache-2.0
use crate::authority::is_name;
use http::HeaderValue;
use std::net::SocketAddr;
use std::str::FromStr;

const MAX_BYTES: usize = 512;

/// The `forwarded` header (RFC 7239): the application's address as the client's proxy saw it, and the service that the
/// application dialled. Both are the peer's word and decide nothing.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Forwarded {
    pub source: Option<SocketAddr>,
    /// A service's host name, in lower case.
    pub host: Option<String>,
}

/// Why a `forwarded` header is ignored as a whole.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq, thiserror::Error)]
pub enum ForwardedError {
    #[error("`for` is not an address with a port")]
    BadAddress,
    #[error("`host` is not a name")]
    BadHost,
    #[error("a parameter is not name=value")]
    BadParameter,
    #[error("more than one element")]
    SeveralElements,
    #[error("longer than {MAX_BYTES} bytes")]
    TooLong,
}

impl Forwarded {
    /// The header that says so, or `None` if nothing is known. A host that is not a name is left out.
    pub fn to_header(&self) -> Option<HeaderValue> {
        let source = self.source.map(|source| format!("for=\"{source}\""));
        let host = self
            .host
            .as_ref()
            .filter(|host| is_name(host))
            .map(|host| format!("host={host}"));
        let text = match (source, host) {
            (Some(source), Some(host)) => format!("{source};{host}"),
            (source, host) => source.or(host)?,
        };
        HeaderValue::try_from(text).ok()
    }
}

impl FromStr for Forwarded {
    type Err = ForwardedError;

    /// One element: `for` and `host` are read, other parameters skipped. Values may be quoted; nothing in them is
    /// escaped.
    fn from_str(text: &str) -> Result<Self, ForwardedError> {
        if text.len() > MAX_BYTES {
            return Err(ForwardedError::TooLong);
        }
        if text.contains(',') {
            return Err(ForwardedError::SeveralElements);
        }
        let mut forwarded = Self::default();
        for parameter in text.split(';') {
            let parameter = parameter.trim();
            if parameter.is_empty() {
                continue;
            }
            let (name, value) = parameter
                .split_once('=')
                .ok_or(ForwardedError::BadParameter)?;
            let value = match value.strip_prefix('"') {
                Some(rest) => rest.strip_suffix('"').ok_or(ForwardedError::BadParameter)?,
                None => value,
            };
            if name.eq_ignore_ascii_case("for") {
                let source: SocketAddr = value.parse().map_err(|_| ForwardedError::BadAddress)?;
                if matches!(source, SocketAddr::V6(v6) if v6.scope_id() != 0) {
                    return Err(ForwardedError::BadAddress);
                }
                forwarded.source = Some(source);
            } else if name.eq_ignore_ascii_case("host") {
                if !is_name(value) {
                    return Err(ForwardedError::BadHost);
                }
                forwarded.host = Some(value.to_ascii_lowercase());
            }
        }
        Ok(forwarded)
    }
}

/// A W3C `traceparent` that is not sampled, of random numbers that the caller draws.
pub fn traceparent(trace: u128, span: u64) -> HeaderValue {
    HeaderValue::try_from(format!("00-{trace:032x}-{span:016x}-00"))
        .expect("hexadecimal digits and dashes are legal in a header")
}

/// Any bytes: what is taken is written and parsed again to the same.
pub fn fuzz(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Ok(forwarded) = text.parse::<Forwarded>() {
        let header = forwarded.to_header();
        let text = header.as_ref().and_then(|header| header.to_str().ok());
        assert_eq!(text.unwrap_or_default().parse(), Ok(forwarded));
    }
}
