// SPDX-License-Identifier: Apache-2.0
//! From texts to one [`Cluster`]: each file by itself, then what must hold between them.

use crate::file::{self, Document, Range, Text};
use crate::{
    Cluster, Defaults, Endpoint, Namespace, Node, Phase, Pod, PolicyEntry, Ranges, ServiceEntry,
    Target, policy,
};
use ipnet::IpNet;
use podveil_identity::{KubernetesName, TrustDomain};
use podveil_model::{Balancing, EndpointPorts, ServicePort, Uid};
use serde_saphyr::Spanned;
use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What is wrong, and where.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{}:{line}: {fault}", file.display())]
pub struct ParseError {
    pub file: PathBuf,
    /// From 1; 0 where the fault is in the whole.
    pub line: u64,
    pub fault: Fault,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Fault {
    /// Not YAML, an unknown key, or a value of the wrong form; the parser's own sentence.
    Syntax(String),
    /// The same thing twice; where it stood first.
    Duplicate {
        what: &'static str,
        name: String,
        first: String,
    },
    /// A value that is well formed and means nothing.
    Invalid(String),
    /// No file names the trust domain.
    NoTrustDomain,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Syntax(sentence) | Self::Invalid(sentence) => f.write_str(sentence),
            Self::Duplicate { what, name, first } => {
                write!(f, "{what} {name} stands at {first} already")
            }
            Self::NoTrustDomain => f.write_str("trustDomain is missing"),
        }
    }
}

/// Merges files into one state. Lists are joined; what may stand only once must not differ.
///
/// # Errors
/// [`ParseError`] for the first fault, with its file and line.
pub fn parse<'a>(
    version: u64,
    files: impl IntoIterator<Item = (&'a Path, &'a str)>,
) -> Result<Cluster, ParseError> {
    let mut merge = Merge {
        version,
        ..Merge::default()
    };
    for (path, text) in files {
        let document: Document = file::read(text).map_err(|(line, sentence)| ParseError {
            file: path.to_owned(),
            line,
            fault: Fault::Syntax(sentence),
        })?;
        merge.add(path, document)?;
    }
    merge.finish()
}

/// What has been read so far, and where each thing stood.
#[derive(Default)]
struct Merge {
    version: u64,
    trust_domain: Option<(TrustDomain, String)>,
    ranges: Option<Ranges>,
    plain_outbound: Vec<IpNet>,
    nodes: BTreeMap<KubernetesName, Node>,
    namespaces: BTreeMap<KubernetesName, Arc<Namespace>>,
    pods: Vec<Arc<Pod>>,
    services: Vec<Arc<ServiceEntry>>,
    policies: Vec<PolicyEntry>,
    last: Option<PathBuf>,
    seen: HashMap<(&'static str, String), String>,
}

impl Merge {
    fn add(&mut self, path: &Path, document: Document) -> Result<(), ParseError> {
        let place = Place { path };
        self.last = Some(path.to_owned());
        if let Some(text) = document.trust_domain {
            let line = text.referenced.line();
            let trust_domain = text.value.0;
            match &self.trust_domain {
                Some((first, at)) if *first != trust_domain => {
                    return Err(place.fault(
                        line,
                        Fault::Invalid(format!(
                            "trustDomain {trust_domain} differs from {first} at {at}"
                        )),
                    ));
                }
                Some(_) => {}
                None => self.trust_domain = Some((trust_domain, place.at(line))),
            }
        }
        if let Some(ranges) = document.ranges {
            let joined = self.ranges.get_or_insert_default();
            joined.pods.extend(plain(ranges.value.pods));
            joined.services.extend(plain(ranges.value.services));
        }
        self.plain_outbound.extend(plain(document.plain_outbound));
        for node in document.nodes {
            self.once(&place, "node", node.value.name.0.to_string(), &node)?;
            self.nodes.insert(node.value.name.0, Node::default());
        }
        for namespace in document.namespaces {
            let name = namespace.value.name.0.clone();
            self.once(&place, "namespace", name.to_string(), &namespace)?;
            let namespace = Namespace {
                labels: namespace.value.labels,
                own: false,
                uid: Arc::default(),
                version: self.version,
                decided: self.version,
            };
            self.namespaces.insert(name, Arc::new(namespace));
        }
        for workload in document.workloads {
            let uid = &workload.value.uid;
            if uid.value.is_empty() || uid.value.len() > 253 || uid.value.contains('/') {
                return Err(place.fault(
                    uid.referenced.line(),
                    Fault::Invalid("a uid has 1 to 253 bytes and no '/'".to_owned()),
                ));
            }
            self.once(&place, "workload with uid", uid.value.clone(), uid)?;
            self.pods.push(Arc::new(pod(workload.value, self.version)));
        }
        for service in document.services {
            let key = format!("{}/{}", service.value.namespace.0, service.value.name.0);
            self.once(&place, "service", key, &service)?;
            self.services
                .push(Arc::new(service_entry(&place, service.value)?));
        }
        for policy in document.policies {
            let line = policy.referenced.line();
            let entry = policy::entry(policy.value).map_err(|fault| {
                place.fault(fault.line.unwrap_or(line), Fault::Invalid(fault.sentence))
            })?;
            self.once_at(&place, "policy", entry.policy.key.to_string(), line)?;
            self.policies.push(entry);
        }
        Ok(())
    }

