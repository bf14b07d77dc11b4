// SPDX-License-Identifier: Apache-2.0
//! The conversation on the wire, with time passed in.

use podveil_model::Lookup;
use podveil_proto::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource,
};
use podveil_proto::istio::security as policy;
use podveil_proto::istio::workload as wire;
use podveil_proto::type_url;
use podveil_xds_client::{Config, Lost, NodeInfo, ResourceType, Session, Update};
use prost::Message;
use prost_types::Any;
use std::time::{Duration, Instant};

fn config() -> Config {
    Config::new(NodeInfo {
        node: "n1".into(),
        name: "podveil-node-x".into(),
        namespace: "podveil-system".into(),
        ..Default::default()
    })
}

fn session(config: Config) -> (Session, Instant) {
    let now = Instant::now();
    (Session::new(config, now, 1), now)
}

fn sent(session: &mut Session) -> Vec<DeltaDiscoveryRequest> {
    std::iter::from_fn(|| session.poll_send()).collect()
}

/// The request of type Address among those that begin a stream.
fn addresses(session: &mut Session) -> DeltaDiscoveryRequest {
    let mut requests = sent(session).into_iter();
    requests
        .find(|one| one.type_url == type_url::ADDRESS)
        .unwrap()
}

fn workload(uid: &str, version: &str, address: &[u8]) -> Resource {
    let wire = wire::Address {
        r#type: Some(wire::address::Type::Workload(wire::Workload {
            uid: uid.into(),
            namespace: "shop".into(),
            node: "n1".into(),
            addresses: vec![address.to_vec()],
            ..Default::default()
        })),
    };
    Resource {
        version: version.into(),
        resource: Some(Any {
            type_url: type_url::ADDRESS.into(),
            value: wire.encode_to_vec(),
        }),
        name: uid.into(),
        aliases: Vec::new(),
    }
}

fn authorization(name: &str, version: &str, port: u32) -> Resource {
    let wire = policy::Authorization {
        name: name.into(),
        namespace: "shop".into(),
        scope: policy::Scope::Namespace.into(),
        action: policy::Action::Deny.into(),
        rules: vec![policy::Rule {
            clauses: vec![policy::Clause {
                matches: vec![policy::Match {
                    destination_ports: vec![port],
                    ..Default::default()
                }],
            }],
        }],
        ..Default::default()
    };
    Resource {
        version: version.into(),
        resource: Some(Any {
            type_url: type_url::AUTHORIZATION.into(),
            value: wire.encode_to_vec(),
        }),
        name: format!("shop/{name}"),
        aliases: Vec::new(),
    }
}

fn response(type_url: &str, nonce: &str, resources: Vec<Resource>) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        system_version_info: format!("1-{nonce}"),
        resources,
        type_url: type_url.into(),
        nonce: nonce.into(),
        removed_resources: Vec::new(),
    }
}

fn lost() -> Lost {
    Lost {
        reason: "gone".into(),
    }
}

#[test]
fn the_first_request_of_each_type_is_a_wildcard_with_the_node() {
    let (mut session, _) = session(config());
    session.opening();
    let requests = sent(&mut session);
    let types: Vec<&str> = requests.iter().map(|one| one.type_url.as_str()).collect();
    assert_eq!(
        types,
        [
            type_url::MESH_CONFIG,
            type_url::AUTHORIZATION,
            type_url::ADDRESS
        ]
    );
    for request in &requests {
        assert!(request.resource_names_subscribe.is_empty());
        let node = request.node.as_ref().unwrap();
        assert_eq!(
            node.id,
            "ztunnel~1.1.1.1~podveil-node-x.podveil-system~podveil-system.svc.cluster.local"
        );
        let fields = &node.metadata.as_ref().unwrap().fields;
        assert!(
            ["NAME", "NAMESPACE", "NODE_NAME", "INSTANCE_IPS"]
                .iter()
                .all(|key| fields.contains_key(*key))
        );
    }
}

