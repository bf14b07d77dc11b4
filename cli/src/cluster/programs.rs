// SPDX-License-Identifier: Apache-2.0
//! Which pods are Podveil's programs. They are told by their ServiceAccount, which is what the CA knows them by too.

use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use serde::Serialize;

/// Podveil's own programs, by where they run.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Program {
    Ca,
    Controller,
    Node,
}

impl Program {
    pub const ALL: [Self; 3] = [Self::Ca, Self::Controller, Self::Node];

    /// Also the name of its workload object.
    pub fn service_account(self) -> &'static str {
        match self {
            Self::Ca => "podveil-ca",
            Self::Controller => "podveil-controller",
            Self::Node => "podveil-node",
        }
    }
}

/// One pod of a program.
#[derive(Clone, Debug, Serialize)]
pub struct ProgramPod {
    pub program: Program,
    pub name: String,
    pub node: Option<String>,
    pub ready: bool,
    /// Why it is not ready, as far as its containers say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waiting: Option<String>,
    pub restarts: i32,
    /// The image's tag.
    pub version: String,
    /// The first container: where a command is run.
    #[serde(skip)]
    pub container: Option<String>,
}

/// All pods of Podveil's programs, by name.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Programs(pub Vec<ProgramPod>);

impl ProgramPod {
    /// `None`: not one of ours, or finished.
    pub fn from_pod(pod: &Pod) -> Option<Self> {
        let spec = pod.spec.as_ref()?;
        let account = spec.service_account_name.as_deref()?;
        let program = Program::ALL
            .into_iter()
            .find(|program| program.service_account() == account)?;
        let status = pod.status.as_ref();
        let phase = status.and_then(|status| status.phase.as_deref());
        if matches!(phase, Some("Succeeded" | "Failed")) {
            return None;
        }
        let containers = status
            .and_then(|status| status.container_statuses.as_deref())
            .unwrap_or_default();
        let ready = status
            .and_then(|status| status.conditions.as_deref())
            .unwrap_or_default()
            .iter()
            .any(|condition| condition.type_ == "Ready" && condition.status == "True");
        Some(Self {
            program,
            name: pod.metadata.name.clone()?,
            node: spec.node_name.clone(),
            ready,
            waiting: (!ready).then(|| waiting(pod, containers)),
            restarts: containers.iter().map(|one| one.restart_count).sum(),
            version: spec
                .containers
                .first()
                .and_then(|container| container.image.as_deref())
                .map_or_else(|| "?".to_owned(), |image| tag(image).to_owned()),
            container: spec
                .containers
                .first()
                .map(|container| container.name.clone()),
        })
    }
}

impl Programs {
    pub fn new(mut pods: Vec<ProgramPod>) -> Self {
        pods.sort_by(|a, b| (a.program, &a.node, &a.name).cmp(&(b.program, &b.node, &b.name)));
        Self(pods)
    }

    pub fn of(&self, program: Program) -> impl Iterator<Item = &ProgramPod> {
        self.0.iter().filter(move |pod| pod.program == program)
    }

    /// The node program on this node: the ready one during an update that has two.
    pub fn on_node(&self, node: &str) -> Option<&ProgramPod> {
        let here = |pod: &&ProgramPod| pod.node.as_deref() == Some(node);
        let mut ready = self.of(Program::Node).filter(here).filter(|pod| pod.ready);
        ready.next().or_else(|| self.of(Program::Node).find(here))
    }

    /// Ready replicas first: whoever asks goes from one to the next.
    pub fn controllers(&self) -> Vec<&ProgramPod> {
        let mut replicas: Vec<_> = self.of(Program::Controller).collect();
        replicas.sort_by_key(|pod| !pod.ready);
        replicas
    }

    /// The replica that the Lease names, else any that is ready.
    pub fn ca_replica(&self, holder: Option<&str>) -> Option<&ProgramPod> {
        let mut replicas = self.of(Program::Ca);
        replicas
            .find(|pod| holder == Some(pod.name.as_str()))
            .or_else(|| self.of(Program::Ca).find(|pod| pod.ready))
            .or_else(|| self.of(Program::Ca).next())
    }
}

/// What comes after the last `:` of an image's name, if that is a tag and not a registry's port.
fn tag(image: &str) -> &str {
    let image = image.split('@').next().unwrap_or(image);
    match image.rsplit_once(':') {
        Some((_, tag)) if !tag.contains('/') => tag,
        _ => "latest",
    }
}