    fn once<T>(
        &mut self,
        place: &Place<'_>,
        what: &'static str,
        name: String,
        here: &Spanned<T>,
    ) -> Result<(), ParseError> {
        self.once_at(place, what, name, here.referenced.line())
    }

    fn once_at(
        &mut self,
        place: &Place<'_>,
        what: &'static str,
        name: String,
        line: u64,
    ) -> Result<(), ParseError> {
        match self.seen.entry((what, name)) {
            Entry::Vacant(free) => {
                free.insert(place.at(line));
                Ok(())
            }
            Entry::Occupied(taken) => {
                let (what, name) = taken.key().clone();
                let first = taken.get().clone();
                Err(place.fault(line, Fault::Duplicate { what, name, first }))
            }
        }
    }

    fn finish(self) -> Result<Cluster, ParseError> {
        let (trust_domain, _) = self.trust_domain.ok_or(ParseError {
            file: self.last.unwrap_or_default(),
            line: 0,
            fault: Fault::NoTrustDomain,
        })?;
        Ok(Cluster {
            version: self.version,
            trust_domain,
            defaults: Defaults::default(),
            cilium_encrypts: false,
            released: None,
            ranges: self.ranges,
            plain_outbound: self.plain_outbound,
            nodes: self.nodes,
            namespaces: self.namespaces,
            pods: self.pods,
            services: self.services,
            policies: self.policies,
        })
    }
}

/// The file being read, for errors.
struct Place<'a> {
    path: &'a Path,
}

impl Place<'_> {
    fn at(&self, line: u64) -> String {
        format!("{}:{line}", self.path.display())
    }

    fn fault(&self, line: u64, fault: Fault) -> ParseError {
        ParseError {
            file: self.path.to_owned(),
            line,
            fault,
        }
    }
}

fn plain(ranges: Vec<Text<Range>>) -> impl Iterator<Item = IpNet> {
    ranges.into_iter().map(|range| range.0.0)
}

fn pod(workload: file::Workload, version: u64) -> Pod {
    Pod {
        name: workload.name.0.as_str().into(),
        namespace: workload.namespace.0,
        uid: Uid(workload.uid.value.into()),
        node_uid: None,
        node: workload.node.0,
        service_account: workload.service_account.0,
        addresses: addresses(workload.addresses),
        labels: workload.labels,
        annotations: workload.annotations,
        phase: match workload.phase {
            file::Phase::Failed => Phase::Failed,
            file::Phase::Running => Phase::Running,
            file::Phase::Succeeded => Phase::Succeeded,
            file::Phase::Terminating => Phase::Terminating,
        },
        host_network: workload.host_network,
        ready: workload.ready,
        owner: None,
        host_ports: BTreeMap::new(),
        probe_ports: BTreeSet::new(),
        created: 0,
        version,
        decided: version,
    }
}

fn service_entry(place: &Place<'_>, service: file::Service) -> Result<ServiceEntry, ParseError> {
    let mut ports = Vec::with_capacity(service.ports.len());
    for port in service.ports {
        let line = port.referenced.line();
        let port = ServicePort {
            port: port.value.port,
            target: port.value.target_port.unwrap_or(port.value.port),
        };
        if port.port == 0 || port.target == 0 {
            return Err(place.fault(line, Fault::Invalid("a port is 1 to 65535".to_owned())));
        }
        ports.push(port);
    }
    let to: EndpointPorts = ports.iter().map(|port| (port.port, port.target)).collect();
    let endpoint = |name: String| Endpoint {
        target: Target::Name(name.into()),
        ports: to.clone(),
    };
    Ok(ServiceEntry {
        name: service.name.0.as_str().into(),
        namespace: service.namespace.0,
        addresses: addresses(service.addresses),
        endpoints: service.endpoints.into_iter().map(endpoint).collect(),
        ports,
        node_ports: BTreeMap::new(),
        publish_not_ready: service.publish_not_ready_addresses,
        balancing: Balancing::default(),
    })
}

fn addresses(texts: Vec<Text<IpAddr>>) -> Vec<IpAddr> {
    texts.into_iter().map(|text| text.0).collect()
}
