// SPDX-License-Identifier: Apache-2.0
use crate::{Action, Policy, PolicyKey, Rule, Scope};
use podveil_identity::WorkloadIdentity;
use podveil_model::Workload;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// What policy may look at: what was proved, what the kernel saw, and the original port.
#[derive(Clone, Copy, Debug)]
pub struct Connection<'a> {
    /// `None`: plain, so nothing is proved.
    pub source: Option<&'a WorkloadIdentity>,
    pub source_ip: IpAddr,
    /// The workload's own address and port, never 15008.
    pub destination: SocketAddr,
}

/// The proof that policy was asked and what allowed the connection. Only [`PolicySet::evaluate`] makes one.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct Permit {
    /// The allow policy and the index of its rule; `None` where no allow policy applies.
    pub rule: Option<(PolicyKey, usize)>,
    /// Dry-run deny policies that would have refused.
    pub would_deny: Vec<PolicyKey>,
}

#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Denied {
    #[error("explicitly denied by: {policy}")]
    Explicit { policy: PolicyKey, rule: usize },
    #[error("allow policies exist, but none allowed")]
    NotAllowed { policies: Vec<PolicyKey> },
    /// The workload names a policy that has not arrived: what it says is not known, so nothing passes.
    #[error("policy {policy} is named by the workload and not known here")]
    Unknown { policy: Arc<str> },
}

/// All policies of the mesh that this node knows, by the name the wire gives them.
#[derive(Clone, Debug, Default)]
pub struct PolicySet {
    policies: BTreeMap<Arc<str>, Arc<Policy>>,
}

impl PolicySet {
    pub fn insert(&mut self, resource: Arc<str>, policy: impl Into<Arc<Policy>>) {
        self.policies.insert(resource, policy.into());
    }

    pub fn remove(&mut self, resource: &str) -> bool {
        self.policies.remove(resource).is_some()
    }

    pub fn len(&self) -> usize {
        self.policies.len()
    }

    pub fn is_empty(&self) -> bool {
        self.policies.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = (&Arc<str>, &Arc<Policy>)> {
        self.policies.iter()
    }

    /// # Errors
    /// [`Denied`], with the rule or the lack that decided.
    pub fn evaluate(
        &self,
        destination: &Workload,
        connection: &Connection<'_>,
    ) -> Result<Permit, Denied> {
        if let Some(policy) = destination
            .policies
            .iter()
            .find(|name| !self.policies.contains_key(*name))
        {
            return Err(Denied::Unknown {
                policy: policy.clone(),
            });
        }
        let applies = |(name, policy): &(&Arc<str>, &Arc<Policy>)| match policy.scope {
            Scope::Global => true,
            Scope::Namespace => policy.key.namespace.as_ref() == Some(destination.namespace()),
            Scope::WorkloadSelector => destination.policies.contains(*name),
        };
        let mut would_deny = Vec::new();
        let mut allowing: Vec<&Policy> = Vec::new();
        for (_, policy) in self.policies.iter().filter(applies) {
            match policy.action {
                Action::Allow if policy.dry_run => {}
                Action::Allow => allowing.push(policy),
                Action::Deny => match policy.rules.iter().position(|rule| rule.holds(connection)) {
                    Some(_) if policy.dry_run => would_deny.push(policy.key.clone()),
                    Some(rule) => {
                        return Err(Denied::Explicit {
                            policy: policy.key.clone(),
                            rule,
                        });
                    }
                    None => {}
                },
            }
        }
        if allowing.is_empty() {
            return Ok(Permit {
                rule: None,
                would_deny,
            });
        }
        let matched = allowing.iter().find_map(|policy| {
            let rule = policy
                .rules
                .iter()
                .position(|rule| rule.holds(connection))?;
            Some((policy.key.clone(), rule))
        });
        match matched {
            Some(rule) => Ok(Permit {
                rule: Some(rule),
                would_deny,
            }),
            None => Err(Denied::NotAllowed {
                policies: allowing.iter().map(|policy| policy.key.clone()).collect(),
            }),
        }
    }
}

impl Rule {
    fn holds(&self, connection: &Connection<'_>) -> bool {
        self.clauses
            .iter()
            .all(|clause| clause.is_empty() || clause.iter().any(|one| one.holds(connection)))
    }
}
