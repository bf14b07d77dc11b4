// SPDX-License-Identifier: Apache-2.0
//! The cluster file that the controller and the CA read, as data to change and write again.

use crate::{NodeNet, PodNet};
use anyhow::Context;
use serde::Serialize;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

/// Everything about the simulated cluster.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ClusterFile {
    #[serde(skip)]
    path: PathBuf,
    pub trust_domain: String,
    pub ranges: BTreeMap<&'static str, Vec<String>>,
    pub nodes: Vec<Named>,
    pub namespaces: Vec<Namespace>,
    pub workloads: Vec<WorkloadEntry>,
    pub services: Vec<Service>,
    /// Policies in the form of `docs/configuration.md`.
    pub policies: Vec<serde_json::Value>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Named {
    pub name: String,
}

#[derive(Clone, Debug, Serialize)]
pub struct Namespace {
    pub name: String,
    pub labels: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadEntry {
    pub name: String,
    pub namespace: String,
    pub uid: String,
    pub node: String,
    pub service_account: String,
    pub addresses: Vec<IpAddr>,
    pub annotations: BTreeMap<String, String>,
    pub labels: BTreeMap<String, String>,
    pub phase: &'static str,
}

#[derive(Clone, Debug, Serialize)]
pub struct Service {
    pub name: String,
    pub namespace: String,
    pub addresses: Vec<IpAddr>,
    pub ports: Vec<ServicePort>,
    pub endpoints: Vec<String>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ServicePort {
    pub port: u16,
    pub target_port: u16,
}

const ENROLL: &str = "io.cilium/mtls-enabled";
const MODE: &str = "podveil.io/mode";

impl ClusterFile {
    /// An empty cluster of two nodes.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        let cidrs = |list: [&str; 2]| list.map(str::to_owned).to_vec();
        Self {
            path: path.into(),
            trust_domain: "cluster.local".into(),
            ranges: BTreeMap::from([
                ("pods", cidrs(["10.244.0.0/16", "fd00:10:244::/48"])),
                ("services", cidrs(["10.96.0.0/16", "fd00:10:96::/112"])),
            ]),
            nodes: ["n1", "n2"]
                .map(|name| Named { name: name.into() })
                .to_vec(),
            namespaces: Vec::new(),
            workloads: Vec::new(),
            services: Vec::new(),
            policies: Vec::new(),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn add_namespace(&mut self, name: &str, enrolled: bool) -> &mut Self {
        self.namespaces.push(Namespace {
            name: name.into(),
            labels: BTreeMap::new(),
        });
        if enrolled {
            self.label(name, ENROLL, Some("true"))
        } else {
            self
        }
    }

    /// Puts the label on a namespace, or takes it off.
    pub fn enroll(&mut self, namespace: &str, on: bool) -> &mut Self {
        self.label(namespace, ENROLL, on.then_some("true"))
    }

    pub fn strict(&mut self, namespace: &str, on: bool) -> &mut Self {
        self.label(namespace, MODE, on.then_some("strict"))
    }

    fn label(&mut self, namespace: &str, label: &str, value: Option<&str>) -> &mut Self {
        for found in self
            .namespaces
            .iter_mut()
            .filter(|found| found.name == namespace)
        {
            match value {
                Some(value) => found.labels.insert(label.into(), value.into()),
                None => found.labels.remove(label),
            };
        }
        self
    }

    /// A running pod, whose uid is the name of its network namespace.
    pub fn add_workload(
        &mut self,
        node: &NodeNet,
        pod: &PodNet,
        namespace: &str,
        name: &str,
        account: &str,
    ) -> &mut Self {
        self.workloads.push(WorkloadEntry {
            name: name.into(),
            namespace: namespace.into(),
            uid: pod.namespace.clone(),
            node: node.name.clone(),
            service_account: account.into(),
            addresses: pod.addresses.to_vec(),
            annotations: BTreeMap::new(),
            labels: BTreeMap::new(),
            phase: "Running",
        });
        self
    }

    pub fn workload_mut(&mut self, name: &str) -> Option<&mut WorkloadEntry> {
        self.workloads
            .iter_mut()
            .find(|workload| workload.name == name)
    }

    /// Writes the file in one step (JSON, which is YAML), so that a reader never sees half of it.
    ///
    /// # Errors
    /// If the folder cannot be written.
    pub fn write(&self) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(self).context("encoding the cluster file")?;
        self.write_text(&text)
    }

    /// Writes any text in its place, for tests of what a broken file does.
    ///
    /// # Errors
    /// If the folder cannot be written.
    pub fn write_text(&self, text: &str) -> anyhow::Result<()> {
        let scratch = self.path.with_extension("new");
        std::fs::write(&scratch, text).with_context(|| format!("writing {}", scratch.display()))?;
        std::fs::rename(&scratch, &self.path)
            .with_context(|| format!("renaming to {}", self.path.display()))
    }
}
