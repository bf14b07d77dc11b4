// SPDX-License-Identifier: Apache-2.0
mod asked;
mod backoff;
mod held;
mod interner;
mod receive;

use crate::{Config, Rejected, ResourceType, Status, Update};
use asked::Asked;
use backoff::Backoff;
use held::{Changes, Held, Known};
use interner::Interner;
use podveil_model::Lookup;
use podveil_proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use podveil_proto::google::rpc;
use rand::SeedableRng;
use rand::rngs::StdRng;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A stream that lived and answered for less than this was not a success: the next pause is longer.
const HEALTHY_AFTER: Duration = Duration::from_secs(1);
/// Reasons of a NACK are cut here; they go into logs on the other side.
const MAX_REASON_BYTES: usize = 4096;

/// The protocol of one client: no sockets, no clock, no task.
///
/// ```text
/// Waiting --opening()--> Opening --response--> Open
///    ^                      |                    |
///    +------- lost() -------+------- lost() -----+
/// ```
///
/// While waiting, [`connect_at`](Self::connect_at) says until when. On a stream, [`poll_send`](Self::poll_send) gives
/// the requests, each [`response`](Self::response) is turned into updates, and [`answer`](Self::answer), called once
/// they are in use, makes the ACK or NACK and records the versions. An answer may come after its stream is lost: what
/// it says of what is in use still holds, and is what the next stream begins with.
#[derive(Debug)]
pub struct Session {
    config: Config,
    random: StdRng,
    backoff: Backoff,
    link: Link,
    /// Which stream we are on; answers to responses of earlier ones are not sent.
    stream: u64,
    outbox: VecDeque<DeltaDiscoveryRequest>,
    held: BTreeMap<ResourceType, Held>,
    asked: Asked,
    unanswered: BTreeMap<u64, Unanswered>,
    next_id: u64,
    /// `system_version_info` of the newest response with addresses.
    version: Arc<str>,
    last_error: Option<Arc<str>>,
    interner: Interner,
}

#[derive(Debug)]
enum Link {
    Waiting { until: Instant },
    Opening,
    Open { since: Instant },
}

/// A response that is on its way to the consumer.
#[derive(Debug)]
struct Unanswered {
    resource_type: ResourceType,
    /// The stream that it came on, and its nonce; `None` where it is no response.
    to: Option<(u64, String)>,
    changes: Changes,
    /// Reasons of the resources that were rejected in it.
    rejection: Option<String>,
}

/// A response, parsed; or, on demand, what is let go without one.
#[derive(Clone, Debug, PartialEq)]
pub struct Received {
    /// To be given to [`Session::answer`].
    pub id: u64,
    pub resource_type: ResourceType,
    pub version: Arc<str>,
    pub updates: Vec<Update>,
    pub rejected: Vec<Rejected>,
}

/// Too many questions are open; ask again later.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{limit} keys have been asked for")]
pub struct AskRefused {
    pub limit: usize,
}

/// Why a stream ended.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Lost {
    pub reason: String,
}

impl Session {
    /// `seed`: for the jitter alone.
    pub fn new(config: Config, now: Instant, seed: u64) -> Self {
        let held = ResourceType::ALL
            .into_iter()
            .filter(|one| *one != ResourceType::MeshConfig || config.mesh_config)
            .map(|one| (one, Held::default()))
            .collect();
        Self {
            random: StdRng::seed_from_u64(seed),
            backoff: Backoff::new(config.backoff_min, config.backoff_max),
            link: Link::Waiting { until: now },
            stream: 0,
            outbox: VecDeque::new(),
            held,
            asked: Asked::new(config.on_demand, config.max_asked, config.ask_timeout),
            unanswered: BTreeMap::new(),
            next_id: 0,
            version: "".into(),
            last_error: None,
            interner: Interner::default(),
            config,
        }
    }

