// SPDX-License-Identifier: Apache-2.0
//! L4 policy: who may connect to whom on which port.
//!
//! [`PolicySet::evaluate`] answers with a [`Permit`] that names the rule, or a [`Denied`] that names the reason. Both
//! go into the flow record; a connection cannot be made without the permit. Deny before allow; with no allow policy
//! that applies everything is allowed; once one applies, only what it names.

#![forbid(unsafe_code)]

mod evaluate;
mod matching;

pub use evaluate::{Connection, Denied, Permit, PolicySet};
pub use matching::{Match, ServiceAccountMatch, StringMatch};

use podveil_identity::KubernetesName;
use std::fmt;
use std::sync::Arc;

/// `<namespace>/<name>`: the key of a policy, and what refusals name.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct PolicyKey {
    /// `None`: a global policy's namespace is empty on the wire.
    pub namespace: Option<KubernetesName>,
    pub name: Arc<str>,
}

impl fmt::Display for PolicyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.namespace {
            Some(namespace) => write!(f, "{namespace}/{}", self.name),
            None => f.write_str(&self.name),
        }
    }
}

#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Scope {
    Global,
    Namespace,
    /// Applies to workloads that name it.
    WorkloadSelector,
}

#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Action {
    Allow,
    Deny,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Policy {
    pub key: PolicyKey,
    pub scope: Scope,
    pub action: Action,
    /// Any rule that matches; none never matches.
    pub rules: Vec<Rule>,
    /// Evaluated and logged, never enforced.
    pub dry_run: bool,
}

/// Every clause holds; a clause holds if it is empty or any of its matches does.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Rule {
    pub clauses: Vec<Vec<Match>>,
}