#[test]
fn peers_are_asked_for_two_types_only_and_readiness_needs_no_third() {
    let (mut session, now) = session(Config {
        mesh_config: false,
        ..config()
    });
    session.opening();
    assert_eq!(sent(&mut session).len(), 2);
    for (nonce, resource_type) in [
        ("1", ResourceType::Address),
        ("2", ResourceType::Authorization),
    ] {
        assert!(!session.status().synced);
        let received = session
            .response(now, response(resource_type.type_url(), nonce, Vec::new()))
            .unwrap();
        session.answer(received.id, Ok(()));
    }
    assert!(session.status().synced);
    // A type that was not asked for is refused at once.
    assert_eq!(
        session.response(now, response(type_url::MESH_CONFIG, "3", Vec::new())),
        None
    );
    let refusal = sent(&mut session).pop().unwrap();
    assert!(refusal.error_detail.is_some());
}

#[test]
fn a_response_is_acknowledged_only_when_it_is_in_use() {
    let (mut session, now) = session(config());
    session.opening();
    sent(&mut session);
    let received = session
        .response(
            now,
            response(
                type_url::ADDRESS,
                "a",
                vec![workload("w1", "v1", &[10, 0, 0, 1])],
            ),
        )
        .unwrap();
    assert_eq!(&*received.version, "1-a");
    assert!(
        matches!(&received.updates[..], [Update::Workload(one)] if one.uid.to_string() == "w1")
    );
    assert!(sent(&mut session).is_empty());
    assert!(!session.status().synced);
    session.answer(received.id, Ok(()));
    let ack = sent(&mut session).pop().unwrap();
    assert_eq!((ack.response_nonce.as_str(), ack.error_detail), ("a", None));
    assert_eq!(ack.node, None);
}

#[test]
fn a_rejected_resource_is_named_and_the_valid_ones_are_kept() {
    let (mut session, now) = session(config());
    session.opening();
    sent(&mut session);
    let good = workload("w1", "v1", &[10, 0, 0, 1]);
    let bad = workload("w2", "v1", &[10, 0, 0]);
    let received = session
        .response(now, response(type_url::ADDRESS, "a", vec![good, bad]))
        .unwrap();
    assert!(
        matches!(&received.updates[..], [Update::Workload(one)] if one.uid.to_string() == "w1")
    );
    session.answer(received.id, Ok(()));
    let nack = sent(&mut session).pop().unwrap();
    assert_eq!(nack.response_nonce, "a");
    assert_eq!(
        nack.error_detail.unwrap().message,
        "w2: addresses: not a usable IP address"
    );
    assert!(!session.status().synced);

    // What was held before a rejection stays, with its version.
    let received = session
        .response(
            now,
            response(type_url::ADDRESS, "b", vec![workload("w1", "v2", &[1])]),
        )
        .unwrap();
    assert!(received.updates.is_empty());
    session.answer(received.id, Ok(()));
    session.lost(now, lost());
    session.opening();
    let versions = &addresses(&mut session).initial_resource_versions;
    assert_eq!(versions.len(), 1);
    assert_eq!(versions["w1"], "v1");
}

#[test]
fn a_batch_that_the_consumer_cannot_use_is_not_recorded() {
    let (mut session, now) = session(config());
    session.opening();
    sent(&mut session);
    let received = session
        .response(
            now,
            response(
                type_url::ADDRESS,
                "a",
                vec![workload("w1", "v1", &[10, 0, 0, 1])],
            ),
        )
        .unwrap();
    session.answer(received.id, Err("table full".into()));
    let nack = sent(&mut session).pop().unwrap();
    assert_eq!(nack.error_detail.unwrap().message, "table full");
    session.lost(now, lost());
    session.opening();
    assert!(addresses(&mut session).initial_resource_versions.is_empty());
}

