// SPDX-License-Identifier: Apache-2.0
//! What a pod's namespace and annotations set. A value that cannot be read keeps the last good one.

use podveil_model::{Mode, is_own_port};
use podveil_source::{Namespace, Pod, labels};
use std::collections::BTreeSet;

/// More ports than any pod leaves out; a longer list is a mistake.
const MAX_PORTS: usize = 64;

#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Settings {
    pub mode: Mode,
    pub exclude_outbound_ports: BTreeSet<u16>,
    pub exclude_inbound_ports: BTreeSet<u16>,
    pub plain_inbound_ports: BTreeSet<u16>,
}

/// The mode of a namespace, where `last` was the mode before.
pub(crate) fn mode(
    namespace: &Namespace,
    last: Option<Mode>,
    conditions: &mut Vec<String>,
) -> Mode {
    match namespace.mode() {
        Ok(mode) => mode.unwrap_or_default(),
        Err(bad) => {
            let mode = last.unwrap_or_default();
            conditions.push(format!("{bad}; {} stays", name(mode)));
            mode
        }
    }
}

pub(crate) fn name(mode: Mode) -> &'static str {
    match mode {
        Mode::Permissive => "permissive",
        Mode::Strict => "strict",
    }
}

/// The settings of a pod in a namespace of this mode.
pub(crate) fn settings(
    pod: &Pod,
    mode: Mode,
    last: Option<&Settings>,
    conditions: &mut Vec<String>,
) -> Settings {
    let mut read = |annotation: &str, last: Option<&BTreeSet<u16>>| {
        let Some(text) = pod.annotations.get(annotation) else {
            return BTreeSet::new();
        };
        ports(text).unwrap_or_else(|fault| {
            conditions.push(format!("annotation {annotation} is {text:?}: {fault}"));
            last.cloned().unwrap_or_default()
        })
    };
    let mut settings = Settings {
        mode,
        exclude_outbound_ports: read(
            labels::EXCLUDE_OUTBOUND_PORTS,
            last.map(|last| &last.exclude_outbound_ports),
        ),
        exclude_inbound_ports: read(
            labels::EXCLUDE_INBOUND_PORTS,
            last.map(|last| &last.exclude_inbound_ports),
        ),
        plain_inbound_ports: read(
            labels::PLAIN_INBOUND_PORTS,
            last.map(|last| &last.plain_inbound_ports),
        ),
    };
    // A strict namespace names the ports it takes in plain; nobody slips past capture.
    let excluded =
        !settings.exclude_outbound_ports.is_empty() || !settings.exclude_inbound_ports.is_empty();
    if mode == Mode::Strict && excluded {
        conditions.push("excluded ports are ignored in a strict namespace".to_owned());
        settings.exclude_outbound_ports.clear();
        settings.exclude_inbound_ports.clear();
    }
    settings
}

fn ports(text: &str) -> Result<BTreeSet<u16>, String> {
    let mut ports = BTreeSet::new();
    for part in text
        .split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
    {
        match part.parse::<u16>() {
            Ok(0) | Err(_) => return Err(format!("{part:?} is not a port")),
            Ok(port) if is_own_port(port) => {
                return Err(format!("port {port} is the proxy's own"));
            }
            Ok(port) => ports.insert(port),
        };
        if ports.len() > MAX_PORTS {
            return Err(format!("more than {MAX_PORTS} ports"));
        }
    }
    Ok(ports)
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
        assert!(ports(&many.join(",")).is_err());
    }
}
