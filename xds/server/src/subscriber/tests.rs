// SPDX-License-Identifier: Apache-2.0
//! The conversation of one stream, without a stream.

mod on_demand;

use super::*;
use crate::{Publisher, Snapshot};
use podveil_identity::WorkloadIdentity;
use podveil_model::{
    Balancing, EndpointPorts, Epoch, Health, Mode, Service, ServiceKey, Stage, Workload,
};
use podveil_policy::{Action, Policy, PolicyKey, Scope};
use podveil_proto::envoy::service::discovery::v3::DeltaDiscoveryResponse;
use podveil_proto::google::rpc;
use podveil_proto::type_url;
use prost::Message;
use std::sync::Arc;

fn workload(uid: &str, ip: &str) -> Workload {
    Workload {
        uid: uid.into(),
        name: uid.into(),
        identity: "spiffe://cluster.local/ns/shop/sa/web"
            .parse::<WorkloadIdentity>()
            .unwrap(),
        addresses: vec![ip.parse().unwrap()],
        node: "n1".parse().unwrap(),
        health: Health::Healthy,
        host_network: false,
        stage: Stage::None,
        epoch: Epoch::default(),
        mode: Mode::Permissive,
        workload_name: "".into(),
        canonical_name: "".into(),
        canonical_revision: "".into(),
        cluster: "Kubernetes".into(),
        services: Default::default(),
        policies: Default::default(),
        exclude_outbound_ports: Default::default(),
        exclude_inbound_ports: Default::default(),
        plain_inbound_ports: Default::default(),
        node_uid: None,
        probe_ports: Default::default(),
        host_ports: Default::default(),
        locality: Default::default(),
        external: Default::default(),
        capacity: 1,
    }
}

fn snapshot(workloads: impl IntoIterator<Item = Workload>) -> Snapshot {
    Snapshot {
        workloads: workloads.into_iter().map(Arc::new).collect(),
        ..Default::default()
    }
}

fn policy(name: &str) -> Arc<Policy> {
    Arc::new(Policy {
        key: PolicyKey {
            namespace: Some("shop".parse().unwrap()),
            name: name.into(),
        },
        scope: Scope::Namespace,
        action: Action::Deny,
        rules: Vec::new(),
        dry_run: false,
    })
}

/// A publisher and one subscriber to it.
struct Pair {
    publisher: Publisher,
    subscriber: Subscriber,
}

impl Pair {
    fn new(snapshot: Snapshot) -> Self {
        let publisher = Publisher::new(1);
        publisher.publish(snapshot);
        Self {
            publisher,
            subscriber: Subscriber::new(1),
        }
    }

    fn ask(&mut self, request: DeltaDiscoveryRequest) -> Heard {
        self.subscriber.request(request).unwrap()
    }

    fn poll(&mut self) -> Option<DeltaDiscoveryResponse> {
        let published = self.publisher.subscribe().borrow().clone().unwrap();
        let may_send = self.subscriber.may_send(&published);
        let response = self.subscriber.poll(&published).unwrap();
        assert!(
            response.is_none() || may_send,
            "nothing is sent that was not expected"
        );
        response.map(received)
    }

    fn acknowledge(&mut self, response: &DeltaDiscoveryResponse) {
        let heard = self.ask(DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            ..Default::default()
        });
        assert_eq!(heard, Heard::Acknowledged);
    }
}

/// As a client reads it from the wire.
fn received(response: Response) -> DeltaDiscoveryResponse {
    let message: Vec<u8> = response.into_chunks().unwrap().flatten().collect();
    let (prefix, message) = message.split_at(5);
    assert_eq!(prefix[0], 0, "not compressed");
    assert_eq!(prefix[1..], (message.len() as u32).to_be_bytes());
    DeltaDiscoveryResponse::decode(message).unwrap()
}

fn addresses() -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: type_url::ADDRESS.into(),
        ..Default::default()
    }
}

