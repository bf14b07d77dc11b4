// SPDX-License-Identifier: Apache-2.0
//! Lists of ports in annotations: the one parser for whoever reads them.

use podveil_model::is_own_port;
use std::collections::BTreeSet;

/// More ports than any pod leaves out; a longer list is a mistake.
const MAX_PORTS: usize = 64;

/// Parses a comma-separated list of ports, as `80, 443`; an empty one is none.
///
/// # Errors
/// For what is no port from 1 to 65535, a port of the proxy's own, or more than 64 of them.
pub fn ports(text: &str) -> Result<BTreeSet<u16>, BadPorts> {
    let mut ports = BTreeSet::new();
    let parts = text.split(',').map(str::trim);
    for part in parts.filter(|part| !part.is_empty()) {
        match part.parse() {
            Ok(0) | Err(_) => return Err(BadPorts::NoPort(shortened(part))),
            Ok(port) if is_own_port(port) => return Err(BadPorts::Own(port)),
            Ok(port) => ports.insert(port),
        };
        if ports.len() > MAX_PORTS {
            return Err(BadPorts::TooMany);
        }
    }
    Ok(ports)
}

#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum BadPorts {
    #[error("{0:?} is not a port")]
    NoPort(String),
    #[error("port {0} is the proxy's own")]
    Own(u16),
    #[error("more than {MAX_PORTS} ports")]
    TooMany,
}

/// For a sentence; a person sees the rest in the object itself.
pub fn shortened(text: &str) -> String {
    const CHARS: usize = 64;
    let mut short: String = text.chars().take(CHARS).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read_or_refused() {
        assert_eq!(ports("80, 443,"), Ok(BTreeSet::from([80, 443])));
        assert_eq!(ports(""), Ok(BTreeSet::new()));
        for text in ["0", "65536", "http", "80-90", "15008", "-1"] {
            assert!(ports(text).is_err(), "{text} was taken");
        }
        let many: Vec<_> = (1..=65).map(|port: u16| port.to_string()).collect();
        assert_eq!(ports(&many.join(",")), Err(BadPorts::TooMany));
    }
}