#[test]
fn a_tombstone_comes_before_what_replaces_it_and_is_forgotten() {
    let (mut session, now) = session(config());
    session.opening();
    sent(&mut session);
    let first = session
        .response(
            now,
            response(
                type_url::ADDRESS,
                "a",
                vec![workload("w1", "v1", &[10, 0, 0, 1])],
            ),
        )
        .unwrap();
    session.answer(first.id, Ok(()));
    let mut second = response(
        type_url::ADDRESS,
        "b",
        vec![workload("w2", "v1", &[10, 0, 0, 1])],
    );
    second.removed_resources = vec!["w1".into()];
    let second = session.response(now, second).unwrap();
    assert!(matches!(
        &second.updates[..],
        [Update::AddressRemoved(name), Update::Workload(one)] if &**name == "w1" && one.uid.to_string() == "w2"
    ));
    session.answer(second.id, Ok(()));
    session.lost(now, lost());
    session.opening();
    let versions = &addresses(&mut session).initial_resource_versions;
    assert_eq!(versions.keys().collect::<Vec<_>>(), ["w2"]);
}

#[test]
fn an_answer_after_its_stream_was_lost_still_counts_as_in_use() {
    let (mut session, now) = session(config());
    session.opening();
    sent(&mut session);
    let received = session
        .response(
            now,
            response(
                type_url::ADDRESS,
                "a",
                vec![workload("w1", "v1", &[10, 0, 0, 1])],
            ),
        )
        .unwrap();
    session.lost(now, lost());
    session.answer(received.id, Ok(()));
    session.opening();
    let requests = sent(&mut session);
    assert_eq!(requests.len(), 3, "no answer to a nonce of another stream");
    assert_eq!(requests[2].initial_resource_versions["w1"], "v1");
}

#[test]
fn a_refused_policy_is_never_as_if_absent() {
    let (mut session, now) = session(config());
    session.opening();
    sent(&mut session);
    // Nothing held: a stand-in refuses what the policy may apply to.
    let first = session
        .response(
            now,
            response(
                type_url::AUTHORIZATION,
                "a",
                vec![authorization("p", "v1", 0)],
            ),
        )
        .unwrap();
    assert!(matches!(
        &first.updates[..],
        [Update::Policy { name, policy }] if &**name == "shop/p" && policy.rules[0].clauses.is_empty()
    ));
    session.answer(first.id, Ok(()));
    // A good state: held even while its acknowledgement is still to come.
    let good = session
        .response(
            now,
            response(
                type_url::AUTHORIZATION,
                "b",
                vec![authorization("p", "v2", 80)],
            ),
        )
        .unwrap();
    let bad = session
        .response(
            now,
            response(
                type_url::AUTHORIZATION,
                "c",
                vec![authorization("p", "v3", 0)],
            ),
        )
        .unwrap();
    assert!(bad.updates.is_empty());
    session.answer(good.id, Ok(()));
    session.answer(bad.id, Ok(()));
    let nacks = sent(&mut session)
        .iter()
        .filter(|one| one.error_detail.is_some())
        .count();
    assert_eq!(nacks, 2);
}

fn key(ip: &str) -> Lookup {
    Lookup::Address(ip.parse().unwrap())
}

#[test]
fn a_question_is_sent_once_and_its_negative_answer_names_the_key() {
    let (mut session, now) = session(config());
    session.opening();
    sent(&mut session);
    session.ask(now, key("10.0.0.9")).unwrap();
    session.ask(now, key("10.0.0.9")).unwrap();
    let requests = sent(&mut session);
    assert_eq!(requests.len(), 1);
    assert_eq!(requests[0].resource_names_subscribe, ["/10.0.0.9"]);
    session.ask(now, key("10.0.0.9")).unwrap();
    assert!(!session.wants_to_send());

    let mut answer = response(type_url::ADDRESS, "a", Vec::new());
    answer.removed_resources = vec!["/10.0.0.9".into()];
    let received = session.response(now, answer).unwrap();
    assert_eq!(received.updates, [Update::NotFound(key("10.0.0.9"))]);
    // Answered: it may be asked again.
    session.ask(now, key("10.0.0.9")).unwrap();
    assert_eq!(sent(&mut session).len(), 1);
}