fn subscribe(names: &[&str]) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        resource_names_subscribe: names.iter().map(|name| (*name).to_owned()).collect(),
        ..addresses()
    }
}

fn names(response: &DeltaDiscoveryResponse) -> Vec<&str> {
    response
        .resources
        .iter()
        .map(|one| one.name.as_str())
        .collect()
}

#[test]
fn a_wildcard_stream_gets_everything_once_and_then_differences() {
    let (w1, w2) = (workload("w1", "10.0.0.1"), workload("w2", "10.0.0.2"));
    let mut pair = Pair::new(snapshot([w1.clone(), w2.clone()]));
    pair.ask(addresses());
    let first = pair.poll().unwrap();
    assert_eq!(names(&first), ["w1", "w2"]);
    assert_eq!(first.system_version_info, "1-1");
    pair.acknowledge(&first);
    assert_eq!(pair.poll(), None);

    let announced = Workload {
        stage: Stage::Announced,
        ..w2
    };
    assert_eq!(pair.publisher.publish(snapshot([announced])), 2);
    let second = pair.poll().unwrap();
    assert_eq!(names(&second), ["w2"]);
    assert_eq!(second.removed_resources, ["w1"]);
    assert_eq!(second.system_version_info, "1-2");
}

/// However much there is, no more than about a frame of it is put together at once.
#[test]
fn a_large_response_is_one_message_in_small_pieces() {
    let all = (0..2000).map(|n| workload(&format!("w{n:04}"), "10.0.0.1"));
    let mut pair = Pair::new(snapshot(all));
    pair.ask(addresses());
    pair.ask(subscribe(&["/10.0.0.1"]));
    let published = pair.publisher.subscribe().borrow().clone().unwrap();
    let response = pair.subscriber.poll(&published).unwrap().unwrap();
    let pieces = response.clone().into_chunks().unwrap();
    let lengths: Vec<usize> = pieces.map(|piece| piece.len()).collect();
    assert!(lengths.len() > 5, "{lengths:?}");
    assert!(
        lengths.iter().all(|length| *length < 17 * 1024),
        "{lengths:?}"
    );
    let response = received(response);
    assert_eq!(response.resources.len(), 2000);
    assert!((response.resources.iter()).all(|one| one.aliases == ["/10.0.0.1"]));
}

#[test]
fn the_first_response_of_a_type_is_sent_even_if_there_is_nothing() {
    let mut pair = Pair::new(Snapshot::default());
    pair.ask(DeltaDiscoveryRequest {
        type_url: type_url::AUTHORIZATION.into(),
        ..Default::default()
    });
    let response = pair.poll().unwrap();
    assert!(response.resources.is_empty() && response.removed_resources.is_empty());
    assert_eq!(pair.poll(), None);
}

#[test]
fn an_unrelated_change_wakes_nobody() {
    let w1 = workload("w1", "10.0.0.1");
    let mut pair = Pair::new(snapshot([w1.clone()]));
    pair.ask(addresses());
    let first = pair.poll().unwrap();
    pair.acknowledge(&first);

    // The same content in new objects: not even a new snapshot.
    let mut woken = pair.publisher.subscribe();
    woken.mark_unchanged();
    assert_eq!(pair.publisher.publish(snapshot([w1.clone()])), 1);
    assert!(!woken.has_changed().unwrap());

    // Another type.
    let with_policy = Snapshot {
        policies: vec![policy("p")],
        ..snapshot([w1.clone()])
    };
    assert_eq!(pair.publisher.publish(with_policy), 2);
    assert_eq!(pair.poll(), None);

    // Another name than the one asked for.
    let mut on_demand = Pair::new(snapshot([w1.clone()]));
    on_demand.ask(subscribe(&["w1"]));
    let first = on_demand.poll().unwrap();
    on_demand.acknowledge(&first);
    on_demand
        .publisher
        .publish(snapshot([w1, workload("w2", "10.0.0.2")]));
    assert_eq!(on_demand.poll(), None);
}

