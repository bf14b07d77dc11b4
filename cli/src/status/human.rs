// SPDX-License-Identifier: Apache-2.0
//! `status` for a person.

use super::report::{Held, Module, ModuleState, Node, Pod, Report};
use crate::ca::CaStatus;
use crate::output::{Table, age, count, utc};
use std::fmt::Write;
use std::time::Duration;

pub fn status(report: &Report) -> String {
    let mut text = String::new();
    summary(&mut text, report);
    if !report.nodes.is_empty() {
        let mut table = Table::new([
            "NODE",
            "PROXY",
            "REDIRECT",
            "BACK END",
            "PODS",
            "VERSION",
            "WAITS FOR",
        ]);
        for node in &report.nodes {
            table.row(node_cells(node));
        }
        let _ = write!(text, "\n{table}");
    }
    if !report.pods.is_empty() {
        let mut table = Table::new([
            "POD",
            "NODE",
            "STAGE",
            "MODE",
            "CERTIFICATE",
            "CAPTURE",
            "CONNECTIONS",
            "WHY",
        ]);
        for pod in &report.pods {
            table.row(pod_cells(pod));
        }
        let _ = write!(text, "\n{table}");
    }
    for (head, lines) in [
        ("Conditions", &report.conditions),
        ("Not answered", &report.unanswered),
    ] {
        if !lines.is_empty() {
            let _ = writeln!(text, "\n{head}:");
            for line in lines {
                let _ = writeln!(text, "  {line}");
            }
        }
    }
    text
}

fn summary(text: &mut String, report: &Report) {
    let stages: Vec<String> = (report.summary.stages.iter())
        .map(|(stage, pods)| format!("{pods} {stage}"))
        .collect();
    let enrolled = if stages.is_empty() {
        "none under Podveil".to_owned()
    } else {
        stages.join(", ")
    };
    let _ = writeln!(
        text,
        "Pods: {enrolled}; {} not asked for",
        report.summary.not_enrolled
    );
    if let Some(ca) = &report.ca {
        let _ = writeln!(
            text,
            "CA: trust domain {}, bundle {}, certificate generation {}, {} connected",
            ca.trust_domain,
            ca.bundle_sequence,
            ca.certificate_generation,
            count(ca.consumers.len(), "program"),
        );
        for authority in &ca.authorities {
            let _ = writeln!(text, "    {}", self::authority(authority));
        }
    }
    if let Some(reserve) = &report.reserve {
        let _ = writeln!(
            text,
            "If everything went away now, new connections would work for {} h: until {}, when the certificate of {} on {} \
             ends",
            reserve.hours,
            utc(reserve.until.0),
            reserve.identity,
            reserve.node,
        );
    }
}

/// The CA alone, for `--socket`.
pub fn ca(status: &CaStatus) -> String {
    let mut text = format!(
        "trust domain {}, bundle {}, certificate generation {}\n",
        status.trust_domain, status.bundle_sequence, status.certificate_generation
    );
    for authority in &status.authorities {
        let _ = writeln!(text, "{}", self::authority(authority));
    }
    for consumer in &status.consumers {
        let module = match consumer.module.as_str() {
            "" => String::new(),
            module => format!(" ({module})"),
        };
        let _ = writeln!(
            text,
            "{}{module}: bundle {}, certificate generation {}",
            consumer.spiffe_id, consumer.bundle_sequence, consumer.certificate_generation
        );
    }
    text
}

fn authority(authority: &crate::ca::Authority) -> String {
    let kind = if authority.root {
        "root"
    } else {
        "intermediate"
    };
    let issuing = if authority.issuing { ", issuing" } else { "" };
    format!(
        "{kind:<12} {} serial {} until {}{issuing}",
        authority.subject,
        authority.serial,
        utc(authority.ends())
    )
}

fn node_cells(node: &Node) -> [String; 7] {
    [
        node.name.clone(),
        module(&node.proxy),
        module(&node.redirect),
        node.back_end.clone(),
        node.pods.to_string(),
        node.version.clone(),
        node.waiting_for.join("; "),
    ]
}

fn module(module: &Module) -> String {
    match module.state {
        ModuleState::Connected if module.current => "connected".to_owned(),
        ModuleState::Connected => "catching up".to_owned(),
        ModuleState::Silent => format!(
            "silent {}",
            age(Duration::from_secs(module.heard_seconds_ago))
        ),
        ModuleState::Disconnected => "disconnected".to_owned(),
        ModuleState::Unknown => String::new(),
    }
}

fn pod_cells(pod: &Pod) -> [String; 8] {
    let connections = match (pod.connections_captured, pod.connections_older) {
        (0, 0) => String::new(),
        (captured, 0) => captured.to_string(),
        (captured, older) => format!("{captured} + {older} older"),
    };
    let mut why: Vec<&str> = vec![&pod.reason];
    why.extend(pod.conditions.iter().map(String::as_str));
    why.retain(|one| !one.is_empty());
    [
        format!("{}/{}", pod.namespace, pod.name),
        pod.node.clone(),
        pod.stage.clone(),
        pod.mode.clone(),
        pod.certificate.as_ref().map(held).unwrap_or_default(),
        capture(pod),
        connections,
        why.join("; "),
    ]
}

fn capture(pod: &Pod) -> String {
    let Some(back_end) = pod.capture.as_ref().and_then(|one| one.back_end.as_deref()) else {
        return String::new();
    };
    let of = |seconds| age(Duration::from_secs(seconds));
    match (pod.captured_seconds, pod.verified_seconds_ago) {
        (Some(since), Some(verified)) => {
            format!(
                "{back_end} for {}, verified {} ago",
                of(since),
                of(verified)
            )
        }
        _ => back_end.to_owned(),
    }
}

fn held(held: &Held) -> String {
    let of = |seconds| age(Duration::from_secs(seconds));
    format!(
        "{} old, {} left",
        of(held.age_seconds),
        of(held.left_seconds)
    )
}