#[test]
fn an_open_question_is_asked_again_on_the_next_stream_and_after_its_timeout() {
    let (mut session, now) = session(config());
    session.ask(now, key("10.0.0.9")).unwrap();
    session.opening();
    assert_eq!(
        sent(&mut session).last().unwrap().resource_names_subscribe,
        ["/10.0.0.9"]
    );
    session.lost(now, lost());
    session.opening();
    assert_eq!(
        sent(&mut session).last().unwrap().resource_names_subscribe,
        ["/10.0.0.9"]
    );
    let later = now + config().ask_timeout;
    session.ask(later, key("10.0.0.9")).unwrap();
    assert_eq!(sent(&mut session).len(), 1);
    // The resource itself, by an alias, is the positive answer.
    let mut resource = workload("w9", "v1", &[10, 0, 0, 9]);
    resource.aliases = vec!["/10.0.0.9".into()];
    session
        .response(later, response(type_url::ADDRESS, "a", vec![resource]))
        .unwrap();
    session.lost(later, lost());
    session.opening();
    assert_eq!(sent(&mut session).len(), 3, "nothing is asked any more");
}

#[test]
fn the_table_of_questions_is_bounded() {
    let (mut session, now) = session(Config {
        max_asked: 2,
        ..config()
    });
    session.ask(now, key("10.0.0.1")).unwrap();
    session.ask(now, key("10.0.0.2")).unwrap();
    assert!(session.ask(now, key("10.0.0.3")).is_err());
    let later = now + config().ask_timeout;
    session.ask(later, key("10.0.0.3")).unwrap();
}

/// On demand, with its stream open and these questions sent.
fn on_demand(questions: &[Lookup]) -> (Session, Instant) {
    let (mut session, now) = session(Config {
        on_demand: true,
        ..config()
    });
    session.opening();
    let first = addresses(&mut session);
    assert_eq!(first.resource_names_subscribe, ["*"]);
    assert_eq!(first.resource_names_unsubscribe, ["*"]);
    for question in questions {
        session.ask(now, question.clone()).unwrap();
    }
    sent(&mut session);
    (session, now)
}

fn named(uid: &str, aliases: &[&str]) -> Resource {
    Resource {
        aliases: aliases.iter().map(ToString::to_string).collect(),
        ..workload(uid, "v1", &[10, 0, 0, 9])
    }
}

/// What a response brings, in words; it is taken into use.
fn brings(
    session: &mut Session,
    now: Instant,
    resources: Vec<Resource>,
    removed: &[&str],
) -> Vec<String> {
    let mut one = response(type_url::ADDRESS, "a", resources);
    one.removed_resources = removed.iter().map(ToString::to_string).collect();
    let received = session.response(now, one).unwrap();
    session.answer(received.id, Ok(()));
    words(&received.updates)
}

/// What is let go without a response.
fn lets_go(session: &mut Session) -> Vec<String> {
    assert!(session.has_let_go());
    let received = session.take_let_go();
    session.answer(received.id, Ok(()));
    assert!(!session.has_let_go());
    words(&received.updates)
}

fn words(updates: &[Update]) -> Vec<String> {
    let word = |update: &Update| match update {
        Update::Workload(workload) => workload.uid.to_string(),
        Update::AddressRemoved(name) => format!("{name} is gone"),
        Update::Forgotten(lookup) => format!("{lookup} forgotten"),
        Update::Found(lookup) => format!("{lookup} found"),
        Update::NotFound(lookup) => format!("{lookup} not found"),
        Update::Unasked(name) => format!("{name} let go"),
        other => panic!("{other:?}"),
    };
    updates.iter().map(word).collect()
}

/// Names that are subscribed to, and after `-` those that are not any more, of what is sent now.
fn subscriptions(session: &mut Session) -> Vec<String> {
    let requests = sent(session).into_iter();
    requests
        .flat_map(|one| {
            let given_up = one.resource_names_unsubscribe.into_iter();
            let given_up = given_up.map(|name| format!("-{name}"));
            given_up.chain(one.resource_names_subscribe)
        })
        .collect()
}

