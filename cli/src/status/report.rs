// SPDX-License-Identifier: Apache-2.0
//! What `status` says, as data: pure functions over what the programs answered.

use crate::ca::CaStatus;
use crate::cluster::pages::{
    CapturedPod, Certificate, ControllerModule, ControllerPage, ControllerWorkload, ProxyPage, When,
};
use crate::cluster::{Answered, Installation, Program};
use crate::failure::Failure;
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    pub ca: Option<CaStatus>,
    pub summary: Summary,
    pub reserve: Option<Reserve>,
    pub nodes: Vec<Node>,
    pub pods: Vec<Pod>,
    /// What could not be taken as it was written, apart from single pods.
    pub conditions: Vec<String>,
    /// Who could not be asked, and why.
    pub unanswered: Vec<String>,
}

/// Of all pods, whatever the filter.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Summary {
    /// Pods by stage; without those that nobody asked to enrol.
    pub stages: BTreeMap<String, usize>,
    pub not_enrolled: usize,
}

/// How long new connections would go on to work if the API server, the CA and the controller went away now: until the
/// first certificate ends.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Reserve {
    pub hours: u64,
    pub until: When,
    /// Whose certificate ends first.
    pub identity: String,
    pub node: String,
}

#[derive(Clone, Debug, Serialize)]
pub struct Node {
    pub name: String,
    pub version: String,
    pub proxy: Module,
    pub redirect: Module,
    /// What it captures new pods with; empty where that is not known.
    pub back_end: String,
    /// Pods under Podveil.
    pub pods: usize,
    /// What it is not ready for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub waiting_for: Vec<String>,
}

/// One program of a node, as the controller hears it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Module {
    pub state: ModuleState,
    pub heard_seconds_ago: u64,
    /// It lacks nothing that anybody waits for.
    pub current: bool,
    pub bundle_sequence: u64,
    pub certificate_generation: u64,
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ModuleState {
    Connected,
    /// Not heard for so long that nobody waits for it.
    Silent,
    /// Not connected to the replica that was asked.
    Disconnected,
    /// The controller does not know it, or does not answer.
    #[default]
    Unknown,
}

#[derive(Clone, Debug, Serialize)]
pub struct Pod {
    pub namespace: String,
    pub name: String,
    pub node: String,
    pub identity: String,
    pub stage: String,
    pub mode: String,
    /// Why it is not captured, or what the next stage waits for.
    pub reason: String,
    pub conditions: Vec<String>,
    pub certificate: Option<Held>,
    pub connections_older: u32,
    pub connections_captured: u32,
    /// What its own node says about its capture.
    pub capture: Option<CapturedPod>,
    /// How long ago that capture began, and was verified.
    pub captured_seconds: Option<u64>,
    pub verified_seconds_ago: Option<u64>,
}

/// A certificate on a pod's own node.
#[derive(Clone, Debug, Serialize)]
pub struct Held {
    pub age_seconds: u64,
    pub left_seconds: u64,
    pub generation: u64,
}

/// Which pods are shown.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    namespace: Option<String>,
    pod: Option<String>,
    all: bool,
}

impl Filter {
    /// `of`: a namespace, or `namespace/pod`. What is named is shown whether it is enrolled or not.
    pub fn new(of: Option<&str>, all: bool) -> Self {
        let (namespace, pod) =
            match of.map(|of| of.split_once('/').map_or((of, None), |(a, b)| (a, Some(b)))) {
                Some((namespace, pod)) => (Some(namespace.to_owned()), pod.map(str::to_owned)),
                None => (None, None),
            };
        Self {
            all: all || pod.is_some(),
            namespace,
            pod,
        }
    }

    /// # Errors
    /// If the controller knows no pod by the name that was given: an empty answer would look like a good one.
    pub fn known(&self, controller: &ControllerPage) -> Result<(), Failure> {
        let Some(namespace) = &self.namespace else {
            return Ok(());
        };
        let mut there = (controller.workloads.iter()).filter(|one| one.namespace == *namespace);
        match &self.pod {
            None if there.next().is_some() => return Ok(()),
            Some(pod) if there.any(|one| one.name == *pod) => return Ok(()),
            _ => {}
        };
        let what = match &self.pod {
            None => format!("no pod is known in a namespace {namespace:?}"),
            Some(pod) => format!("no pod {pod:?} is known in a namespace {namespace:?}"),
        };
        let cure = format!(
            "`kubectl get pods -n {namespace}`; pods that have no node yet, or have finished, are not known"
        );
        Err(Failure::new(what, cure))
    }