#[test]
fn one_push_is_under_way_and_the_next_holds_all_that_changed_since() {
    let mut pair = Pair::new(snapshot([workload("w1", "10.0.0.1")]));
    pair.ask(addresses());
    let first = pair.poll().unwrap();
    pair.publisher
        .publish(snapshot([workload("w1", "10.0.0.2")]));
    pair.publisher.publish(snapshot([
        workload("w1", "10.0.0.3"),
        workload("w2", "10.0.0.2"),
    ]));
    assert_eq!(pair.poll(), None);
    pair.acknowledge(&first);
    let next = pair.poll().unwrap();
    assert_eq!(names(&next), ["w1", "w2"]);
    assert_eq!(next.system_version_info, "1-3");
}

#[test]
fn one_that_does_not_answer_for_too_long_must_come_again_with_what_it_holds() {
    let state = |number: usize| {
        snapshot([workload(
            "w1",
            if number.is_multiple_of(2) {
                "10.0.0.1"
            } else {
                "10.0.0.2"
            },
        )])
    };
    let mut pair = Pair::new(state(0));
    pair.ask(addresses());
    let first = pair.poll().unwrap();
    // As many as are remembered.
    let remembered = crate::published::MAX_LOG_SETS;
    for number in 1..=remembered {
        pair.publisher.publish(state(number));
    }
    pair.acknowledge(&first);
    let next = pair.poll().unwrap();
    assert_eq!(names(&next), ["w1"]);
    for number in 1..=remembered + 1 {
        pair.publisher.publish(state(number));
    }
    pair.acknowledge(&next);
    let published = pair.publisher.subscribe().borrow().clone().unwrap();
    let too_late = pair.subscriber.poll(&published).unwrap_err();
    assert_eq!(too_late, TooFarBehind);
}

#[test]
fn a_rejected_push_is_not_repeated() {
    let mut pair = Pair::new(snapshot([workload("w1", "10.0.0.1")]));
    pair.ask(addresses());
    let first = pair.poll().unwrap();
    let heard = pair.ask(DeltaDiscoveryRequest {
        response_nonce: first.nonce,
        error_detail: Some(rpc::Status {
            code: 3,
            message: "w1: no".into(),
        }),
        ..addresses()
    });
    assert_eq!(
        heard,
        Heard::Rejected {
            reason: "w1: no".into()
        }
    );
    assert_eq!(pair.poll(), None);
}

#[test]
fn a_reconnecting_client_gets_only_what_differs() {
    let mut pair = Pair::new(snapshot([
        workload("w1", "10.0.0.1"),
        workload("w2", "10.0.0.2"),
    ]));
    pair.ask(addresses());
    let first = pair.poll().unwrap();
    let mut held: BTreeMap<String, String> = (first.resources.iter())
        .map(|one| (one.name.clone(), one.version.clone()))
        .collect();
    held.insert("w0".into(), "x".into());

    // Another replica with the same content gives the same versions.
    let mut other = Pair::new(snapshot([
        workload("w1", "10.0.0.1"),
        workload("w2", "10.0.0.9"),
    ]));
    other.ask(DeltaDiscoveryRequest {
        initial_resource_versions: held,
        ..addresses()
    });
    let response = other.poll().unwrap();
    assert_eq!(names(&response), ["w2"]);
    assert_eq!(response.removed_resources, ["w0"]);
}