/// What the next stream begins with.
fn come_again(session: &mut Session, now: Instant) -> Vec<(String, String)> {
    session.lost(now, lost());
    session.opening();
    let mut requests = sent(session);
    assert_eq!(requests.len(), 3, "nothing is asked beside what is told");
    let versions = std::mem::take(&mut requests[2].initial_resource_versions);
    let mut versions: Vec<_> = versions.into_iter().collect();
    versions.sort();
    versions
}

#[test]
fn on_demand_begins_with_nothing_and_keeps_what_it_asked_for() {
    let (mut session, now) = on_demand(&[key("10.0.0.9"), key("10.0.0.7")]);
    let answer = vec![named("w9", &["/10.0.0.9?1"])];
    assert_eq!(
        brings(&mut session, now, answer.clone(), &["/10.0.0.7?2"]),
        ["/10.0.0.7 not found", "w9", "/10.0.0.9 found"]
    );
    // What is kept up to date is not asked again, and its next state is no answer any more.
    let later = now + Duration::from_secs(3600);
    session.ask(later, key("10.0.0.9")).unwrap();
    assert_eq!(subscriptions(&mut session), Vec::<String>::new());
    assert_eq!(brings(&mut session, now, answer, &[]), ["w9"]);

    session.ask(now, key("10.0.0.8")).unwrap();
    let versions = come_again(&mut session, now);
    let means = format!("+{:016x}", podveil_model::digest(["w9"]));
    let expected = [
        ("/10.0.0.7?2", "-"),
        ("/10.0.0.8?3", ""),
        ("/10.0.0.9?1", &*means),
        ("w9", "v1"),
    ];
    let expected = expected.map(|(name, version)| (name.to_owned(), version.to_owned()));
    assert_eq!(versions, expected);
}

#[test]
fn on_demand_what_nothing_asked_for_means_any_more_is_let_go() {
    let (service, address) = ("/10.96.0.1?1", "/10.0.0.9?2");
    let (mut session, now) = on_demand(&[key("10.96.0.1"), key("10.0.0.9")]);
    let both = || vec![named("w1", &[service]), named("w9", &[service, address])];
    assert_eq!(
        brings(&mut session, now, both(), &[]),
        ["w1", "w9", "/10.0.0.9 found", "/10.96.0.1 found"]
    );
    sent(&mut session);
    // By the server: its last state is told too.
    let left = vec![named("w1", &[])];
    assert_eq!(brings(&mut session, now, left, &[]), ["w1", "w1 let go"]);
    // Answered anew, with other resources than before.
    brings(&mut session, now, both(), &[]);
    let anew = vec![named("w2", &[service])];
    assert_eq!(
        brings(&mut session, now, anew, &[service]),
        [
            "/10.96.0.1 not found",
            "w2",
            "w1 let go",
            "/10.96.0.1 found"
        ]
    );
    // Nobody has the service's address any more; one is still asked for by its own.
    assert_eq!(
        brings(&mut session, now, vec![], &[service]),
        ["/10.96.0.1 not found", "w2 let go"]
    );
    sent(&mut session);
    // By the consumer, who is told from when on.
    session.forget(vec![key("10.0.0.9"), key("10.0.0.1")]);
    assert_eq!(subscriptions(&mut session), ["-/10.0.0.9?2"]);
    assert_eq!(
        lets_go(&mut session),
        ["/10.0.0.9 forgotten", "/10.0.0.1 forgotten", "w9 let go"]
    );
    let versions = come_again(&mut session, now);
    assert_eq!(versions, [(service.to_owned(), "-".to_owned())]);
}