    /// When to open the next stream; `None` while there is one.
    pub fn connect_at(&self) -> Option<Instant> {
        match self.link {
            Link::Waiting { until } => Some(until),
            Link::Opening | Link::Open { .. } => None,
        }
    }

    /// A stream is being opened. Its first requests are ready to be sent: some servers answer nothing, not even
    /// headers, before they have them.
    pub fn opening(&mut self) {
        self.link = Link::Opening;
        self.stream += 1;
        self.outbox.clear();
        for resource_type in ResourceType::ALL {
            let Some(held) = self.held.get(&resource_type) else {
                continue;
            };
            let mut request = DeltaDiscoveryRequest {
                node: Some(self.config.node.to_wire()),
                type_url: resource_type.type_url().to_owned(),
                initial_resource_versions: held.versions(),
                ..Default::default()
            };
            if resource_type == ResourceType::Address && self.config.on_demand {
                // Both at once: on demand, beginning with nothing.
                request.resource_names_subscribe = vec!["*".to_owned()];
                request.resource_names_unsubscribe = vec!["*".to_owned()];
                let answers = self.asked.answers();
                request.initial_resource_versions.extend(answers);
            }
            self.outbox.push_back(request);
        }
        self.asked.ask_all_again();
    }

    /// The stream, or the attempt to open one, is over.
    pub fn lost(&mut self, now: Instant, lost: Lost) {
        if let Link::Open { since } = self.link
            && now.duration_since(since) >= HEALTHY_AFTER
        {
            self.backoff.reset();
        }
        let pause = self.backoff.draw(&mut self.random);
        self.link = Link::Waiting { until: now + pause };
        self.outbox.clear();
        self.last_error = Some(lost.reason.into());
    }

    /// # Errors
    /// [`AskRefused`] if the table is full of questions that may still be answered.
    pub fn ask(&mut self, now: Instant, lookup: Lookup) -> Result<(), AskRefused> {
        self.asked.ask(now, lookup)
    }

    /// On demand: these need not be kept up to date any more. That they are [let go](Self::take_let_go), with what only they
    /// meant, comes in the order of what is received.
    pub fn forget(&mut self, lookups: Vec<Lookup>) {
        let names = self.asked.forget(lookups);
        self.unsubscribe(names);
    }

    /// Has something been let go since the last response?
    pub fn has_let_go(&self) -> bool {
        self.asked.has_let_go()
    }

    /// What that is; to be answered like a response.
    pub fn take_let_go(&mut self) -> Received {
        let (mut updates, loose) = self.asked.take_let_go();
        updates.extend(loose.iter().cloned().map(Update::Unasked));
        let unanswered = Unanswered {
            resource_type: ResourceType::Address,
            to: None,
            rejection: None,
            changes: Changes {
                removed: loose.into_iter().collect(),
                ..Changes::default()
            },
        };
        Received {
            id: self.enter(unanswered),
            resource_type: ResourceType::Address,
            version: self.version.clone(),
            updates,
            rejected: Vec::new(),
        }
    }

    fn unsubscribe(&mut self, names: Vec<String>) {
        if !names.is_empty() && self.connect_at().is_none() {
            self.outbox.push_back(DeltaDiscoveryRequest {
                type_url: ResourceType::Address.type_url().to_owned(),
                resource_names_unsubscribe: names,
                ..Default::default()
            });
        }
    }

