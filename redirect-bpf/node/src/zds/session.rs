// SPDX-License-Identifier: Apache-2.0
use podveil_model::Uid;
use podveil_netns::NetNs;
use podveil_proto::istio::workload::zds as wire;
use prost::Message;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use wire::workload_request::Payload;
use wire::workload_response::Payload as Answer;

/// A pod that the proxy should have.
#[derive(Clone, Debug)]
pub enum Offer {
    Take(Taking),
    /// It cannot be handed over for now; a proxy that has it from before goes on serving it.
    Keep,
}

/// A pod to be taken, or taken again.
#[derive(Clone, Debug)]
pub struct Taking {
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    pub service_account: Arc<str>,
    pub netns: Arc<NetNs>,
    /// By the CNI plugin's word; empty where it was not asked.
    pub addresses: Arc<[IpAddr]>,
    /// Another number is another offer: the pod is told again.
    pub generation: u64,
}

impl Offer {
    /// `None`: nothing is to be taken.
    pub fn generation(&self) -> Option<u64> {
        match self {
            Self::Take(taking) => Some(taking.generation),
            Self::Keep => None,
        }
    }
}

/// A proxy that could not start a pod is asked again after this, as the peers have it.
pub const RETRY: Duration = Duration::from_secs(5);

/// The conversation with one proxy.
///
/// ```text
/// Hello ──hello──> Snapshot (add, keep..) ──snapshot sent, acknowledged──> Live (add, del)
/// ```
///
/// One request is open at a time. Each turn asks for the difference between what is offered and what the proxy has.
#[derive(Debug, Default)]
pub struct Session {
    phase: Phase,
    known: BTreeMap<Uid, Known>,
    open: Option<Request>,
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
enum Phase {
    #[default]
    Hello,
    Snapshot,
    Live,
}

#[derive(Debug)]
struct Known {
    /// `None`: it was only told to keep the pod, if it has it.
    generation: Option<u64>,
    result: Result<(), (String, Instant)>,
}

#[derive(Clone, Debug, Eq, PartialEq)]
enum Request {
    Add { uid: Uid, generation: u64 },
    Delete { uid: Uid },
    Keep { uid: Uid },
    SnapshotSent,
}

/// What to do now.
#[derive(Debug)]
pub enum Next {
    /// Send these bytes, and this namespace beside them; then wait for the answer.
    Send {
        bytes: Vec<u8>,
        netns: Option<Arc<NetNs>>,
    },
    /// Nothing, but ask again at this time.
    At(Instant),
    /// Nothing until the offers change.
    Idle,
}

#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error("the packet cannot be understood")]
    Decode(#[from] prost::DecodeError),
    #[error("an answer to no request")]
    NoRequest,
    #[error("an answer without content")]
    NoAnswer,
    #[error("the proxy speaks version {0} of ZDS, we speak 1")]
    Version(i32),
}

impl Session {
    /// Does this hello ask to follow the proxy that is connected?
    pub fn asks_to_take_over(packet: &[u8]) -> bool {
        wire::ZdsHello::decode(packet).is_ok_and(|hello| hello.take_over)
    }

    /// # Errors
    /// [`SessionError::Version`]: nothing may be sent to this client.
    pub fn hello(&mut self, packet: &[u8]) -> Result<(), SessionError> {
        let hello = wire::ZdsHello::decode(packet)?;
        if hello.version != i32::from(wire::Version::V1) {
            return Err(SessionError::Version(hello.version));
        }
        self.phase = Phase::Snapshot;
        Ok(())
    }