    fn shows(&self, workload: &ControllerWorkload) -> bool {
        let named = self
            .namespace
            .as_ref()
            .is_none_or(|one| *one == workload.namespace)
            && self.pod.as_ref().is_none_or(|one| *one == workload.name);
        named && (self.all || workload.is_asked_for())
    }
}

pub fn report(installation: &Installation, filter: &Filter, now: SystemTime) -> Report {
    let none = ControllerPage::default();
    let controller = installation.controller.as_ref().unwrap_or(&none);
    let mut pods: Vec<Pod> = (controller.workloads.iter())
        .filter(|workload| filter.shows(workload))
        .map(|workload| pod(workload, installation, now))
        .collect();
    pods.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
    Report {
        ca: installation.ca.as_ref().ok().cloned(),
        summary: summary(controller),
        reserve: reserve(&installation.proxies, now),
        nodes: nodes(installation, controller),
        pods,
        conditions: conditions(controller, installation),
        unanswered: unanswered(installation),
    }
}

fn summary(controller: &ControllerPage) -> Summary {
    let mut summary = Summary::default();
    for workload in &controller.workloads {
        if workload.is_asked_for() {
            *summary.stages.entry(workload.stage.clone()).or_default() += 1;
        } else {
            summary.not_enrolled += 1;
        }
    }
    summary
}

/// Every certificate counts that stands for a pod, whatever its age.
pub fn reserve(
    proxies: &BTreeMap<String, Answered<ProxyPage>>,
    now: SystemTime,
) -> Option<Reserve> {
    let leaves = proxies.iter().flat_map(|(node, page)| {
        let certificates = page.iter().flat_map(|page| &page.certificates);
        certificates.filter_map(move |certificate| {
            let leaf = certificate.leaf()?;
            Some((leaf.expiration_time, &certificate.identity, node))
        })
    });
    let (until, identity, node) = leaves.min()?;
    Some(Reserve {
        hours: until.left(now).as_secs() / 3600,
        until,
        identity: identity.clone(),
        node: node.clone(),
    })
}

fn nodes(installation: &Installation, controller: &ControllerPage) -> Vec<Node> {
    let mut names: Vec<&str> = (controller.nodes.iter().map(|node| node.name.as_str()))
        .chain(
            installation
                .programs
                .of(Program::Node)
                .filter_map(|pod| pod.node.as_deref()),
        )
        .collect();
    names.sort_unstable();
    names.dedup();
    names
        .into_iter()
        .map(|name| node(name, installation, controller))
        .collect()
}

fn node(name: &str, installation: &Installation, controller: &ControllerPage) -> Node {
    let heard = controller.nodes.iter().find(|node| node.name == name);
    let module = |which: &str| {
        let modules = heard.map(|node| node.modules.as_slice());
        let module = modules
            .unwrap_or_default()
            .iter()
            .find(|one| one.module == which);
        module.map_or_else(Module::default, self::module)
    };
    let page = installation
        .proxies
        .get(name)
        .and_then(|page| page.as_ref().ok());
    let program = installation.programs.on_node(name);
    let redirect = installation.redirects.get(name);
    let back_end = redirect.and_then(|page| page.as_ref().ok()?.back_end.as_ref());
    Node {
        version: match (page, program) {
            (Some(page), _) => page.version.version.clone(),
            (None, Some(pod)) => pod.version.clone(),
            (None, None) => String::new(),
        },
        proxy: module("proxy"),
        redirect: module("redirect"),
        back_end: back_end.map(|one| one.chosen.clone()).unwrap_or_default(),
        pods: (controller.workloads.iter())
            .filter(|workload| workload.node == name && workload.stage != "none")
            .count(),
        waiting_for: match (page, program) {
            (Some(page), _) => page.podveil.waiting_for.clone(),
            (None, Some(pod)) => pod.waiting.clone().into_iter().collect(),
            (None, None) => vec!["no pod of podveil-node runs there".to_owned()],
        },
        name: name.to_owned(),
    }
}