    fn enter(&mut self, unanswered: Unanswered) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.unanswered.insert(id, unanswered);
        id
    }

    /// Parses a response. `None`: it is of a type we did not subscribe to, and was refused.
    pub fn response(&mut self, now: Instant, response: DeltaDiscoveryResponse) -> Option<Received> {
        self.link = match self.link {
            Link::Opening => Link::Open { since: now },
            Link::Open { since } => Link::Open { since },
            // Of a stream already given up.
            Link::Waiting { .. } => return None,
        };
        let subscribed = ResourceType::from_type_url(&response.type_url)
            .filter(|resource_type| self.held.contains_key(resource_type));
        let Some(resource_type) = subscribed else {
            self.last_error = Some("response of a type that was not subscribed to".into());
            self.outbox.push_back(DeltaDiscoveryRequest {
                type_url: response.type_url,
                response_nonce: response.nonce,
                error_detail: Some(invalid_argument("not subscribed to this type".to_owned())),
                ..Default::default()
            });
            return None;
        };
        let contents = receive::Contents {
            resources: response.resources,
            removed: response.removed_resources,
        };
        let known = Known {
            held: self.held.get(&resource_type),
            // Newest first: what comes later will have been put into use later.
            coming: (self.unanswered.values().rev())
                .filter(|one| one.resource_type == resource_type)
                .map(|one| &one.changes)
                .collect(),
        };
        let parsed = contents.parse(
            resource_type,
            &known,
            &mut self.asked,
            &mut self.interner,
            self.config.max_resources,
        );
        let version: Arc<str> = response.system_version_info.into();
        if resource_type == ResourceType::Address {
            self.version = version.clone();
        }
        let id = self.enter(Unanswered {
            resource_type,
            to: Some((self.stream, response.nonce)),
            rejection: receive::join(&parsed.rejected),
            changes: parsed.changes,
        });
        Some(Received {
            id,
            resource_type,
            version,
            updates: parsed.updates,
            rejected: parsed.rejected,
        })
    }

    /// The consumer has put the updates of a response into use, or says why it could not.
    pub fn answer(&mut self, id: u64, answer: Result<(), String>) {
        let Some(response) = self.unanswered.remove(&id) else {
            return;
        };
        let in_use = answer.is_ok();
        let reasons: Vec<String> = response.rejection.into_iter().chain(answer.err()).collect();
        let rejection = (!reasons.is_empty()).then(|| truncated(reasons.join("; ")));
        if let Some(held) = self.held.get_mut(&response.resource_type)
            && in_use
        {
            held.apply(response.changes);
            held.acknowledged |= rejection.is_none() && response.to.is_some();
        }
        let Some((stream, nonce)) = response.to else {
            return;
        };
        self.last_error = rejection.clone().map(Into::into);
        if stream == self.stream && !matches!(self.link, Link::Waiting { .. }) {
            self.outbox.push_back(DeltaDiscoveryRequest {
                type_url: response.resource_type.type_url().to_owned(),
                response_nonce: nonce,
                error_detail: rejection.map(invalid_argument),
                ..Default::default()
            });
        }
    }

    /// Is there something to send?
    pub fn wants_to_send(&self) -> bool {
        self.connect_at().is_none() && (!self.outbox.is_empty() || self.asked.has_unsent())
    }

    /// The next request, in order.
    pub fn poll_send(&mut self) -> Option<DeltaDiscoveryRequest> {
        if !self.wants_to_send() {
            return None;
        }
        self.outbox.pop_front().or_else(|| {
            Some(DeltaDiscoveryRequest {
                type_url: ResourceType::Address.type_url().to_owned(),
                resource_names_subscribe: self.asked.take_unsent(),
                ..Default::default()
            })
        })
    }

    pub fn status(&self) -> Status {
        Status {
            connected: matches!(self.link, Link::Open { .. }),
            synced: self.held.iter().all(|(resource_type, held)| {
                let on_demand = *resource_type == ResourceType::Address && self.config.on_demand;
                held.acknowledged || on_demand
            }),
            last_error: self.last_error.clone(),
        }
    }
}

fn invalid_argument(message: String) -> rpc::Status {
    const INVALID_ARGUMENT: i32 = 3;
    rpc::Status {
        code: INVALID_ARGUMENT,
        message,
    }
}

fn truncated(mut text: String) -> String {
    if text.len() > MAX_REASON_BYTES {
        text.truncate(text.floor_char_boundary(MAX_REASON_BYTES));
        text.push_str("...");
    }
    text
}
