// SPDX-License-Identifier: Apache-2.0
//! Cilium's own policies (`cilium.io/v2`): the same trap as with NetworkPolicies, and some of their own. A denial of a port does
//! not hold for what goes in a tunnel; a rule about requests sees none there, and breaks the tunnel where it is about its port.

use super::ports::{Named, Ports};
use super::{Directions, blocked, is_empty};
use crate::check::Finding;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};
use kube::ResourceExt;
use kube::api::DynamicObject;
use podveil_model::HBONE_PORT;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

pub const GROUP: &str = "cilium.io";
pub const VERSION: &str = "v2";
/// Kind and plural: within a namespace, and of the whole cluster.
pub const NAMESPACED: (&str, &str) = ("CiliumNetworkPolicy", "ciliumnetworkpolicies");
pub const CLUSTERWIDE: (&str, &str) = (
    "CiliumClusterwideNetworkPolicy",
    "ciliumclusterwidenetworkpolicies",
);

/// By which a policy of the whole cluster chooses pods of one namespace; before them may stand where a label is from.
const NAMESPACE_LABELS: [&str; 2] = [
    "io.kubernetes.pod.namespace",
    "io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name",
];
const SOURCES: [&str; 2] = ["k8s:", "any:"];
/// Entities among which there are pods that may be enrolled.
const WITH_PODS: [&str; 2] = ["all", "cluster"];

/// A policy has one `spec`, or several `specs`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Policy {
    spec: Option<Spec>,
    specs: Vec<Spec>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Spec {
    endpoint_selector: LabelSelector,
    /// Then it is about the node's own traffic.
    node_selector: Option<IgnoredAny>,
    enable_default_deny: DefaultDeny,
    ingress: Vec<Rule>,
    egress: Vec<Rule>,
    ingress_deny: Vec<Rule>,
    egress_deny: Vec<Rule>,
}

/// Whether what no rule lets through is refused; where it does not say, it is.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct DefaultDeny {
    ingress: Option<bool>,
    egress: Option<bool>,
}

