// SPDX-License-Identifier: Apache-2.0
//! A policy of the file, turned into the one that is evaluated. What cannot be understood is refused, never widened.

use crate::PolicyEntry;
use crate::file::{self, Range, Text};
use ipnet::IpNet;
use podveil_identity::KubernetesName;
use podveil_policy::{
    Action, Match, Policy, PolicyKey, Rule, Scope, ServiceAccountMatch, StringMatch,
};
use serde_saphyr::Spanned;
use std::str::FromStr;

/// What is wrong with a policy, and on which line where that is known better than the policy's own.
#[derive(Debug)]
pub(crate) struct PolicyFault {
    pub line: Option<u64>,
    pub sentence: String,
}

impl PolicyFault {
    fn new(sentence: impl Into<String>) -> Self {
        Self {
            line: None,
            sentence: sentence.into(),
        }
    }

    fn at(self, line: u64) -> Self {
        Self {
            line: self.line.or(Some(line)),
            ..self
        }
    }
}

pub(crate) fn entry(policy: file::Policy) -> Result<PolicyEntry, PolicyFault> {
    let global = policy.scope == file::Scope::Global;
    if global != policy.namespace.is_none() {
        return Err(PolicyFault::new(
            "a policy has a namespace, except one of scope global, which has none",
        ));
    }
    if (policy.scope == file::Scope::Workloads) == policy.workloads.is_empty() {
        return Err(PolicyFault::new(
            "scope workloads, and no other, needs names in workloads",
        ));
    }
    let rules = policy
        .rules
        .into_iter()
        .map(|rule| {
            let from = clause(rule.value.from, from)?;
            let to = clause(rule.value.to, to)?;
            Ok(Rule {
                clauses: [from, to]
                    .into_iter()
                    .filter(|one| !one.is_empty())
                    .collect(),
            })
        })
        .collect::<Result<_, PolicyFault>>()?;
    Ok(PolicyEntry {
        policy: Policy {
            key: PolicyKey {
                namespace: policy.namespace.map(|namespace| namespace.0),
                name: policy.name.0.as_str().into(),
            },
            scope: match policy.scope {
                file::Scope::Global => Scope::Global,
                file::Scope::Namespace => Scope::Namespace,
                file::Scope::Workloads => Scope::WorkloadSelector,
            },
            action: match policy.action {
                file::Action::Allow => Action::Allow,
                file::Action::Deny => Action::Deny,
            },
            rules,
            dry_run: policy.dry_run,
        },
        workloads: policy.workloads.into_iter().map(Into::into).collect(),
    })
}

fn clause<T>(
    entries: Vec<Spanned<T>>,
    convert: impl Fn(T) -> Result<Match, PolicyFault>,
) -> Result<Vec<Match>, PolicyFault> {
    entries
        .into_iter()
        .map(|entry| {
            let line = entry.referenced.line();
            let one = convert(entry.value).map_err(|fault| fault.at(line))?;
            if one == Match::default() {
                return Err(PolicyFault::new("an entry without a field never matches").at(line));
            }
            Ok(one)
        })
        .collect()
}

fn from(from: file::From) -> Result<Match, PolicyFault> {
    Ok(Match {
        principals: strings(from.principals)?,
        not_principals: strings(from.not_principals)?,
        namespaces: strings(from.namespaces)?,
        not_namespaces: strings(from.not_namespaces)?,
        service_accounts: accounts(from.service_accounts)?,
        not_service_accounts: accounts(from.not_service_accounts)?,
        source_ips: ranges(from.ips),
        not_source_ips: ranges(from.not_ips),
        ..Match::default()
    })
}

fn to(to: file::To) -> Result<Match, PolicyFault> {
    Ok(Match {
        destination_ports: to.ports,
        not_destination_ports: to.not_ports,
        destination_ips: ranges(to.ips),
        not_destination_ips: ranges(to.not_ips),
        ..Match::default()
    })
}

fn ranges(ranges: Vec<Text<Range>>) -> Vec<IpNet> {
    ranges.into_iter().map(|range| range.0.0).collect()
}

/// `*` alone is any value, at the end a prefix, at the beginning a suffix.
fn strings(texts: Vec<String>) -> Result<Vec<StringMatch>, PolicyFault> {
    texts
        .into_iter()
        .map(|text| {
            let (one, inner) = if text == "*" {
                (StringMatch::Presence, "")
            } else if let Some(prefix) = text.strip_suffix('*') {
                (StringMatch::Prefix(prefix.to_owned()), prefix)
            } else if let Some(suffix) = text.strip_prefix('*') {
                (StringMatch::Suffix(suffix.to_owned()), suffix)
            } else {
                (StringMatch::Exact(text.clone()), text.as_str())
            };
            if text.is_empty() || inner.contains('*') {
                return Err(PolicyFault::new(format!(
                    "{text:?} is not a value, or a value with one * at its beginning or end"
                )));
            }
            Ok(one)
        })
        .collect()
}

fn accounts(texts: Vec<String>) -> Result<Vec<ServiceAccountMatch>, PolicyFault> {
    texts
        .into_iter()
        .map(|text| {
            let name = |part: &str| KubernetesName::from_str(part).is_ok();
            match text.split_once('/') {
                Some((namespace, account)) if name(namespace) && name(account) => {
                    Ok(ServiceAccountMatch {
                        namespace: namespace.to_owned(),
                        service_account: account.to_owned(),
                    })
                }
                _ => Err(PolicyFault::new(format!(
                    "{text:?} is not <namespace>/<service account>"
                ))),
            }
        })
        .collect()
}
