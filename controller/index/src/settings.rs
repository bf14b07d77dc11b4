// SPDX-License-Identifier: Apache-2.0
//! What a pod's namespace and annotations set. A value that cannot be read keeps the last good one.

use podveil_model::{External, Mode, is_own_port};
use podveil_source::{Defaults, Namespace, Pod, Rules, labels};
use std::collections::BTreeSet;

/// More ports than any pod leaves out; a longer list is a mistake.
const MAX_PORTS: usize = 64;

/// What holds for every pod of a namespace.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct NamespaceSettings {
    pub rules: Rules,
    pub external: External,
}

#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Settings {
    pub mode: Mode,
    pub external: External,
    pub exclude_outbound_ports: BTreeSet<u16>,
    pub exclude_inbound_ports: BTreeSet<u16>,
    pub plain_inbound_ports: BTreeSet<u16>,
}

/// The settings of a namespace, where `last` were those before.
pub(crate) fn of_namespace(
    namespace: &Namespace,
    defaults: Defaults,
    last: Option<NamespaceSettings>,
    conditions: &mut Vec<String>,
) -> NamespaceSettings {
    if let Some(value) = namespace.labels.get(labels::ENROL)
        && value != "true"
        && value != "false"
    {
        conditions.push(format!(
            "label {} is {value:?}, not \"true\" or \"false\"; it counts as \"false\"",
            labels::ENROL
        ));
    }
    let (rules, mut bad) = namespace.rules(last.map(|last| last.rules), defaults);
    let external = namespace.external().unwrap_or_else(|fault| {
        bad.push(fault);
        last.map(|last| last.external)
    });
    conditions.extend(
        bad.iter()
            .map(|fault| format!("{fault}; the last good one stays")),
    );
    NamespaceSettings {
        rules,
        external: external.unwrap_or_default(),
    }
}

/// The settings of a pod in a namespace of these.
pub(crate) fn settings(
    pod: &Pod,
    NamespaceSettings { rules, external }: NamespaceSettings,
    last: Option<&Settings>,
    conditions: &mut Vec<String>,
) -> Settings {
    let mut read = |annotation: &str, last: Option<&BTreeSet<u16>>| {
        let Some(text) = pod.annotations.get(annotation) else {
            return BTreeSet::new();
        };
        ports(text).unwrap_or_else(|fault| {
            conditions.push(format!(
                "annotation {annotation} is {:?}: {fault}; the last good value stays",
                shortened(text)
            ));
            last.cloned().unwrap_or_default()
        })
    };
    let mode = rules.mode;
    let mut settings = Settings {
        mode,
        external,
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

/// For a sentence; a person sees the rest in the object itself.
fn shortened(text: &str) -> String {
    const CHARS: usize = 64;
    let mut short: String = text.chars().take(CHARS).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

fn ports(text: &str) -> Result<BTreeSet<u16>, String> {
    let mut ports = BTreeSet::new();
    for part in text
        .split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
    {
        match part.parse::<u16>() {
            Ok(0) | Err(_) => return Err(format!("{:?} is not a port", shortened(part))),
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
