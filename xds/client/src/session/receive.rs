// SPDX-License-Identifier: Apache-2.0
use super::asked::Asked;
use super::held::{Changes, Known};
use super::interner::Interner;
use crate::parse::{self, Address, Malformed};
use crate::{Rejected, ResourceType, Update};
use podveil_model::{Lookup, Question};
use podveil_proto::envoy::service::discovery::v3::Resource;
use std::collections::BTreeSet;
use std::error::Error;
use std::fmt::Write;
use std::sync::Arc;

/// Reasons told in one NACK; the rest is counted.
const MAX_REASONS: usize = 16;
/// Longer names are refused: no uid or hostname comes near.
const MAX_NAME_BYTES: usize = 1024;
const MAX_ALIASES: usize = 4096;

/// What a response says, before it is understood.
pub(super) struct Contents {
    pub(super) resources: Vec<Resource>,
    pub(super) removed: Vec<String>,
}

#[derive(Default)]
pub(super) struct Understood {
    pub(super) updates: Vec<Update>,
    pub(super) rejected: Vec<Rejected>,
    pub(super) changes: Changes,
}

impl Contents {
    /// Removals first, then what came, then which questions that answers; a resource that is not understood is left out and
    /// named, and answers nothing.
    pub(super) fn parse(
        self,
        resource_type: ResourceType,
        known: &Known<'_>,
        asked: &mut Asked,
        interner: &mut Interner,
        max_resources: usize,
    ) -> Understood {
        let mut out = Understood::default();
        let mut free = max_resources.saturating_sub(known.count());
        if resource_type == ResourceType::Address {
            // What the consumer gave up before this came.
            let (forgotten, loose) = asked.take_let_go();
            out.updates.extend(forgotten);
            for name in loose {
                out.let_go(name, None);
            }
        }
        for name in self.removed {
            out.remove(resource_type, name.into(), asked);
        }
        let (mut answered, mut unanswered) = (BTreeSet::new(), BTreeSet::new());
        for resource in self.resources {
            let name: Arc<str> = parse::shortened_to(&resource.name, MAX_NAME_BYTES).into();
            let new = !known.contains(&name) && !out.changes.accepted.contains_key(&name);
            let full = new && free == 0;
            let update = if full {
                Err(Malformed::TooMany {
                    field: "resources held",
                    limit: max_resources,
                })
            } else {
                understand(resource_type, &name, &resource)
            };
            match update {
                Ok(mut update) => {
                    if let Update::Workload(workload) = &mut update {
                        interner.share(workload);
                    }
                    if resource_type == ResourceType::Address {
                        match asked.told(&name, &resource.aliases) {
                            Some(names) => answered.extend(names),
                            None => {
                                let is_held = !new && !out.changes.removed.contains(&name);
                                out.let_go(name, is_held.then_some(update));
                                continue;
                            }
                        }
                    }
                    out.updates.push(update);
                    let version = resource.version.into();
                    out.changes.accepted.insert(name, version);
                    free -= usize::from(new);
                }
                Err(error) => {
                    unanswered.extend(asked.not_told(&resource.aliases));
                    if new && resource_type == ResourceType::Authorization {
                        out.updates.extend(stand_in(&name, &resource));
                    }
                    out.rejected.push(Rejected {
                        name,
                        reason: chain(&error).into(),
                    });
                }
            }
        }
        if resource_type == ResourceType::Address {
            let (_, loose) = asked.take_let_go();
            for name in loose {
                out.let_go(name, None);
            }
        }
        // Said to mean nobody, and then somebody who is not understood: it is as if it had not been answered.
        let reopened = unanswered.iter().filter_map(|about| asked.reopen(about));
        out.updates.extend(reopened.map(Update::Forgotten));
        for about in answered.difference(&unanswered) {
            out.updates.extend(asked.answered(about).map(Update::Found));
        }
        out
    }
}

impl Understood {
    /// A resource that nothing means any more, after its last state where that is known.
    fn let_go(&mut self, name: Arc<str>, last: Option<Update>) {
        self.updates.extend(last);
        self.updates.push(Update::Unasked(name.clone()));
        self.changes.removed.insert(name);
    }

    fn remove(&mut self, resource_type: ResourceType, name: Arc<str>, asked: &mut Asked) {
        match resource_type {
            ResourceType::Address => {
                let question = asked.nobody(&name);
                if Lookup::parse(&name).is_none() && Question::parse(&name).is_none() {
                    self.updates.push(Update::AddressRemoved(name.clone()));
                }
                self.updates.extend(question.map(Update::NotFound));
            }
            ResourceType::Authorization => {
                self.updates.push(Update::PolicyRemoved(name.clone()));
            }
            // A mesh without its configuration is a control plane that does not know; the last one known stays.
            ResourceType::MeshConfig => {}
        }
        self.changes.removed.insert(name);
    }
}

fn understand(
    resource_type: ResourceType,
    name: &Arc<str>,
    resource: &Resource,
) -> Result<Update, Malformed> {
    if resource.name.is_empty() {
        return Err(Malformed::Empty { field: "name" });
    }
    if resource.name.len() > MAX_NAME_BYTES {
        return Err(Malformed::TooLong {
            field: "name",
            limit: MAX_NAME_BYTES,
        });
    }
    if resource.aliases.len() > MAX_ALIASES {
        return Err(Malformed::TooMany {
            field: "aliases",
            limit: MAX_ALIASES,
        });
    }
    let any = resource
        .resource
        .as_ref()
        .ok_or(Malformed::Empty { field: "resource" })?;
    if any.type_url != resource_type.type_url() {
        return Err(Malformed::WrongType {
            got: parse::shortened_to(&any.type_url, MAX_NAME_BYTES),
        });
    }
    Ok(match resource_type {
        ResourceType::Address => match parse::address(name, &any.value)? {
            Address::Workload(workload) => Update::Workload(workload),
            Address::Service(service) => Update::Service(service),
        },
        ResourceType::Authorization => Update::Policy {
            name: name.clone(),
            policy: Arc::new(parse::authorization(&any.value)?),
        },
        ResourceType::MeshConfig => Update::Mesh(Arc::new(parse::mesh_config(&any.value)?)),
    })
}

/// A policy that is not understood and of which nothing is held must not count as absent: that could widen.
fn stand_in(name: &Arc<str>, resource: &Resource) -> Option<Update> {
    let bytes = &resource.resource.as_ref()?.value;
    parse::refuse_all(name, bytes).map(|policy| Update::Policy {
        name: name.clone(),
        policy: Arc::new(policy),
    })
}

/// All reasons in one text for the other side; `None` if nothing was rejected.
pub(super) fn join(rejected: &[Rejected]) -> Option<String> {
    let mut text = String::new();
    for one in rejected.iter().take(MAX_REASONS) {
        let separator = if text.is_empty() { "" } else { "; " };
        let _ = write!(text, "{separator}{}: {}", one.name, one.reason);
    }
    if rejected.len() > MAX_REASONS {
        let _ = write!(text, "; and {} more", rejected.len() - MAX_REASONS);
    }
    (!rejected.is_empty()).then_some(text)
}

fn chain(error: &Malformed) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let _ = write!(text, ": {cause}");
        source = cause.source();
    }
    text
}