/// A replica that saw a pod later, or has been restarted, counts its epoch from elsewhere.
#[test]
fn where_only_the_epoch_of_what_is_at_rest_differs_nothing_is_sent_again() {
    let of = |resource_version, stage| Workload {
        stage,
        epoch: Epoch {
            resource_version,
            stage: 2,
        },
        ..workload(&format!("{stage}"), "10.0.0.1")
    };
    let all = |version| {
        use Stage::{Announced, Capturable, Draining, Mandatory, None, Wanted};
        let stages = [None, Wanted, Capturable, Announced, Mandatory, Draining];
        snapshot(stages.map(|stage| of(version, stage)))
    };
    let mut pair = Pair::new(all(7));
    pair.ask(addresses());
    let first = pair.poll().unwrap();
    let held: BTreeMap<String, String> = (first.resources.iter())
        .map(|one| (one.name.clone(), one.version.clone()))
        .collect();
    let mut other = Pair::new(all(9));
    other.ask(DeltaDiscoveryRequest {
        initial_resource_versions: held,
        ..addresses()
    });
    // Of these somebody may be waiting for the epoch.
    assert_eq!(
        names(&other.poll().unwrap()),
        ["announced", "capturable", "draining", "wanted"]
    );
}

#[test]
fn on_demand_an_address_is_answered_by_name_and_alias_or_by_its_absence() {
    let mut pair = Pair::new(snapshot([workload("w1", "10.0.0.1")]));
    pair.ask(DeltaDiscoveryRequest {
        resource_names_subscribe: vec!["*".into()],
        resource_names_unsubscribe: vec!["*".into()],
        ..addresses()
    });
    let first = pair.poll().unwrap();
    assert!(first.resources.is_empty());
    pair.acknowledge(&first);

    pair.ask(subscribe(&["/10.0.0.1", "/10.0.0.9"]));
    let answer = pair.poll().unwrap();
    assert_eq!(names(&answer), ["w1"]);
    assert_eq!(answer.resources[0].aliases, ["/10.0.0.1"]);
    assert_eq!(answer.removed_resources, ["/10.0.0.9"]);
    pair.acknowledge(&answer);

    // What was asked for is kept up to date: the address goes to another workload, and the unknown one appears.
    pair.publisher.publish(snapshot([
        workload("w2", "10.0.0.1"),
        workload("w3", "10.0.0.9"),
    ]));
    let update = pair.poll().unwrap();
    assert_eq!(names(&update), ["w2", "w3"]);
    assert_eq!(update.removed_resources, ["w1"]);
    pair.acknowledge(&update);

    pair.ask(DeltaDiscoveryRequest {
        resource_names_unsubscribe: vec!["/10.0.0.9".into()],
        ..addresses()
    });
    pair.publisher
        .publish(snapshot([workload("w2", "10.0.0.1")]));
    assert_eq!(pair.poll(), None);
}

/// `<name> <aliases>` of each resource of a response that is then acknowledged, and what is removed by it, after `-`.
fn next(pair: &mut Pair) -> Vec<String> {
    let Some(response) = pair.poll() else {
        return Vec::new();
    };
    pair.acknowledge(&response);
    let told = response.resources.iter().map(|one| {
        [std::slice::from_ref(&one.name), &one.aliases[..]]
            .concat()
            .join(" ")
    });
    let removed = response
        .removed_resources
        .iter()
        .map(|one| format!("-{one}"));
    told.chain(removed).collect()
}

fn service(name: &str, ip: &str, node_port: Option<u16>) -> Arc<Service> {
    Arc::new(Service {
        key: key(name),
        name: name.into(),
        addresses: vec![ip.parse().unwrap()],
        ports: Vec::new(),
        publish_not_ready: false,
        balancing: Balancing::default(),
        node_ports: node_port.map(|port| (port, 80)).into_iter().collect(),
    })
}

fn key(name: &str) -> ServiceKey {
    ServiceKey {
        namespace: "shop".parse().unwrap(),
        hostname: name.into(),
    }
}

fn behind(uid: &str, ip: &str, services: &[&str]) -> Workload {
    let services = services
        .iter()
        .map(|name| (key(name), EndpointPorts::new()));
    Workload {
        services: Arc::new(services.collect()),
        ..workload(uid, ip)
    }
}

fn web(services: Vec<Arc<Service>>, workloads: impl IntoIterator<Item = Workload>) -> Snapshot {
    Snapshot {
        services,
        ..snapshot(workloads)
    }
}

