// SPDX-License-Identifier: Apache-2.0
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU16;
use std::str::FromStr;

/// 253 for a name, two brackets or none, a colon and a port.
const MAX_BYTES: usize = 261;

/// The `:authority` of a CONNECT: which workload the client means, and which of its ports.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Authority {
    pub host: Host,
    pub port: NonZeroU16,
}

#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum Host {
    Ip(IpAddr),
    /// A DNS name in lower case.
    Name(String),
}

/// Why an `:authority` is not taken. The peer receives 400.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq, thiserror::Error)]
pub enum AuthorityError {
    #[error("the host is neither an address nor a name")]
    BadHost,
    #[error("the port is not a number between 1 and 65535")]
    BadPort,
    #[error("no port")]
    NoPort,
    #[error("longer than {MAX_BYTES} bytes")]
    TooLong,
}

impl Authority {
    /// The address it names, if it names one.
    pub fn address(&self) -> Option<SocketAddr> {
        match self.host {
            Host::Ip(ip) => Some(SocketAddr::new(ip, self.port.get())),
            Host::Name(_) => None,
        }
    }
}

impl FromStr for Authority {
    type Err = AuthorityError;

    /// Parses `host:port` (RFC 9113 §8.5): at most 261 bytes, IPv6 in brackets (RFC 3986 §3.2.2) and without zone, no
    /// user. Whether the address may be dialled is for `podveil_model::check_target` to say.
    fn from_str(text: &str) -> Result<Self, AuthorityError> {
        if text.len() > MAX_BYTES {
            return Err(AuthorityError::TooLong);
        }
        let (host, port) = text.rsplit_once(':').ok_or(AuthorityError::NoPort)?;
        if port.is_empty() || port.ends_with(']') {
            return Err(AuthorityError::NoPort);
        }
        // `parse` would take a sign.
        if !port.bytes().all(|byte| byte.is_ascii_digit()) || port.starts_with('0') {
            return Err(AuthorityError::BadPort);
        }
        let port = port.parse().map_err(|_| AuthorityError::BadPort)?;
        let host = match host.strip_prefix('[').map(|rest| rest.strip_suffix(']')) {
            Some(inner) => {
                let ip: Ipv6Addr = inner
                    .and_then(|inner| inner.parse().ok())
                    .ok_or(AuthorityError::BadHost)?;
                Host::Ip(ip.into())
            }
            None => match host.parse::<Ipv4Addr>() {
                Ok(ip) => Host::Ip(ip.into()),
                Err(_) if is_name(host) => Host::Name(host.to_ascii_lowercase()),
                Err(_) => return Err(AuthorityError::BadHost),
            },
        };
        Ok(Self { host, port })
    }
}

/// A DNS name whose last label is not a number: anything else that looks like an address is a badly written one.
pub(crate) fn is_name(text: &str) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
    };
    let number = |label: &str| label.starts_with(|first: char| first.is_ascii_digit());
    text.len() <= 253 && text.split('.').all(label) && !text.rsplit('.').next().is_none_or(number)
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Ip(ip) => SocketAddr::new(*ip, self.port.get()).fmt(f),
            Host::Name(name) => write!(f, "{name}:{}", self.port),
        }
    }
}

/// Any bytes: what is taken is written and parsed again to the same.
pub fn fuzz(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Ok(authority) = text.parse::<Authority>() {
        assert_eq!(authority.to_string().parse(), Ok(authority));
    }
}