    /// The next request, unless one is open.
    pub fn next(&mut self, now: Instant, offers: &BTreeMap<Uid, Offer>) -> Next {
        if self.open.is_some() || self.phase == Phase::Hello {
            return Next::Idle;
        }
        // Before the end of the snapshot the proxy drops by itself what is not named.
        let gone = self.known.keys().find(|uid| !offers.contains_key(*uid));
        if let Some(uid) = gone.cloned() {
            let payload = Payload::Del(wire::DelWorkload {
                uid: uid.to_string(),
            });
            return self.send(Request::Delete { uid }, payload, None);
        }
        let mut again = None;
        for (uid, offer) in offers {
            match self.known.get(uid) {
                Some(known) if known.generation == offer.generation() => match &known.result {
                    Ok(()) => continue,
                    Err((_, at)) if *at > now => {
                        again = again.into_iter().chain([*at]).min();
                        continue;
                    }
                    Err(_) => {}
                },
                _ => {}
            }
            let (uid, text) = (uid.clone(), uid.to_string());
            let taking = match offer {
                Offer::Take(taking) => taking,
                // Only the end of a snapshot makes the proxy drop what was not named.
                Offer::Keep if self.phase == Phase::Live => continue,
                Offer::Keep => {
                    let payload = Payload::Keep(wire::KeepWorkload { uid: text });
                    return self.send(Request::Keep { uid }, payload, None);
                }
            };
            let payload = Payload::Add(wire::AddWorkload {
                uid: text,
                workload_info: Some(wire::WorkloadInfo {
                    name: taking.name.to_string(),
                    namespace: taking.namespace.to_string(),
                    service_account: taking.service_account.to_string(),
                    addresses: taking.addresses.iter().map(ToString::to_string).collect(),
                }),
            });
            let generation = taking.generation;
            let request = Request::Add { uid, generation };
            return self.send(request, payload, Some(taking.netns.clone()));
        }
        if self.phase == Phase::Snapshot {
            let payload = Payload::SnapshotSent(wire::SnapshotSent {});
            return self.send(Request::SnapshotSent, payload, None);
        }
        again.map_or(Next::Idle, Next::At)
    }

    fn send(&mut self, request: Request, payload: Payload, netns: Option<Arc<NetNs>>) -> Next {
        self.open = Some(request);
        let bytes = wire::WorkloadRequest {
            payload: Some(payload),
        }
        .encode_to_vec();
        Next::Send { bytes, netns }
    }

    /// Takes the proxy's answer to the open request.
    /// # Errors
    /// The connection is of no more use.
    pub fn answer(&mut self, now: Instant, packet: &[u8]) -> Result<(), SessionError> {
        let response = wire::WorkloadResponse::decode(packet)?;
        let Some(Answer::Ack(ack)) = response.payload else {
            return Err(SessionError::NoAnswer);
        };
        match self.open.take().ok_or(SessionError::NoRequest)? {
            Request::Add { uid, generation } => {
                let result = if ack.error.is_empty() {
                    Ok(())
                } else {
                    tracing::warn!(%uid, error = ack.error, "the proxy could not take a pod");
                    Err((ack.error, now + RETRY))
                };
                let generation = Some(generation);
                self.known.insert(uid, Known { generation, result });
            }
            Request::Keep { uid } => {
                if !ack.error.is_empty() {
                    tracing::warn!(%uid, error = ack.error, "the proxy could not keep a pod");
                }
                let known = Known {
                    generation: None,
                    result: Ok(()),
                };
                self.known.insert(uid, known);
            }
            Request::Delete { uid } => {
                if !ack.error.is_empty() {
                    tracing::warn!(%uid, error = ack.error, "the proxy could not drop a pod");
                }
                self.known.remove(&uid);
            }
            Request::SnapshotSent => self.phase = Phase::Live,
        }
        Ok(())
    }

