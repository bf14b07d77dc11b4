// SPDX-License-Identifier: Apache-2.0
//! When each step towards a pod's first tunnel was taken, by what the programs write to their logs.

use crate::Cluster;
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::SystemTime;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Steps in the order in which they are taken: who writes the line, its message, and a field with its value.
const STEPS: [(&str, Line); 7] = [
    ("wanted, as the controller says", Line::stage("wanted")),
    (
        "its network namespace is found",
        Line::redirect("a pod's namespace is found"),
    ),
    (
        "the proxy serves it",
        Line::new("podveil-node", "proxy", "a pod is served", None),
    ),
    (
        "its capture is written",
        Line::redirect("a pod's rules are written"),
    ),
    (
        "its node holds it ready",
        Line::new(
            "podveil-node",
            "redirect",
            "pod",
            Some(("condition", "ready")),
        ),
    ),
    ("announced", Line::stage("announced")),
    ("mandatory", Line::stage("mandatory")),
];

#[derive(Clone, Copy)]
struct Line {
    component: &'static str,
    container: &'static str,
    message: &'static str,
    field: Option<(&'static str, &'static str)>,
}

impl Line {
    const fn new(
        component: &'static str,
        container: &'static str,
        message: &'static str,
        field: Option<(&'static str, &'static str)>,
    ) -> Self {
        Self {
            component,
            container,
            message,
            field,
        }
    }

    const fn redirect(message: &'static str) -> Self {
        Self::new("podveil-node", "redirect", message, None)
    }

    const fn stage(stage: &'static str) -> Self {
        let component = "podveil-controller";
        Self::new(
            component,
            "controller",
            "enrolment stage",
            Some(("stage", stage)),
        )
    }

    fn is(&self, object: &Value) -> bool {
        object["message"] == self.message
            && self.field.is_none_or(|(name, value)| object[name] == value)
    }
}

/// Of each step and pod, when it was first taken.
#[derive(Debug)]
pub struct Stages(Vec<(&'static str, BTreeMap<String, SystemTime>)>);

impl Stages {
    /// # Errors
    /// If the logs cannot be read.
    pub fn read(cluster: &Cluster) -> anyhow::Result<Self> {
        let mut logs: BTreeMap<&str, Vec<Value>> = BTreeMap::new();
        for (_, line) in STEPS {
            if logs.contains_key(line.container) {
                continue;
            }
            let selector = format!("--selector=app.kubernetes.io/component={}", line.component);
            let container = format!("--container={}", line.container);
            let own = "--namespace=podveil-system";
            let text = cluster.kubectl(&[own, "logs", &selector, &container, "--tail=-1"])?;
            let lines = text
                .lines()
                .filter_map(|line| serde_json::from_str(line).ok());
            logs.insert(line.container, lines.collect());
        }
        let steps = STEPS.map(|(name, line)| {
            let mut first: BTreeMap<String, SystemTime> = BTreeMap::new();
            let lines = logs.get(line.container).into_iter().flatten();
            for object in lines.filter(|object| line.is(object)) {
                let (Some(uid), Some(at)) = (object["uid"].as_str(), time(object)) else {
                    continue;
                };
                let held = first.entry(uid.to_owned()).or_insert(at);
                *held = at.min(*held);
            }
            (name, first)
        });
        Ok(Self(steps.into()))
    }

    /// Each step with its distance from the pod's moment in `moments` (by uid), in ms and sorted; what was done before that
    /// is negative.
    pub fn since(&self, moments: &BTreeMap<String, SystemTime>) -> Vec<(&'static str, Vec<f64>)> {
        let distance = |at: &SystemTime, from: &SystemTime| match at.duration_since(*from) {
            Ok(after) => after.as_secs_f64() * 1e3,
            Err(before) => -before.duration().as_secs_f64() * 1e3,
        };
        (self.0.iter())
            .map(|(name, first)| {
                let mut all: Vec<f64> = (moments.iter())
                    .filter_map(|(uid, from)| Some(distance(first.get(uid)?, from)))
                    .collect();
                all.sort_by(f64::total_cmp);
                (*name, all)
            })
            .collect()
    }
}

/// The node programs and the others name it differently.
fn time(object: &Value) -> Option<SystemTime> {
    let text = object["time"].as_str().or(object["timestamp"].as_str())?;
    Some(OffsetDateTime::parse(text, &Rfc3339).ok()?.into())
}
