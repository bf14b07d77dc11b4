// SPDX-License-Identifier: Apache-2.0
//! What a pod's namespace and annotations set. A value that cannot be read keeps the last good one, and is the strictest
//! where none is known.

use podveil_model::{External, Mode};
use podveil_source::{Defaults, Namespace, Pod, Rules, labels, ports, shortened};
use std::collections::BTreeSet;

/// What holds for every pod of a namespace.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct NamespaceSettings {
    pub rules: Rules,
    pub external: External,
    /// It has the label that enrols. What held before that was of no consequence, and is no last good value.
    pub labelled: bool,
}

impl NamespaceSettings {
    /// Of before a restart, of which only the mode is known.
    pub(crate) fn restored(mode: Mode) -> Self {
        Self {
            rules: Rules {
                mode,
                ..Rules::STRICTEST
            },
            external: External::Refuse,
            labelled: true,
        }
    }
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
    let last = last.filter(|last| last.labelled);
    let (rules, mut bad) = namespace.rules(last.map(|last| last.rules), defaults);
    let external = namespace.external().unwrap_or_else(|fault| {
        bad.push(fault);
        Some(last.map_or(External::Refuse, |last| last.external))
    });
    let counts = match last {
        Some(_) => "the last good one stays",
        None => "no good one is known, and the strictest counts",
    };
    conditions.extend(bad.iter().map(|fault| format!("{fault}; {counts}")));
    NamespaceSettings {
        rules,
        external: external.unwrap_or_default(),
        labelled: namespace.is_labelled(),
    }
}

/// The settings of a pod in a namespace of these.
pub(crate) fn settings(
    pod: &Pod,
    NamespaceSettings {
        rules, external, ..
    }: NamespaceSettings,
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