    /// What the proxy said to each pod: the offer's generation and its error.
    pub fn acknowledged(&self) -> BTreeMap<Uid, (u64, Result<(), Arc<str>>)> {
        self.known
            .iter()
            .filter_map(|(uid, known)| {
                let result = match &known.result {
                    Ok(()) => Ok(()),
                    Err((error, _)) => Err(error.as_str().into()),
                };
                Some((uid.clone(), (known.generation?, result)))
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(generation: u64) -> Offer {
        Offer::Take(Taking {
            name: "web-1".into(),
            namespace: "shop".into(),
            service_account: "web".into(),
            netns: Arc::new(NetNs::current().unwrap()),
            addresses: Arc::default(),
            generation,
        })
    }

    fn offers(list: &[(&str, u64)]) -> BTreeMap<Uid, Offer> {
        list.iter()
            .map(|(uid, generation)| (Uid::from(*uid), offer(*generation)))
            .collect()
    }

    fn live() -> Session {
        let mut session = Session::default();
        let hello = wire::ZdsHello {
            version: wire::Version::V1.into(),
            take_over: false,
        };
        session.hello(&hello.encode_to_vec()).unwrap();
        session
    }

    fn request(next: Next) -> (Payload, bool) {
        let Next::Send { bytes, netns } = next else {
            panic!("nothing to send: {next:?}");
        };
        let request = wire::WorkloadRequest::decode(bytes.as_slice()).unwrap();
        (request.payload.unwrap(), netns.is_some())
    }

    fn ack(error: &str) -> Vec<u8> {
        wire::WorkloadResponse {
            payload: Some(Answer::Ack(wire::Ack {
                error: error.into(),
            })),
        }
        .encode_to_vec()
    }

    #[test]
    fn a_snapshot_then_changes_one_at_a_time() {
        let now = Instant::now();
        let mut session = live();
        let two = offers(&[("a", 1), ("b", 1)]);
        for uid in ["a", "b"] {
            let (payload, has_netns) = request(session.next(now, &two));
            assert!(matches!(payload, Payload::Add(add) if add.uid == uid));
            assert!(has_netns);
            assert!(matches!(session.next(now, &two), Next::Idle));
            session.answer(now, &ack("")).unwrap();
        }
        let (payload, _) = request(session.next(now, &two));
        assert!(matches!(payload, Payload::SnapshotSent(_)));
        session.answer(now, &ack("")).unwrap();
        assert!(matches!(session.next(now, &two), Next::Idle));

        let changed = offers(&[("b", 2)]);
        let (payload, has_netns) = request(session.next(now, &changed));
        assert!(matches!(payload, Payload::Del(del) if del.uid == "a"));
        assert!(!has_netns);
        session.answer(now, &ack("")).unwrap();
        let (payload, _) = request(session.next(now, &changed));
        assert!(matches!(payload, Payload::Add(add) if add.uid == "b"));
        session.answer(now, &ack("")).unwrap();
        assert_eq!(session.acknowledged(), [("b".into(), (2, Ok(())))].into());
    }

    #[test]
    fn a_refused_pod_is_offered_again_later() {
        let now = Instant::now();
        let mut session = live();
        let one = offers(&[("a", 1)]);
        request(session.next(now, &one));
        session.answer(now, &ack("no listeners")).unwrap();
        let (payload, _) = request(session.next(now, &one));
        assert!(matches!(payload, Payload::SnapshotSent(_)));
        session.answer(now, &ack("")).unwrap();
        assert!(matches!(session.next(now, &one), Next::At(at) if at == now + RETRY));
        let (payload, _) = request(session.next(now + RETRY, &one));
        assert!(matches!(payload, Payload::Add(_)));
        session.answer(now + RETRY, &ack("")).unwrap();
        assert_eq!(session.acknowledged(), [("a".into(), (1, Ok(())))].into());
    }

    #[test]
    fn a_pod_that_cannot_be_handed_over_now_is_kept_through_the_snapshot() {
        let now = Instant::now();
        let mut session = live();
        let mut offers = BTreeMap::from([("a".into(), Offer::Keep)]);
        let (payload, has_netns) = request(session.next(now, &offers));
        assert!(matches!(payload, Payload::Keep(keep) if keep.uid == "a"));
        assert!(!has_netns);
        session.answer(now, &ack("")).unwrap();
        assert_eq!(session.acknowledged(), BTreeMap::new());
        let (payload, _) = request(session.next(now, &offers));
        assert!(matches!(payload, Payload::SnapshotSent(_)));
        session.answer(now, &ack("")).unwrap();

        // Afterwards there is no keeping; it is handed over when it can be, and taken back when it is gone.
        offers.insert("b".into(), Offer::Keep);
        assert!(matches!(session.next(now, &offers), Next::Idle));
        offers.insert("b".into(), offer(1));
        let (payload, _) = request(session.next(now, &offers));
        assert!(matches!(payload, Payload::Add(add) if add.uid == "b"));
        session.answer(now, &ack("")).unwrap();
        offers.remove(&Uid::from("a"));
        let (payload, _) = request(session.next(now, &offers));
        assert!(matches!(payload, Payload::Del(del) if del.uid == "a"));
    }

    #[test]
    fn a_client_out_of_turn_is_refused() {
        let now = Instant::now();
        let mut session = Session::default();
        let other = wire::ZdsHello {
            version: 7,
            take_over: false,
        };
        assert!(matches!(
            session.hello(&other.encode_to_vec()),
            Err(SessionError::Version(7))
        ));
        assert!(matches!(
            session.next(now, &offers(&[("a", 1)])),
            Next::Idle
        ));
        let mut session = live();
        assert!(matches!(
            session.answer(now, &ack("")),
            Err(SessionError::NoRequest)
        ));
        request(session.next(now, &offers(&[("a", 1)])));
        assert!(session.answer(now, b"\xff\xff").is_err());
    }
}
