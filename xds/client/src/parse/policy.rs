// SPDX-License-Identifier: Apache-2.0
use super::{Malformed, Parsed, at_most, ip, known_enum, kubernetes_name, port, required};
use ipnet::IpNet;
use podveil_policy::{
    Action, Match, Policy, PolicyKey, Rule, Scope, ServiceAccountMatch, StringMatch,
};
use podveil_proto::istio::security::{self as wire, string_match::MatchType};
use prost::Message;

/// Of one kind, in one place: rules of a policy, clauses of a rule, matches of a clause, values of a field.
const MAX_ITEMS: usize = 4096;

impl TryFrom<wire::Authorization> for Parsed<Policy> {
    type Error = Malformed;

    fn try_from(wire: wire::Authorization) -> Result<Self, Malformed> {
        if !wire.extensions.is_empty() {
            return Err(Malformed::Unsupported {
                field: "extensions",
            });
        }
        let scope = match known_enum("scope", wire.scope)? {
            wire::Scope::Global => Scope::Global,
            wire::Scope::Namespace => Scope::Namespace,
            wire::Scope::WorkloadSelector => Scope::WorkloadSelector,
        };
        let action = match known_enum("action", wire.action)? {
            wire::Action::Allow => Action::Allow,
            wire::Action::Deny => Action::Deny,
        };
        let namespace = match wire.namespace.as_str() {
            "" if scope == Scope::Namespace => {
                return Err(Malformed::Empty { field: "namespace" });
            }
            "" => None,
            name => Some(kubernetes_name("namespace", name)?),
        };
        let mut rules = Vec::new();
        for wire in at_most(MAX_ITEMS, "rules", wire.rules)? {
            let mut clauses = Vec::new();
            for wire in at_most(MAX_ITEMS, "rules.clauses", wire.clauses)? {
                let matches = at_most(MAX_ITEMS, "rules.clauses.matches", wire.matches)?;
                let matches: Result<Vec<Match>, Malformed> =
                    matches.into_iter().map(one_match).collect();
                clauses.push(matches?);
            }
            rules.push(Rule { clauses });
        }
        Ok(Self(Policy {
            key: PolicyKey {
                namespace,
                name: required("name", wire.name)?,
            },
            scope,
            action,
            rules,
            dry_run: wire.dry_run,
        }))
    }
}

/// What stands in for a policy that was rejected and of which no good state is held: nothing passes because of it,
/// and where it would have denied, everything it may apply to is refused. `None` where not even that can be read;
/// the rejection then keeps the node from becoming ready.
pub fn refuse_all(name: &str, bytes: &[u8]) -> Option<Policy> {
    let wire = wire::Authorization::decode(bytes).ok()?;
    let namespace = kubernetes_name("namespace", &wire.namespace).ok();
    let scope = match wire::Scope::try_from(wire.scope) {
        Ok(wire::Scope::WorkloadSelector) => Scope::WorkloadSelector,
        Ok(wire::Scope::Namespace) if namespace.is_some() => Scope::Namespace,
        _ => Scope::Global,
    };
    let (action, rules) = match wire::Action::try_from(wire.action) {
        // An allow policy without rules allows nobody, and others may still allow.
        Ok(wire::Action::Allow) => (Action::Allow, Vec::new()),
        // A rule without clauses always holds.
        _ => (Action::Deny, vec![Rule::default()]),
    };
    Some(Policy {
        key: PolicyKey {
            namespace,
            name: if wire.name.is_empty() {
                name.into()
            } else {
                super::shortened(&wire.name).into()
            },
        },
        scope,
        action,
        rules,
        dry_run: wire.dry_run,
    })
}

fn one_match(wire: wire::Match) -> Result<Match, Malformed> {
    if !wire.extensions.is_empty() {
        return Err(Malformed::Unsupported {
            field: "match.extensions",
        });
    }
    Ok(Match {
        namespaces: each("namespaces", wire.namespaces, string)?,
        not_namespaces: each("not_namespaces", wire.not_namespaces, string)?,
        principals: each("principals", wire.principals, string)?,
        not_principals: each("not_principals", wire.not_principals, string)?,
        service_accounts: each("service_accounts", wire.service_accounts, account)?,
        not_service_accounts: each("not_service_accounts", wire.not_service_accounts, account)?,
        source_ips: each("source_ips", wire.source_ips, range)?,
        not_source_ips: each("not_source_ips", wire.not_source_ips, range)?,
        destination_ips: each("destination_ips", wire.destination_ips, range)?,
        not_destination_ips: each("not_destination_ips", wire.not_destination_ips, range)?,
        destination_ports: each("destination_ports", wire.destination_ports, port)?,
        not_destination_ports: each("not_destination_ports", wire.not_destination_ports, port)?,
    })
}

fn each<W, T>(
    field: &'static str,
    values: Vec<W>,
    parse: impl Fn(&'static str, W) -> Result<T, Malformed>,
) -> Result<Vec<T>, Malformed> {
    at_most(MAX_ITEMS, field, values)?
        .into_iter()
        .map(|value| parse(field, value))
        .collect()
}

/// An empty text would be equal to nothing, or the beginning of everything: either way not what anybody meant.
fn string(field: &'static str, wire: wire::StringMatch) -> Result<StringMatch, Malformed> {
    let owned = |text: String| required(field, text).map(|text| text.to_string());
    Ok(match wire.match_type.ok_or(Malformed::Empty { field })? {
        MatchType::Exact(text) => StringMatch::Exact(owned(text)?),
        MatchType::Prefix(text) => StringMatch::Prefix(owned(text)?),
        MatchType::Suffix(text) => StringMatch::Suffix(owned(text)?),
        MatchType::Presence(_) => StringMatch::Presence,
    })
}

fn account(
    field: &'static str,
    wire: wire::ServiceAccountMatch,
) -> Result<ServiceAccountMatch, Malformed> {
    Ok(ServiceAccountMatch {
        namespace: required(field, wire.namespace)?.to_string(),
        service_account: required(field, wire.service_account)?.to_string(),
    })
}

fn range(field: &'static str, wire: wire::Address) -> Result<IpNet, Malformed> {
    let length = u8::try_from(wire.length).map_err(|_| Malformed::BadIp { field })?;
    IpNet::new(ip(field, &wire.address)?, length).map_err(|_| Malformed::BadIp { field })
}
