// SPDX-License-Identifier: Apache-2.0
//! The explanation: the rules of both ends, asked about a connection that nobody has opened.

use crate::cluster::pages::{ControllerWorkload, ProxyPage};
use podveil_inbound::rules::{self, Facts, Moment};
use podveil_model::{
    Answer, OriginalDst, PlainReason, Stage, Uid, Upstream, Workload, check_target,
};
use podveil_outbound::check_plain;
use podveil_state::View;
use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::Arc;

/// What is asked about.
#[derive(Debug)]
pub struct Ends<'a> {
    /// What the source's node knows.
    pub view: &'a View,
    pub page: &'a ProxyPage,
    /// The source, as the controller sees it.
    pub source: &'a ControllerWorkload,
    /// What the application dials.
    pub destination: OriginalDst,
}

#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Explanation {
    pub source: String,
    pub destination: String,
    pub verdict: Verdict,
    /// In the order in which they are decided. The last one decides.
    pub steps: Vec<Step>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// In a tunnel, encrypted and authenticated.
    Tunnel,
    /// Through the proxy, in plain.
    Plain,
    /// Past the proxy, as if Podveil were not there.
    Direct,
    Refused,
}

#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Step {
    pub what: String,
    /// The object or setting that decides.
    pub by: String,
}

/// Steps so far; the verdict ends them.
#[derive(Debug, Default)]
struct Steps(Vec<Step>);

impl Steps {
    fn add(&mut self, what: impl Into<String>, by: impl Into<String>) {
        self.0.push(Step {
            what: what.into(),
            by: by.into(),
        });
    }
}

impl Ends<'_> {
    /// Workloads that the connection may end at, whose nodes have a say.
    pub fn candidates(&self) -> impl Iterator<Item = Arc<Workload>> {
        let source = self.view.by_uid(&Uid::from(self.source.uid.as_str()));
        let upstreams = match source.map(|source| self.view.resolve(source, self.destination)) {
            Some(Answer::Enrolled(upstreams) | Answer::Plain { upstreams, .. }) => upstreams,
            _ => Vec::new(),
        };
        upstreams.into_iter().map(|upstream| upstream.workload)
    }
}

/// `others`: what the nodes of the destinations know, by node; what the source's node knows stands in for one that
/// could not be asked.
pub fn explain(ends: &Ends<'_>, uid: &Uid, others: &BTreeMap<String, View>) -> Explanation {
    let mut steps = Steps::default();
    let verdict = decide(ends, uid, others, &mut steps);
    Explanation {
        source: format!("{}/{}", ends.source.namespace, ends.source.name),
        destination: ends.destination.to_string(),
        verdict,
        steps: steps.0,
    }
}

fn decide(
    ends: &Ends<'_>,
    uid: &Uid,
    others: &BTreeMap<String, View>,
    steps: &mut Steps,
) -> Verdict {
    let source_name = format!("pod {}/{}", ends.source.namespace, ends.source.name);
    let Some(source) = ends.view.by_uid(uid) else {
        steps.add(
            "its own node does not know this pod: a captured connection is held, then refused (workload_not_known)",
            format!("node {}", ends.source.node),
        );
        return Verdict::Refused;
    };
    if let Some(direct) = not_captured(ends, source) {
        steps.add(direct.what, direct.by);
        return direct_to(ends, source, others, steps);
    }
    steps.add(
        format!("the source is captured: {}", source.stage),
        format!("{source_name} on node {}", source.node),
    );
    if let Err(why) = check_target(ends.destination.0) {
        steps.add(
            format!("{} is never dialled: {why} (bad_target)", ends.destination),
            "a fixed rule",
        );
        return Verdict::Refused;
    }
    let answer = ends.view.resolve(source, ends.destination);
    meaning(ends, &answer, steps);
    if let Err(refused) = check_plain(ends.view, source, ends.destination, &answer) {
        steps.add(
            refused.to_string(),
            format!(
                "namespace {}: its mode, and what it may reach outside",
                source.namespace()
            ),
        );
        return Verdict::Refused;
    }
    match answer {
        Answer::Enrolled(upstreams) => {
            if let Err(why) = certificate(ends, source) {
                steps.add(
                    format!("the source has no certificate: the connection is held, then refused (certificate_missing): {why}"),
                    format!("the CA, for {}", source.identity),
                );
                return Verdict::Refused;
            }
            let proved = rules::Source::Proved {
                identity: source.identity.clone(),
                uid: uid.clone(),
            };
            at_destination(
                ends,
                source,
                &upstreams,
                &proved,
                others,
                Verdict::Tunnel,
                steps,
            )
        }
        Answer::Plain { upstreams, .. } => {
            let plain = rules::Source::Plain;
            at_destination(
                ends,
                source,
                &upstreams,
                &plain,
                others,
                Verdict::Plain,
                steps,
            )
        }
        Answer::Outside => Verdict::Plain,
        Answer::NotKnown(_) => Verdict::Refused,
    }
}