#[test]
fn who_captures_is_told_of_workloads_and_of_what_concerns_capture_in_them() {
    let services = || vec![service("web", "10.96.0.1", None)];
    let w1 = behind("w1", "10.0.0.1", &["web"]);
    let mut pair = Pair::new(web(services(), [w1.clone()]));
    let value = prost_types::Value {
        kind: Some(Value::StringValue(TAKES_CAPTURED.into())),
    };
    pair.ask(DeltaDiscoveryRequest {
        node: Some(Node {
            metadata: Some(prost_types::Struct {
                fields: [(TAKES.to_owned(), value)].into(),
            }),
            ..Node::default()
        }),
        ..addresses()
    });
    assert_eq!(next(&mut pair), ["w1"]);
    let unready = Workload {
        health: Health::Unhealthy,
        services: Default::default(),
        ..w1.clone()
    };
    pair.publisher.publish(web(services(), [unready.clone()]));
    assert_eq!(next(&mut pair), Vec::<String>::new());
    pair.publisher.publish(web(Vec::new(), [unready.clone()]));
    assert_eq!(next(&mut pair), Vec::<String>::new());
    // A change that does, and one that does not since.
    let wanted = Workload {
        stage: Stage::Wanted,
        ..unready
    };
    pair.publisher.publish(web(Vec::new(), [wanted.clone()]));
    let ready = Workload {
        health: Health::Healthy,
        ..wanted
    };
    pair.publisher
        .publish(web(services(), [ready.clone(), workload("w2", "10.0.0.2")]));
    assert_eq!(next(&mut pair), ["w1", "w2"]);
    pair.publisher.publish(web(services(), [ready]));
    assert_eq!(next(&mut pair), ["-w2"]);
}

#[test]
fn an_answer_between_two_pushes_does_not_claim_the_newer_snapshot() {
    let mut pair = Pair::new(snapshot([workload("w1", "10.0.0.1")]));
    pair.ask(addresses());
    let first = pair.poll().unwrap();
    pair.publisher
        .publish(snapshot([workload("w1", "10.0.0.2")]));
    pair.ask(subscribe(&["/10.0.0.9"]));
    let answer = pair.poll().unwrap();
    assert_eq!(answer.removed_resources, ["/10.0.0.9"]);
    assert_eq!(answer.system_version_info, "1-1");
    assert_eq!(pair.poll(), None);
    pair.acknowledge(&answer);
    assert_eq!(pair.poll(), None);
    pair.acknowledge(&first);
    assert_eq!(pair.poll().unwrap().system_version_info, "1-2");
}

#[test]
fn a_host_network_workload_is_not_found_by_its_nodes_address() {
    let host = Workload {
        host_network: true,
        ..workload("w1", "192.168.0.1")
    };
    let mut pair = Pair::new(snapshot([host]));
    pair.ask(subscribe(&["/192.168.0.1"]));
    assert_eq!(pair.poll().unwrap().removed_resources, ["/192.168.0.1"]);
}

#[test]
fn requests_out_of_bounds_are_refused() {
    let mut subscriber = Subscriber::new(1);
    let unknown = subscriber.request(DeltaDiscoveryRequest {
        type_url: "type.googleapis.com/envoy.config.cluster.v3.Cluster".into(),
        ..Default::default()
    });
    assert!(matches!(unknown, Err(Unacceptable::UnknownType { .. })));
    let long = "a".repeat(MAX_NAME_BYTES + 1);
    let too_long = subscriber.request(subscribe(&[&long]));
    assert!(matches!(too_long, Err(Unacceptable::NameTooLong { .. })));
    let many: Vec<String> = (0..=MAX_NAMES).map(|n| n.to_string()).collect();
    let too_many = subscriber.request(DeltaDiscoveryRequest {
        resource_names_subscribe: many,
        ..addresses()
    });
    assert!(matches!(too_many, Err(Unacceptable::TooManyNames { .. })));
}
