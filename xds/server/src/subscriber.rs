// SPDX-License-Identifier: Apache-2.0
mod draft;
mod on_demand;
mod subscription;

use crate::Version;
use crate::published::{Kind, Published};
use crate::response::Response;
use podveil_proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, Node};
use podveil_proto::{TAKES, TAKES_CAPTURED};
use prost_types::value::Kind as Value;
use std::collections::BTreeMap;
use subscription::Subscription;
pub(crate) use subscription::TooFarBehind;

/// Names asked for on one stream. A node asks for one per destination of its pods.
const MAX_NAMES: usize = 65_536;
/// Longer names are nobody's.
const MAX_NAME_BYTES: usize = 1024;

/// One stream's side of the protocol: no I/O, no clock.
///
/// It keeps, per type, what it sent last, and goes from there straight to the newest snapshot. Of each type one push
/// is under way at a time; the next waits for the answer, and then holds everything that changed since.
#[derive(Debug)]
pub(crate) struct Subscriber {
    instance: u64,
    nonces: u64,
    types: BTreeMap<Kind, Subscription>,
}

/// A request that ends the stream: the caller is at fault.
#[derive(Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum Unacceptable {
    #[error("names of more than {limit} bytes")]
    NameTooLong { limit: usize },
    #[error("more than {limit} names on one stream")]
    TooManyNames { limit: usize },
    #[error("resources of type {type_url:?} are not served here")]
    UnknownType { type_url: String },
}

/// What a request said about an earlier response.
#[derive(Debug, Eq, PartialEq)]
pub(crate) enum Heard {
    Nothing,
    Acknowledged,
    Rejected { reason: String },
}

impl Subscriber {
    pub(crate) fn new(instance: u64) -> Self {
        Self {
            instance,
            nonces: 0,
            types: BTreeMap::new(),
        }
    }

    pub(crate) fn request(
        &mut self,
        request: DeltaDiscoveryRequest,
    ) -> Result<Heard, Unacceptable> {
        let Some(kind) = Kind::from_type_url(&request.type_url) else {
            return Err(Unacceptable::UnknownType {
                type_url: request.type_url.chars().take(256).collect(),
            });
        };
        let names =
            (request.resource_names_subscribe.iter()).chain(&request.resource_names_unsubscribe);
        if names.map(String::len).any(|length| length > MAX_NAME_BYTES) {
            return Err(Unacceptable::NameTooLong {
                limit: MAX_NAME_BYTES,
            });
        }
        let heard = match (request.response_nonce.is_empty(), request.error_detail) {
            (true, _) => Heard::Nothing,
            (false, None) => Heard::Acknowledged,
            (false, Some(status)) => Heard::Rejected {
                reason: status.message.chars().take(4096).collect(),
            },
        };
        let subscription = self.types.entry(kind).or_insert_with(|| {
            // SPEC: a first request without names means all of them.
            let wildcard = request.resource_names_subscribe.is_empty();
            let captured_only = kind == Kind::Address && request.node.is_some_and(takes_captured);
            Subscription::new(wildcard, captured_only, request.initial_resource_versions)
        });
        subscription.answered(&request.response_nonce);
        subscription.subscribe(request.resource_names_subscribe);
        subscription.unsubscribe(&request.resource_names_unsubscribe);
        if subscription.names() > MAX_NAMES {
            return Err(Unacceptable::TooManyNames { limit: MAX_NAMES });
        }
        Ok(heard)
    }

    /// Might [`poll`](Self::poll) have something to send? Cheap; says yes too often rather than too rarely.
    pub(crate) fn may_send(&self, published: &Published) -> bool {
        (self.types.iter()).any(|(kind, one)| one.may_send(published.set(*kind)))
    }

    /// Has everything that was subscribed to been answered once, and has the subscriber taken it?
    pub(crate) fn is_settled(&self) -> bool {
        !self.types.is_empty() && self.types.values().all(Subscription::is_settled)
    }

    /// The next response on the way to this snapshot.
    ///
    /// # Errors
    /// [`TooFarBehind`]: the stream must end.
    pub(crate) fn poll(&mut self, published: &Published) -> Result<Option<Response>, TooFarBehind> {
        for (kind, subscription) in &mut self.types {
            let nonce = self.nonces + 1;
            let Some(push) =
                subscription.poll(published.set(*kind), published.number, &nonce.to_string())?
            else {
                continue;
            };
            self.nonces = nonce;
            return Ok(Some(Response {
                version: Version {
                    instance: self.instance,
                    number: push.number,
                }
                .to_string(),
                kind: *kind,
                nonce: nonce.to_string(),
                resources: push.resources,
                removed: push.removed,
            }));
        }
        Ok(None)
    }
}

/// Does it say of itself that it takes what concerns who captures?
fn takes_captured(node: Node) -> bool {
    let metadata = node.metadata.unwrap_or_default();
    let takes = metadata
        .fields
        .get(TAKES)
        .and_then(|value| value.kind.as_ref());
    matches!(takes, Some(Value::StringValue(takes)) if takes == TAKES_CAPTURED)
}

#[cfg(test)]
mod tests;