/// Why a connection of this pod does not meet the proxy, if it does not.
fn not_captured(ends: &Ends<'_>, source: &Workload) -> Option<Step> {
    let pod = format!("pod {}/{}", ends.source.namespace, ends.source.name);
    if matches!(source.stage, Stage::None | Stage::Draining) {
        let why = match ends.source.reason.as_str() {
            "" if source.stage == Stage::None => "nobody asked to enrol it",
            "" => "it is on its way out",
            reason => reason,
        };
        return Some(Step {
            what: format!("the source is not captured: {why}"),
            by: format!(
                "the label io.cilium/mtls-enabled of namespace {} or of {pod}",
                ends.source.namespace
            ),
        });
    }
    let held = ends.page.workload_state.get(&ends.source.uid);
    if held.is_none_or(|held| held.state != "Up") {
        let reason = held.and_then(|held| held.reason.as_deref());
        let why = reason.unwrap_or(ends.source.reason.as_str());
        return Some(Step {
            what: format!("the source is not captured yet: {why}"),
            by: format!("node {}", ends.source.node),
        });
    }
    let port = ends.destination.port();
    source.exclude_outbound_ports.contains(&port).then(|| Step {
        what: format!("port {port} is left out of the source's capture"),
        by: format!("annotation podveil.io/exclude-outbound-ports of {pod}"),
    })
}

/// A connection that nobody captures, to where it ends.
fn direct_to(
    ends: &Ends<'_>,
    source: &Workload,
    others: &BTreeMap<String, View>,
    steps: &mut Steps,
) -> Verdict {
    match ends.view.resolve(source, ends.destination) {
        Answer::Enrolled(upstreams) | Answer::Plain { upstreams, .. } => {
            let plain = rules::Source::Plain;
            at_destination(
                ends,
                source,
                &upstreams,
                &plain,
                others,
                Verdict::Direct,
                steps,
            )
        }
        Answer::Outside | Answer::NotKnown(_) => Verdict::Direct,
    }
}

/// What the dialled address means.
fn meaning(ends: &Ends<'_>, answer: &Answer, steps: &mut Steps) {
    let dialled = ends.destination;
    match answer {
        Answer::Enrolled(upstreams) | Answer::Plain { upstreams, .. } => {
            let (what, by) = match upstreams.first().and_then(|one| one.service.as_ref()) {
                Some(service) => (
                    format!("{dialled} is a service; its endpoint is chosen here, e.g. {}", endpoint(&upstreams[0])),
                    format!("service {service}"),
                ),
                None => (
                    format!("{dialled} is {}", upstreams.first().map(endpoint).unwrap_or_default()),
                    upstreams.first().map(|one| pod(&one.workload)).unwrap_or_default(),
                ),
            };
            steps.add(what, by);
            if let (Answer::Plain { reason, .. }, Some(upstream)) = (answer, upstreams.first()) {
                match reason {
                    PlainReason::NotEnrolled => steps.add(
                        "it is known and takes no tunnels: plain",
                        format!("{}, stage {}", pod(&upstream.workload), upstream.workload.stage),
                    ),
                    PlainReason::PortExcluded => steps.add(
                        format!("port {} is left out of its capture: plain", upstream.address.port()),
                        format!("annotation podveil.io/exclude-inbound-ports of {}", pod(&upstream.workload)),
                    ),
                }
            }
        }
        Answer::Outside => steps.add(
            format!("{dialled} is nobody's in the cluster: plain to that address"),
            "the ranges of pods and services, and those listed as plain",
        ),
        Answer::NotKnown(unresolved) => steps.add(
            format!("{unresolved}: the connection is held while it may become known, then refused; it never goes in plain"),
            "the state of the source's node",
        ),
    }
}

