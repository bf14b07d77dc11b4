// SPDX-License-Identifier: Apache-2.0
//! Is the installation well? A pure function of what its programs answered.

use super::Finding;
use super::metrics::Counters;
use crate::ca::CaStatus;
use crate::cluster::pages::{ControllerPage, ProxyPage, RedirectPage};
use crate::cluster::{Answered, Installation, Program, ProgramPod, Programs};
use crate::output::{age, count};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

/// Below this a certificate should have been renewed long ago.
const LEAF_LEFT: Duration = Duration::from_secs(8 * 3600);
/// Enough to rotate in working hours.
const ROOT_LEFT: Duration = Duration::from_secs(30 * 24 * 3600);
const ISSUING_LEFT: Duration = Duration::from_secs(3 * 24 * 3600);
/// Of one kind of line, at most so many are told.
const TOLD: usize = 10;

pub fn judge(installation: &Installation, counters: &Counters, now: SystemTime) -> Vec<Finding> {
    let mut findings = programs(&installation.programs);
    match &installation.controller {
        Ok(page) => findings.extend(controller(page)),
        Err(why) => findings.push(Finding::problem(
            "controller",
            format!("it does not answer: {why}"),
            "nodes go on with what they know; new pods and changes wait for it",
        )),
    }
    match &installation.ca {
        Ok(status) => findings.extend(ca(status, now)),
        Err(why) => findings.push(Finding::unknown(
            "ca",
            format!("it could not be asked: {why}"),
            "exec into the CA's pod is needed for this",
        )),
    }
    for (node, page) in &installation.proxies {
        match page {
            Ok(page) => findings.extend(proxy(node, page, now)),
            Err(why) => findings.push(Finding::unknown(
                "nodes",
                format!("the proxy on {node} could not be asked: {why}"),
                format!("`kubectl get pods -o wide --field-selector spec.nodeName={node}` in Podveil's namespace"),
            )),
        }
    }
    findings.extend(plugins(&installation.redirects));
    findings.extend(refusals(counters));
    findings
}

fn programs(programs: &Programs) -> Vec<Finding> {
    let mut findings = Vec::new();
    for program in Program::ALL {
        let name = program.service_account();
        let pods: Vec<&ProgramPod> = programs.of(program).collect();
        let ready = pods.iter().filter(|pod| pod.ready).count();
        if pods.is_empty() {
            findings.push(Finding::problem(
                "programs",
                format!("no pod of {name} is there"),
                "`helm status` tells whether Podveil is installed in this namespace; `-n` names another",
            ));
        } else if ready == pods.len() {
            findings.push(Finding::good(
                "programs",
                format!("{name}: {} ready", count(ready, "pod")),
            ));
        }
        for pod in pods.iter().filter(|pod| !pod.ready).take(TOLD) {
            let place = pod
                .node
                .as_deref()
                .map(|node| format!(" on {node}"))
                .unwrap_or_default();
            findings.push(Finding::problem(
                "programs",
                format!(
                    "{}{place} is not ready: {}",
                    pod.name,
                    pod.waiting.as_deref().unwrap_or("starting")
                ),
                format!(
                    "`kubectl describe pod {0}` and `kubectl logs {0}`",
                    pod.name
                ),
            ));
        }
    }
    let versions: BTreeSet<&str> = programs.0.iter().map(|pod| pod.version.as_str()).collect();
    if versions.len() > 1 {
        let versions: Vec<_> = versions.into_iter().collect();
        findings.push(Finding::warning(
            "versions",
            format!("programs of several versions run: {}", versions.join(", ")),
            "let the upgrade end, or finish it with `helm upgrade`",
        ));
    } else if let Some(version) = versions.first() {
        findings.push(Finding::good(
            "versions",
            format!("every program is {version}"),
        ));
    }
    findings
}

fn controller(page: &ControllerPage) -> Vec<Finding> {
    let mut findings = Vec::new();
    if let Some(error) = &page.source.error {
        findings.push(Finding::problem(
            "controller",
            format!("it cannot read the newest state of the cluster: {error}"),
            "what it read before stays in use; mend what the message names",
        ));
    }
    let mut heard = 0;
    for node in &page.nodes {
        for module in &node.modules {
            if module.silent {
                findings.push(Finding::problem(
                    "nodes",
                    format!(
                        "{} on {} has been silent for {}: nobody waits for it",
                        module.module,
                        node.name,
                        age(Duration::from_secs(module.heard_seconds_ago))
                    ),
                    "its pod's log says what it waits for; the controller's address must be reachable from the node",
                ));
            } else {
                heard += 1;
            }
        }
    }
    if heard > 0 {
        findings.push(Finding::good(
            "nodes",
            format!(
                "{} of {} heard by the controller",
                count(heard, "program"),
                count(page.nodes.len(), "node")
            ),
        ));
    }
    findings.extend(pods(page));
    let mandatory = page
        .workloads
        .iter()
        .filter(|workload| workload.stage == "mandatory")
        .count();
    findings.push(Finding::good(
        "pods",
        format!("{} mandatory", count(mandatory, "pod")),
    ));
    findings.extend(page.conditions.iter().map(|condition| {
        Finding::warning(
            "settings",
            condition.clone(),
            "correct the value; until then the last good one holds, or, where none is known, the strictest",
        )
    }));
    findings
}