/// Of the peers only what tells pods from others. None named: everybody.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Rule {
    to_ports: Vec<ToPorts>,
    from_endpoints: Option<IgnoredAny>,
    to_endpoints: Option<IgnoredAny>,
    to_services: Option<IgnoredAny>,
    from_entities: Vec<String>,
    to_entities: Vec<String>,
    from_groups: Option<IgnoredAny>,
    to_groups: Option<IgnoredAny>,
    from_nodes: Option<IgnoredAny>,
    to_nodes: Option<IgnoredAny>,
    #[serde(rename = "fromCIDR")]
    from_cidr: Option<IgnoredAny>,
    #[serde(rename = "toCIDR")]
    to_cidr: Option<IgnoredAny>,
    #[serde(rename = "fromCIDRSet")]
    from_cidr_set: Option<IgnoredAny>,
    #[serde(rename = "toCIDRSet")]
    to_cidr_set: Option<IgnoredAny>,
    #[serde(rename = "toFQDNs")]
    to_names: Option<IgnoredAny>,
    icmps: Option<IgnoredAny>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct ToPorts {
    ports: Vec<Port>,
    /// About requests, by protocol.
    rules: BTreeMap<String, Value>,
    server_names: Option<IgnoredAny>,
    listener: Option<IgnoredAny>,
    #[serde(rename = "terminatingTLS")]
    terminating_tls: Option<IgnoredAny>,
    #[serde(rename = "originatingTLS")]
    originating_tls: Option<IgnoredAny>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Port {
    /// A number, `0` for every one, or a container's name for it.
    port: String,
    end_port: Option<i32>,
    protocol: Option<String>,
}

/// One policy, read.
#[derive(Debug)]
pub struct Read {
    name: String,
    namespace: Option<String>,
    specs: Vec<Spec>,
}

/// # Errors
/// A finding: what it does is not known.
pub fn read(policy: &DynamicObject, enrolled: &BTreeSet<String>) -> Result<Read, Finding> {
    let namespace = policy.namespace();
    let name = match &namespace {
        Some(namespace) => format!("{} {namespace}/{}", NAMESPACED.0, policy.name_any()),
        None => format!("{} {}", CLUSTERWIDE.0, policy.name_any()),
    };
    let read: Policy = serde_json::from_value(policy.data.clone()).map_err(|error| {
        Finding::unknown(
            "policies",
            format!("{name} is not understood: {error}"),
            format!("see that its rules let TCP {HBONE_PORT} through between enrolled pods"),
        )
    })?;
    let specs = read.spec.into_iter().chain(read.specs);
    let specs = specs.filter(|spec| spec.node_selector.is_none() && spec.is_about(enrolled));
    Ok(Read {
        name,
        namespace,
        specs: specs.collect(),
    })
}

impl Read {
    /// `None`: it is about every namespace.
    pub fn namespace(&self) -> Option<&str> {
        self.namespace.as_deref()
    }

    /// The directions in which it lets tunnels through between every pod that it may be about and every other.
    pub fn opens(&self) -> Directions {
        let every = (self.specs.iter()).filter(|spec| is_empty(&spec.endpoint_selector));
        every.fold(Directions::default(), |opens, spec| {
            opens.or(Directions {
                from: spec.ingress.iter().any(Rule::opens),
                to: spec.egress.iter().any(Rule::opens),
            })
        })
    }

    /// What it would do to enrolled pods. `open`: where another policy lets tunnels through.
    pub fn judge(&self, open: Directions) -> Vec<Finding> {
        let name = &self.name;
        let some = |rules: fn(&Spec) -> &[Rule], are: &dyn Fn(&Rule) -> bool| {
            let rules = self.specs.iter().flat_map(rules);
            rules.filter(|rule| rule.is_about_pods()).any(are)
        };
        let denies = |what: Named| Directions {
            from: some(|spec| &spec.ingress_deny, &|rule| rule.named() == what),
            to: some(|spec| &spec.egress_deny, &|rule| rule.named() == what),
        };
        let refuses = Directions {
            from: some(Spec::ingress_in_force, &Rule::leaves_out_tunnels),
            to: some(Spec::egress_in_force, &Rule::leaves_out_tunnels),
        };
        let mut findings = Vec::new();
        findings.extend(blocked(
            name,
            refuses.without(open),
            "in an item of `toPorts` of its own, without rules about requests",
        ));
        findings.extend(denies(Named::Tunnels).words().map(|directions| {
            Finding::problem(
                "policies",
                format!(
                    "{name} denies ports {directions} its pods' peers, {HBONE_PORT} among them, where tunnels go"
                ),
                format!("leave {HBONE_PORT} out of what it denies"),
            )
        }));
        findings.extend(denies(Named::Connections).words().map(|directions| {
            Finding::warning(
                "policies",
                format!(
                    "{name} denies ports {directions} its pods' peers, which does not hold for what goes in tunnels to port \
                     {HBONE_PORT}"
                ),
                "deny those peers whole, without ports, or keep the pods out of the mesh",
            )
        }));
        let about_requests = |rule: &Rule| rule.to_ports.iter().any(ToPorts::is_about_requests);
        if some(|spec| &spec.ingress, &about_requests) || some(|spec| &spec.egress, &about_requests)
        {
            findings.push(Finding::warning(
                "policies",
                format!("{name} has rules about requests, which see none of those in tunnels"),
                "keep the pods that need them out of the mesh, or do without",
            ));
        }
        findings
    }
}

impl Spec {
    fn ingress_in_force(&self) -> &[Rule] {
        match self.enable_default_deny.ingress {
            Some(false) => &[],
            Some(true) | None => &self.ingress,
        }
    }

    fn egress_in_force(&self) -> &[Rule] {
        match self.enable_default_deny.egress {
            Some(false) => &[],
            Some(true) | None => &self.egress,
        }
    }

    /// May it choose pods of these namespaces? Other labels are not looked at.
    fn is_about(&self, enrolled: &BTreeSet<String>) -> bool {
        let LabelSelector {
            match_labels,
            match_expressions,
        } = &self.endpoint_selector;
        enrolled.iter().any(|namespace| {
            let mut labels = match_labels.iter().flatten();
            let mut expressions = match_expressions.iter().flatten();
            labels.all(|(label, value)| !is_namespace(label) || value == namespace)
                && expressions.all(|one| !is_namespace(&one.key) || holds(one, namespace))
        })
    }
}

fn is_namespace(label: &str) -> bool {
    let bare = SOURCES.iter().find_map(|source| label.strip_prefix(source));
    NAMESPACE_LABELS.contains(&bare.unwrap_or(label))
}

fn holds(expression: &LabelSelectorRequirement, namespace: &String) -> bool {
    let named = expression
        .values
        .iter()
        .flatten()
        .any(|one| one == namespace);
    match expression.operator.as_str() {
        "In" => named,
        "NotIn" => !named,
        "DoesNotExist" => false,
        _ => true,
    }
}

impl Rule {
    /// A rule about the world's names and addresses, or about nodes, is about no pod: Cilium knows pods by who they are.
    fn is_about_pods(&self) -> bool {
        let is_pod = [&self.from_endpoints, &self.to_endpoints, &self.to_services];
        is_pod.iter().any(|peers| peers.is_some()) || self.is_about_everybody()
    }

    fn is_about_everybody(&self) -> bool {
        let named = [
            &self.from_endpoints,
            &self.to_endpoints,
            &self.to_services,
            &self.from_groups,
            &self.to_groups,
            &self.from_nodes,
            &self.to_nodes,
            &self.from_cidr,
            &self.to_cidr,
            &self.from_cidr_set,
            &self.to_cidr_set,
            &self.to_names,
        ];
        let mut entities = self
            .from_entities
            .iter()
            .chain(&self.to_entities)
            .peekable();
        match entities.peek() {
            Some(_) => entities.any(|entity| WITH_PODS.contains(&entity.as_str())),
            None => named.iter().all(|peers| peers.is_none()),
        }
    }

    fn named(&self) -> Named {
        let ports: Vec<Ports> = (self.to_ports.iter())
            .flat_map(|to| to.ports.iter().map(Ports::from))
            .collect();
        match ports.is_empty() && self.icmps.is_some() {
            true => Named::Others,
            false => Named::by(&ports),
        }
    }

    /// Where requests are looked at, a tunnel's bytes are none.
    fn lets_tunnels_through(&self) -> bool {
        match self.to_ports.as_slice() {
            [] => self.named().lets_tunnels_through(),
            items => items.iter().any(|to| {
                let ports: Vec<Ports> = to.ports.iter().map(Ports::from).collect();
                Named::by(&ports).lets_tunnels_through() && !to.is_about_requests()
            }),
        }
    }

    fn leaves_out_tunnels(&self) -> bool {
        self.named() != Named::Others && !self.lets_tunnels_through()
    }

    fn opens(&self) -> bool {
        self.is_about_everybody() && self.lets_tunnels_through()
    }
}

impl ToPorts {
    fn is_about_requests(&self) -> bool {
        let read = [
            &self.server_names,
            &self.listener,
            &self.terminating_tls,
            &self.originating_tls,
        ];
        // Names are asked by UDP, or on a port that no tunnel takes the place of.
        self.rules.keys().any(|kind| kind != "dns") || read.iter().any(|one| one.is_some())
    }
}

impl From<&Port> for Ports {
    fn from(port: &Port) -> Self {
        let protocol = port.protocol.as_deref().unwrap_or("ANY");
        if !["TCP", "ANY"].contains(&protocol) {
            return Self::NotTcp;
        }
        let last = port.end_port.filter(|last| *last > 0);
        match port.port.parse() {
            Ok(0) => Self::ALL,
            Ok(first) => Self::Tcp(first..=last.unwrap_or(first)),
            Err(_) => Self::Named,
        }
    }
}

#[cfg(test)]
#[path = "cilium_tests.rs"]
mod tests;
