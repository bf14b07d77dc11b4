// SPDX-License-Identifier: Apache-2.0
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// `host:port` of a control-plane server. Peers' charts write it with a scheme; it is always TLS here.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct HostPort(String);

/// Why a text is not the address of a control-plane server.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum HostPortError {
    #[error("{text:?} has no host and port: write host:port, an IPv6 address in brackets")]
    NotHostPort { text: String },
    #[error("{text:?}: the control plane is spoken to over TLS only, so no http://")]
    PlainHttp { text: String },
}

impl HostPort {
    pub(super) fn known(text: &str) -> Self {
        text.parse().expect("written in this crate")
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for HostPort {
    type Err = HostPortError;

    fn from_str(text: &str) -> Result<Self, HostPortError> {
        let not_host_port = || HostPortError::NotHostPort {
            text: text.to_owned(),
        };
        if text.starts_with("http://") {
            return Err(HostPortError::PlainHttp {
                text: text.to_owned(),
            });
        }
        let address = text.strip_prefix("https://").unwrap_or(text);
        let address = address.strip_suffix('/').unwrap_or(address);
        let authority: http::uri::Authority = address.parse().map_err(|_| not_host_port())?;
        let port = authority.port_u16().filter(|port| *port != 0);
        if authority.host().is_empty() || port.is_none() || address.contains('@') {
            return Err(not_host_port());
        }
        Ok(Self(address.to_owned()))
    }
}

impl TryFrom<String> for HostPort {
    type Error = HostPortError;

    fn try_from(text: String) -> Result<Self, HostPortError> {
        text.parse()
    }
}

impl From<HostPort> for String {
    fn from(address: HostPort) -> Self {
        address.0
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scheme_is_taken_off_and_plain_http_is_refused() {
        for (text, address) in [
            ("ca:15012", "ca:15012"),
            (
                "https://istiod.istio-system.svc:15012",
                "istiod.istio-system.svc:15012",
            ),
            ("https://[fd00::1]:15012/", "[fd00::1]:15012"),
        ] {
            assert_eq!(text.parse::<HostPort>().unwrap().as_str(), address);
        }
        for text in [
            "",
            "ca",
            ":15012",
            "ca:0",
            "ca:99999",
            "http://ca:15012",
            "https://u@ca:1",
            "fd00::1",
        ] {
            assert!(text.parse::<HostPort>().is_err(), "{text} was taken");
        }
    }
}