/// Pods that are on their way and do not get there, and pods of enrolled namespaces that are left out.
fn pods(page: &ControllerPage) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut untold = 0;
    for workload in page.workloads.iter().filter(|one| one.is_asked_for()) {
        let name = format!("{}/{}", workload.namespace, workload.name);
        let what = format!("{name} is {}: {}", workload.stage, workload.reason);
        let conditions = workload.conditions.iter().map(|condition| {
            let cure = "correct the value; until then the last good one holds";
            Finding::warning("settings", format!("{name}: {condition}"), cure)
        });
        let told = match (workload.stage.as_str(), workload.reason.as_str()) {
            (_, "") => None,
            ("none", _) => Some(Finding::note("pods", what)),
            _ => Some(Finding::warning("pods", what, "")),
        };
        for finding in conditions.chain(told) {
            if findings.len() < TOLD {
                findings.push(finding);
            } else {
                untold += 1;
            }
        }
    }
    if untold > 0 {
        findings.push(Finding::warning(
            "pods",
            format!("and {untold} more"),
            "`podveilctl status`",
        ));
    }
    findings
}

fn ca(status: &CaStatus, now: SystemTime) -> Vec<Finding> {
    let mut findings = Vec::new();
    for authority in &status.authorities {
        let left = authority.ends().duration_since(now).unwrap_or_default();
        let (kind, least, rotate) = if authority.root {
            ("root", ROOT_LEFT, "podveilctl rotate root")
        } else {
            (
                "issuing intermediate",
                ISSUING_LEFT,
                "podveilctl rotate leaf",
            )
        };
        let what = format!("{kind} {} has {} left", authority.serial, age(left));
        findings.push(if left < least {
            Finding::problem("ca", what, format!("`{rotate}`"))
        } else {
            Finding::good("ca", what)
        });
    }
    let behind: Vec<String> = (status.consumers.iter())
        .filter(|one| {
            one.bundle_sequence < status.bundle_sequence
                || one.certificate_generation < status.certificate_generation
        })
        .map(|one| format!("{} ({})", one.spiffe_id, one.module))
        .collect();
    if behind.is_empty() {
        findings.push(Finding::good(
            "ca",
            format!(
                "{} on bundle {} and certificate generation {}",
                count(status.consumers.len(), "program"),
                status.bundle_sequence,
                status.certificate_generation
            ),
        ));
    } else {
        let named = &behind[..behind.len().min(TOLD)];
        findings.push(Finding::warning(
            "ca",
            format!(
                "{} behind: {}",
                count(behind.len(), "program"),
                named.join(", ")
            ),
            "a rotation under way ends this; otherwise their logs say why",
        ));
    }
    findings
}

fn proxy(node: &str, page: &ProxyPage, now: SystemTime) -> Vec<Finding> {
    let mut findings: Vec<Finding> = (page.podveil.waiting_for.iter())
        .map(|what| Finding::warning("nodes", format!("the proxy on {node}: {what}"), ""))
        .collect();
    for certificate in &page.certificates {
        let left = certificate
            .leaf()
            .map(|leaf| leaf.expiration_time.left(now));
        let why = certificate
            .last_error
            .as_deref()
            .unwrap_or("not asked for yet");
        match left {
            Some(left) if left >= LEAF_LEFT => {}
            Some(left) => findings.push(Finding::problem(
                "certificates",
                format!(
                    "{} on {node} has {} left: {why}",
                    certificate.identity,
                    age(left)
                ),
                "the CA must be reachable from the node; `podveilctl status` shows the CA",
            )),
            None => findings.push(Finding::problem(
                "certificates",
                format!(
                    "{} on {node} has no certificate: {why}",
                    certificate.identity
                ),
                "the CA must be reachable from the node; `podveilctl status` shows the CA",
            )),
        }
    }
    if findings.is_empty() && !page.certificates.is_empty() {
        findings.push(Finding::good(
            "certificates",
            format!(
                "{node}: {} fresh",
                count(page.certificates.len(), "certificate")
            ),
        ));
    }
    findings
}

/// Nodes where the CNI plugin is wanted and does not stand, by the reason.
fn plugins(redirects: &BTreeMap<String, Answered<RedirectPage>>) -> Vec<Finding> {
    let mut missing: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (node, page) in redirects {
        if let Ok(page) = page
            && let Some(why) = page.cni_plugin.strip_prefix("not installed: ")
        {
            missing.entry(why).or_default().push(node);
        }
    }
    missing
        .into_iter()
        .map(|(why, nodes)| {
            let named = nodes[..nodes.len().min(TOLD)].join(", ");
            Finding::warning(
                "cni",
                format!("the CNI plugin is missing on {}: {named}: {why}", count(nodes.len(), "node")),
                "until it stands, new pods are plain for a moment after their start; `node.cni.enabled=false` does without it",
            )
        })
        .collect()
}

fn refusals(counters: &Counters) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (node, packets) in &counters.fence {
        findings.push(Finding::warning(
            "fence",
            format!("on {node} the fence has refused {}", count_of(*packets, "packet")),
            "in a healthy cluster it is zero: capture was late, flushed or wrong; `podveilctl config dump <node> --module \
             redirect` names the pods",
        ));
    }
    if counters.fence.is_empty() && counters.unanswered.is_empty() {
        findings.push(Finding::good("fence", "no packet was refused"));
    }
    if counters.refused.is_empty() {
        if counters.unanswered.is_empty() {
            findings.push(Finding::good("refusals", "no connection was refused"));
        }
    } else {
        let reasons: Vec<_> = (counters.refused.iter())
            .map(|(reason, connections)| format!("{connections} {reason}"))
            .collect();
        findings.push(Finding::note(
            "refusals",
            format!("since the proxies started: {}", reasons.join(", ")),
        ));
    }
    for why in counters.unanswered.iter().take(TOLD) {
        findings.push(Finding::unknown("refusals", why.clone(), ""));
    }
    findings
}

fn count_of(number: u64, one: &str) -> String {
    count(usize::try_from(number).unwrap_or(usize::MAX), one)
}

#[cfg(test)]
#[path = "installed_tests.rs"]
mod tests;