#[test]
fn on_demand_what_was_on_its_way_for_an_earlier_question_answers_no_later_one() {
    let (mut session, now) = on_demand(&[key("10.0.0.9")]);
    let first = || vec![named("w9", &["/10.0.0.9?1"])];
    brings(&mut session, now, first(), &[]);
    sent(&mut session);
    session.forget(vec![key("10.0.0.9")]);
    session.ask(now, key("10.0.0.9")).unwrap();
    // Both of the server's from before it hears of that, and in the order of what is received.
    assert_eq!(
        brings(&mut session, now, first(), &[]),
        ["/10.0.0.9 forgotten", "w9 let go", "w9 let go"]
    );
    assert_eq!(
        brings(&mut session, now, vec![], &["/10.0.0.9?1"]),
        Vec::<String>::new()
    );
    let asked = subscriptions(&mut session);
    assert_eq!(asked, ["-/10.0.0.9?1", "/10.0.0.9?2"]);
    let second = vec![named("w9", &["/10.0.0.9?2"])];
    assert_eq!(
        brings(&mut session, now, second, &[]),
        ["w9", "/10.0.0.9 found"]
    );
    assert_eq!(
        brings(&mut session, now, vec![], &["w9", "/10.0.0.9?2"]),
        ["w9 is gone", "/10.0.0.9 not found"]
    );
    assert!(!session.has_let_go(), "it is gone, not let go");
}

#[test]
fn on_demand_a_resource_that_is_not_understood_answers_nothing() {
    let (mut session, now) = on_demand(&[key("10.96.0.1")]);
    let mut broken = named("w2", &["/10.96.0.1?1"]);
    broken.resource = None;
    let half = vec![named("w1", &["/10.96.0.1?1"]), broken];
    assert_eq!(brings(&mut session, now, half, &[]), ["w1"]);
    // Given up, what has come of the half goes with it.
    session.forget(vec![key("10.96.0.1")]);
    assert_eq!(lets_go(&mut session), ["/10.96.0.1 forgotten", "w1 let go"]);
}

#[test]
fn on_demand_an_answer_anew_that_is_not_understood_opens_its_question_again() {
    let name = "/10.0.0.9?1";
    let (mut session, now) = on_demand(&[key("10.0.0.9")]);
    brings(&mut session, now, vec![named("w9", &[name])], &[]);
    let broken = Resource {
        resource: None,
        ..named("w8", &[name])
    };
    // Somebody has the address, though it cannot be said who: never nobody.
    assert_eq!(
        brings(&mut session, now, vec![broken], &[name]),
        ["/10.0.0.9 not found", "w9 let go", "/10.0.0.9 forgotten"]
    );
    let versions = come_again(&mut session, now);
    assert_eq!(versions, [(name.to_owned(), String::new())]);
    assert_eq!(
        brings(&mut session, now, vec![named("w8", &[name])], &[]),
        ["w8", "/10.0.0.9 found"]
    );
}

#[test]
fn pauses_grow_until_a_stream_has_lived() {
    let (mut session, mut now) = session(config());
    let pause = |session: &mut Session, now: Instant| {
        session.lost(now, lost());
        session.connect_at().unwrap() - now
    };
    for _ in 0..12 {
        session.opening();
        pause(&mut session, now);
    }
    session.opening();
    assert!(pause(&mut session, now) > Duration::from_secs(7));
    // One that answers and ends at once does not reset it.
    session.opening();
    session.response(now, response(type_url::ADDRESS, "a", Vec::new()));
    assert!(session.status().connected);
    assert!(pause(&mut session, now) > Duration::from_secs(7));
    session.opening();
    session.response(now, response(type_url::ADDRESS, "a", Vec::new()));
    now += Duration::from_secs(2);
    assert!(pause(&mut session, now) <= Duration::from_millis(10));
}

#[test]
fn resources_beyond_the_bound_are_refused() {
    let (mut session, now) = session(Config {
        max_resources: 1,
        ..config()
    });
    session.opening();
    let both = vec![
        workload("w1", "v", &[10, 0, 0, 1]),
        workload("w2", "v", &[10, 0, 0, 2]),
    ];
    let received = session
        .response(now, response(type_url::ADDRESS, "a", both))
        .unwrap();
    assert_eq!((received.updates.len(), received.rejected.len()), (1, 1));
    session.answer(received.id, Ok(()));
    // What is held may change.
    let again = vec![workload("w1", "v2", &[10, 0, 0, 3])];
    let received = session
        .response(now, response(type_url::ADDRESS, "b", again))
        .unwrap();
    assert_eq!((received.updates.len(), received.rejected.len()), (1, 0));
}