fn waiting(pod: &Pod, containers: &[ContainerStatus]) -> String {
    let reason = |one: &ContainerStatus| {
        let state = one.state.as_ref()?;
        let (reason, message) = match (&state.waiting, &state.terminated) {
            (Some(waiting), _) => (waiting.reason.as_deref(), waiting.message.as_deref()),
            (None, Some(ended)) => (ended.reason.as_deref(), ended.message.as_deref()),
            (None, None) => return (!one.ready).then(|| format!("{} is not ready", one.name)),
        };
        let message = message.map(|text| format!(": {text}")).unwrap_or_default();
        Some(format!(
            "{}: {}{message}",
            one.name,
            reason.unwrap_or("waiting")
        ))
    };
    if pod.metadata.deletion_timestamp.is_some() {
        return "is being deleted".to_owned();
    }
    let status = pod.status.as_ref();
    let scheduled = status
        .and_then(|status| status.conditions.as_deref())
        .unwrap_or_default()
        .iter()
        .find(|condition| condition.type_ == "PodScheduled" && condition.status == "False");
    if let Some(condition) = scheduled {
        let message = condition.message.as_deref().unwrap_or("no node takes it");
        return format!("not scheduled: {message}");
    }
    let reasons: Vec<_> = containers.iter().filter_map(reason).collect();
    if reasons.is_empty() {
        "starting".to_owned()
    } else {
        reasons.join("; ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn pod(account: &str, name: &str, node: &str, status: Value) -> Option<ProgramPod> {
        let pod = json!({
            "metadata": { "name": name, "namespace": "podveil-system" },
            "spec": {
                "serviceAccountName": account,
                "nodeName": node,
                "containers": [{ "name": "main", "image": "registry:5000/podveil/node:0.1.0" }],
            },
            "status": status,
        });
        ProgramPod::from_pod(&serde_json::from_value(pod).unwrap())
    }

    fn ready() -> Value {
        json!({ "phase": "Running", "conditions": [{ "type": "Ready", "status": "True" }] })
    }

    #[test]
    fn programs_are_told_by_their_service_account() {
        assert!(pod("default", "a", "n1", ready()).is_none());
        assert!(pod("podveil-node", "a", "n1", json!({ "phase": "Failed" })).is_none());
        let node = pod("podveil-node", "a", "n1", ready()).unwrap();
        assert_eq!((node.program, node.ready), (Program::Node, true));
        assert_eq!(node.version, "0.1.0");
    }

    #[test]
    fn a_pod_that_is_not_ready_says_why() {
        let container = |state: Value| {
            json!({ "phase": "Running", "containerStatuses": [
                { "name": "proxy", "ready": false, "restartCount": 3, "image": "", "imageID": "", "state": state },
            ] })
        };
        for (status, why) in [
            (
                container(
                    json!({ "waiting": { "reason": "ImagePullBackOff", "message": "no such image" } }),
                ),
                "proxy: ImagePullBackOff: no such image",
            ),
            (container(json!({ "running": {} })), "proxy is not ready"),
            (
                json!({ "phase": "Pending", "conditions": [
                    { "type": "PodScheduled", "status": "False", "message": "0/2 nodes are available" },
                ] }),
                "not scheduled: 0/2 nodes are available",
            ),
            (json!({ "phase": "Pending" }), "starting"),
        ] {
            let pod = pod("podveil-node", "a", "n1", status).unwrap();
            assert_eq!(pod.waiting.as_deref(), Some(why));
        }
    }

    #[test]
    fn the_acting_ca_is_whom_the_lease_names() {
        let ca = |name, status| pod("podveil-ca", name, "n1", status).unwrap();
        let starting = json!({ "phase": "Pending" });
        let programs = Programs::new(vec![ca("a", starting), ca("b", ready()), ca("c", ready())]);
        let chosen = |holder| programs.ca_replica(holder).unwrap().name.clone();
        assert_eq!(chosen(Some("c")), "c");
        assert_eq!(chosen(Some("gone")), "b");
        assert_eq!(chosen(None), "b");
        assert!(Programs::default().ca_replica(None).is_none());
    }

    #[test]
    fn tags_of_images() {
        for (image, version) in [
            ("podveil/node:0.1.0", "0.1.0"),
            ("registry:5000/podveil/node", "latest"),
            ("podveil/node:0.1.0@sha256:0123", "0.1.0"),
        ] {
            assert_eq!(tag(image), version, "{image}");
        }
    }
}