fn module(module: &ControllerModule) -> Module {
    Module {
        state: match (module.connected, module.silent) {
            (_, true) => ModuleState::Silent,
            (true, false) => ModuleState::Connected,
            (false, false) => ModuleState::Disconnected,
        },
        heard_seconds_ago: module.heard_seconds_ago,
        current: module.current,
        bundle_sequence: module.bundle_sequence,
        certificate_generation: module.certificate_generation,
    }
}

fn pod(workload: &ControllerWorkload, installation: &Installation, now: SystemTime) -> Pod {
    let redirect = installation.redirects.get(&workload.node);
    let redirect = redirect.and_then(|page| page.as_ref().ok());
    let capture = redirect
        .and_then(|page| page.pods.iter().find(|pod| pod.uid == workload.uid))
        .filter(|pod| pod.back_end.is_some());
    let ago = |at: Option<u64>| {
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(at?);
        Some(now.duration_since(at).unwrap_or_default().as_secs())
    };
    let page = (installation.proxies)
        .get(&workload.node)
        .and_then(|page| page.as_ref().ok());
    let certificate = page.and_then(|page| certificate(page, &workload.identity));
    Pod {
        namespace: workload.namespace.clone(),
        name: workload.name.clone(),
        node: workload.node.clone(),
        identity: workload.identity.clone(),
        stage: workload.stage.clone(),
        mode: workload.mode.clone(),
        reason: workload.reason.clone(),
        conditions: workload.conditions.clone(),
        certificate: (workload.stage != "none")
            .then(|| certificate.and_then(|certificate| held(certificate, now)))
            .flatten(),
        connections_older: workload.connections_older,
        connections_captured: workload.connections_captured,
        captured_seconds: ago(capture.and_then(|pod| pod.captured_since)),
        verified_seconds_ago: ago(capture.and_then(|pod| pod.verified)),
        capture: capture.cloned(),
    }
}

fn certificate<'a>(page: &'a ProxyPage, identity: &str) -> Option<&'a Certificate> {
    (page.certificates.iter()).find(|certificate| certificate.identity == identity)
}

fn held(certificate: &Certificate, now: SystemTime) -> Option<Held> {
    let leaf = certificate.leaf()?;
    let seconds = |duration: Duration| duration.as_secs();
    Some(Held {
        age_seconds: seconds(leaf.valid_from.since(now)),
        left_seconds: seconds(leaf.expiration_time.left(now)),
        generation: leaf.generation,
    })
}

fn conditions(controller: &ControllerPage, installation: &Installation) -> Vec<String> {
    let back_ends = installation.redirects.iter().flat_map(|(node, page)| {
        let back_end = page.as_ref().ok().and_then(|page| page.back_end.as_ref());
        let unusable = back_end.map_or(&[][..], |one| &one.unusable);
        unusable.iter().map(move |one| {
            let (back_end, feature, reason) = (&one.back_end, &one.feature, &one.reason);
            format!("{node}: {back_end} cannot be used, {feature} is missing: {reason}")
        })
    });
    let source = controller.source.error.as_ref();
    source
        .map(|error| format!("the controller's source: {error}"))
        .into_iter()
        .chain(controller.conditions.iter().cloned())
        .chain(back_ends)
        .collect()
}

fn unanswered(installation: &Installation) -> Vec<String> {
    let controller = installation.controller.as_ref().err();
    let ca = installation.ca.as_ref().err();
    let nodes = installation.proxies.iter().filter_map(|(node, page)| {
        let why = page.as_ref().err()?;
        Some(format!("the proxy on {node}: {why}"))
    });
    let redirects = installation.redirects.iter().filter_map(|(node, page)| {
        let why = page.as_ref().err()?;
        Some(format!("the redirect module on {node}: {why}"))
    });
    (controller
        .map(|why| format!("the controller: {why}"))
        .into_iter())
    .chain(ca.map(|why| format!("the CA: {why}")))
    .chain(nodes)
    .chain(redirects)
    .collect()
}

#[cfg(test)]
#[path = "report_tests.rs"]
mod tests;