fn certificate(ends: &Ends<'_>, source: &Workload) -> Result<(), String> {
    let identity = source.identity.to_string();
    let held = ends
        .page
        .certificates
        .iter()
        .find(|one| one.identity == identity);
    match held {
        Some(held) if held.leaf().is_some() => Ok(()),
        Some(held) => Err(held
            .last_error
            .clone()
            .unwrap_or_else(|| "on its way".to_owned())),
        None => Err("not asked for yet".to_owned()),
    }
}

/// The rules of each endpoint that may be chosen. They usually say the same; the first one's word is the verdict, and one
/// that differs is told.
fn at_destination(
    ends: &Ends<'_>,
    source: &Workload,
    upstreams: &[Upstream],
    proved: &rules::Source,
    others: &BTreeMap<String, View>,
    verdict: Verdict,
    steps: &mut Steps,
) -> Verdict {
    let mut verdicts = Vec::new();
    for upstream in upstreams {
        let step = inbound(ends, source, upstream, proved, others);
        let (refused, step) = match step {
            Ok(step) => (false, step),
            Err(step) => (true, step),
        };
        if verdicts.is_empty() || verdicts[0] != refused {
            steps.0.push(step);
        }
        verdicts.push(refused);
    }
    match verdicts.first() {
        Some(true) => Verdict::Refused,
        _ => verdict,
    }
}

/// # Errors
/// The step that refuses.
fn inbound(
    ends: &Ends<'_>,
    source: &Workload,
    upstream: &Upstream,
    proved: &rules::Source,
    others: &BTreeMap<String, View>,
) -> Result<Step, Step> {
    let workload = &upstream.workload;
    let node = workload.node.as_str();
    let view = if node == ends.source.node {
        Some(ends.view)
    } else {
        others.get(node)
    };
    let told_by = |text: String| match view {
        Some(_) => text,
        None => format!("{text} (as the source's node knows it: node {node} could not be asked)"),
    };
    if workload.host_network || !workload.stage.wants_capture() && workload.stage != Stage::Draining
    {
        return Ok(Step {
            what: format!(
                "{} is not captured: nothing of ours decides there",
                endpoint(upstream)
            ),
            by: pod(workload),
        });
    }
    let Some(source_ip) = source.address_like(upstream.address.ip()) else {
        return Err(Step {
            what: format!(
                "the source has no address of the family of {}",
                upstream.address
            ),
            by: pod(source),
        });
    };
    let facts = Facts {
        uid: workload.uid.clone(),
        source_ip,
        source: proved.clone(),
        destination: upstream.address,
    };
    match rules::check(view.unwrap_or(ends.view), &facts, Moment::Opening) {
        Ok(allowed) => Ok(Step {
            what: told_by(match proved {
                rules::Source::Proved { identity, .. } => {
                    format!("{} takes it from {identity}", endpoint(upstream))
                }
                _ => format!("{} takes it in plain", endpoint(upstream)),
            }),
            by: allowed_by(&allowed),
        }),
        Err(refused) => Err(Step {
            what: told_by(format!(
                "{} refuses it: {refused} ({})",
                endpoint(upstream),
                refused.reason()
            )),
            by: refused_by(&refused, workload),
        }),
    }
}

fn allowed_by(allowed: &rules::Allowed) -> String {
    match allowed.verdict() {
        podveil_flow::Verdict::Allowed { rule: Some(rule) } => format!("policy {rule}"),
        _ => "no policy applies: what is not denied is allowed".to_owned(),
    }
}

fn refused_by(refused: &rules::Refused, workload: &Workload) -> String {
    use podveil_policy::Denied;
    use rules::Refused;
    match refused {
        Refused::Policy(Denied::Explicit { policy, rule }) => {
            format!("policy {policy} rule {rule}")
        }
        Refused::Policy(Denied::NotAllowed { policies }) => {
            let names: Vec<_> = policies
                .iter()
                .map(|policy| format!("policy {policy}"))
                .collect();
            names.join(", ")
        }
        Refused::Policy(Denied::Unknown { policy }) => format!("policy {policy}"),
        Refused::Strict => format!(
            "label podveil.io/mode of namespace {}",
            workload.namespace()
        ),
        _ => pod(workload),
    }
}

fn pod(workload: &Workload) -> String {
    format!("pod {}/{}", workload.namespace(), workload.name)
}

fn endpoint(upstream: &Upstream) -> String {
    format!("{} at {}", pod(&upstream.workload), upstream.address)
}

#[cfg(test)]
#[path = "decide_tests.rs"]
mod tests;
