// SPDX-License-Identifier: Apache-2.0
use super::*;

/// On demand, as one that begins with nothing.
fn on_demand(snapshot: Snapshot) -> Pair {
    let mut pair = Pair::new(snapshot);
    pair.ask(DeltaDiscoveryRequest {
        resource_names_subscribe: vec!["*".into()],
        resource_names_unsubscribe: vec!["*".into()],
        ..addresses()
    });
    let first = pair.poll().unwrap();
    pair.acknowledge(&first);
    pair
}

#[test]
fn on_demand_a_service_is_answered_with_its_endpoints_and_followed_with_them() {
    let web_service = || service("web", "10.96.0.1", Some(30080));
    let (w1, w2) = (
        behind("w1", "10.0.0.1", &["web"]),
        behind("w2", "10.0.0.2", &["web"]),
    );
    let other = workload("w3", "10.0.0.3");
    let all = |w1: &Workload, w2: &Workload| {
        web(vec![web_service()], [w1.clone(), w2.clone(), other.clone()])
    };
    let mut pair = on_demand(all(&w1, &w2));
    pair.ask(subscribe(&["/10.96.0.1"]));
    let answer = next(&mut pair);
    assert_eq!(
        answer,
        ["shop/web /10.96.0.1", "w1 /10.96.0.1", "w2 /10.96.0.1"]
    );

    // By another name: whoever is meant by both is told with both.
    pair.ask(subscribe(&["podveil.io/node-port/30080", "/10.0.0.1"]));
    let (address, port) = ("/10.96.0.1", "podveil.io/node-port/30080");
    assert_eq!(
        next(&mut pair),
        [
            format!("shop/web {address} {port}"),
            format!("w1 /10.0.0.1 {address} {port}"),
            format!("w2 {address} {port}"),
        ]
    );

    // One changes, one leaves the service though it goes on, and one that nobody asked for changes.
    let unready = Workload {
        health: Health::Unhealthy,
        ..w2.clone()
    };
    pair.publisher.publish(all(&w1, &unready));
    assert_eq!(next(&mut pair), [format!("w2 {address} {port}")]);
    let left = behind("w2", "10.0.0.2", &[]);
    pair.publisher.publish(all(&w1, &left));
    assert_eq!(next(&mut pair), ["w2"], "nothing means it any more");
    let left = Workload {
        health: Health::Unhealthy,
        ..left
    };
    pair.publisher.publish(all(&w1, &left));
    assert_eq!(next(&mut pair), Vec::<String>::new());

    // A new endpoint, and the end of one.
    let w4 = behind("w4", "10.0.0.4", &["web"]);
    let now = web(vec![web_service()], [left.clone(), w4.clone()]);
    pair.publisher.publish(now);
    assert_eq!(
        next(&mut pair),
        [
            format!("w4 {address} {port}"),
            "-/10.0.0.1".into(),
            "-w1".into()
        ]
    );

    // The service is given up, by both its names.
    pair.ask(DeltaDiscoveryRequest {
        resource_names_unsubscribe: vec![address.into(), port.into()],
        ..addresses()
    });
    pair.publisher.publish(web(Vec::new(), [left]));
    assert_eq!(next(&mut pair), Vec::<String>::new());
}

#[test]
fn on_demand_a_name_that_a_service_takes_over_means_its_endpoints_too() {
    let w1 = behind("w1", "10.0.0.1", &["web"]);
    let mut pair = on_demand(web(vec![service("web", "10.96.0.1", None)], [w1.clone()]));
    pair.ask(subscribe(&["/10.96.0.2"]));
    assert_eq!(next(&mut pair), ["-/10.96.0.2"]);
    pair.publisher
        .publish(web(vec![service("web", "10.96.0.2", None)], [w1.clone()]));
    // Removed and told in one response: this is all that it means.
    let told = ["shop/web /10.96.0.2", "w1 /10.96.0.2", "-/10.96.0.2"];
    assert_eq!(next(&mut pair), told);
    // And loses again.
    pair.publisher
        .publish(web(vec![service("web", "10.96.0.3", None)], [w1.clone()]));
    assert_eq!(next(&mut pair), ["shop/web", "-/10.96.0.2"]);
    // And the service itself, with its endpoints, by its name.
    pair.ask(subscribe(&["shop/web"]));
    assert_eq!(next(&mut pair), ["shop/web", "w1 shop/web"]);
    pair.publisher
        .publish(web(Vec::new(), [behind("w1", "10.0.0.1", &[])]));
    assert_eq!(next(&mut pair), ["w1", "-shop/web"]);
}

#[test]
fn on_demand_whoever_owns_the_address_of_an_endpoint_without_a_pod_is_told_with_it() {
    let endpoint = Workload {
        host_network: true,
        ..behind("endpoint", "10.0.0.1", &["web"])
    };
    let services = || vec![service("web", "10.96.0.1", None)];
    let mut pair = on_demand(web(services(), [endpoint.clone()]));
    pair.ask(subscribe(&["/10.96.0.1"]));
    assert_eq!(
        next(&mut pair),
        ["endpoint /10.96.0.1", "shop/web /10.96.0.1"]
    );
    let owner = workload("owner", "10.0.0.1");
    pair.publisher
        .publish(web(services(), [endpoint.clone(), owner.clone()]));
    assert_eq!(next(&mut pair), ["owner /10.96.0.1"]);
    // A service at that address is not behind this one, and not told with it, however early that is asked for.
    let outer = || [services(), vec![service("outer", "10.0.0.1", None)]].concat();
    pair.publisher
        .publish(web(outer(), [endpoint.clone(), owner.clone()]));
    assert_eq!(next(&mut pair), Vec::<String>::new());
    let mut late = on_demand(web(outer(), [endpoint.clone(), owner.clone()]));
    late.ask(subscribe(&["/10.96.0.1"]));
    let told = [
        "endpoint /10.96.0.1",
        "owner /10.96.0.1",
        "shop/web /10.96.0.1",
    ];
    assert_eq!(next(&mut late), told);
    let moved = Workload {
        addresses: vec!["10.0.0.2".parse().unwrap()],
        ..endpoint
    };
    pair.publisher.publish(web(
        services(),
        [moved, owner, workload("next", "10.0.0.2")],
    ));
    // Removed and told in one response: the owner from before is not among what it means.
    assert_eq!(
        next(&mut pair),
        [
            "endpoint /10.96.0.1",
            "next /10.96.0.1",
            "shop/web /10.96.0.1",
            "-/10.96.0.1"
        ]
    );
}

#[test]
fn on_demand_a_nodes_workloads_and_a_host_port_are_found() {
    let placed = |uid: &str, node: &str| Workload {
        node: node.parse().unwrap(),
        host_ports: [(8443, 443)].into(),
        ..workload(uid, "10.0.0.1")
    };
    let mut pair = on_demand(snapshot([placed("here", "n1"), placed("there", "n2")]));
    pair.ask(subscribe(&[
        "podveil.io/node/n1",
        "podveil.io/host-port/n2/8443",
    ]));
    assert_eq!(
        next(&mut pair),
        [
            "here podveil.io/node/n1",
            "there podveil.io/host-port/n2/8443"
        ]
    );
    pair.publisher.publish(snapshot([placed("there", "n1")]));
    assert_eq!(
        next(&mut pair),
        [
            "there podveil.io/node/n1",
            "-here",
            "-podveil.io/host-port/n2/8443"
        ]
    );
}

#[test]
fn on_demand_a_name_that_passes_from_one_service_to_another_means_the_other_ones_endpoints() {
    let (w1, w2) = (
        behind("w1", "10.0.0.1", &["one"]),
        behind("w2", "10.0.0.2", &["two"]),
    );
    let both = |one: &str, two: &str| {
        let services = vec![service("one", one, None), service("two", two, None)];
        web(services, [w1.clone(), w2.clone()])
    };
    let mut pair = on_demand(both("10.96.0.1", "10.96.0.2"));
    pair.ask(subscribe(&["/10.96.0.1?0", "/10.96.0.2?1"]));
    next(&mut pair);
    pair.publisher.publish(both("10.96.0.3", "10.96.0.1"));
    assert_eq!(
        next(&mut pair),
        [
            "shop/one",
            "shop/two /10.96.0.1?0",
            "w2 /10.96.0.1?0",
            "-/10.96.0.1?0",
            "-/10.96.0.2?1"
        ]
    );
    // In one step with the end of the one it passes from, seen from a stream that was behind.
    pair.publisher.publish(both("10.96.0.1", "10.96.0.2"));
    let only = web(
        vec![service("two", "10.96.0.1", None)],
        [behind("w1", "10.0.0.1", &[]), w2.clone()],
    );
    pair.publisher.publish(only);
    let told = next(&mut pair);
    assert!(told.contains(&"w2 /10.96.0.1?0".to_owned()), "{told:?}");
    assert!(told.contains(&"-/10.96.0.1?0".to_owned()), "{told:?}");
}

#[test]
fn on_demand_a_question_asked_again_is_another_one() {
    let mut pair = on_demand(snapshot([workload("w1", "10.0.0.1")]));
    pair.ask(subscribe(&["/10.0.0.1?0"]));
    assert_eq!(next(&mut pair), ["w1 /10.0.0.1?0"]);
    pair.ask(subscribe(&["/10.0.0.1?1"]));
    assert_eq!(next(&mut pair), ["w1 /10.0.0.1?0 /10.0.0.1?1"]);
    pair.ask(DeltaDiscoveryRequest {
        resource_names_unsubscribe: vec!["/10.0.0.1?0".into(), "w1".into()],
        ..addresses()
    });
    pair.publisher.publish(snapshot([]));
    assert_eq!(next(&mut pair), ["-/10.0.0.1?1", "-w1"]);
}

#[test]
fn on_demand_one_that_comes_again_is_told_what_differs() {
    let services = || vec![service("web", "10.96.0.1", None)];
    let [w1, w2] = ["w1", "w2"].map(|uid| behind(uid, "10.0.0.1", &["web"]));
    let mut pair = on_demand(web(services(), [w1.clone(), w2.clone()]));
    let (address, nobody) = ("/10.96.0.1?3", "/10.0.0.9?4");
    pair.ask(subscribe(&[address, nobody]));
    let answer = pair.poll().unwrap();
    let held: BTreeMap<String, String> = (answer.resources.iter())
        .map(|one| (one.name.clone(), one.version.clone()))
        .collect();
    let come_again = |pair: &mut Pair, questions: &[(&str, &str)]| {
        pair.subscriber = Subscriber::new(1);
        let questions = questions
            .iter()
            .map(|(name, answer)| ((*name).to_owned(), (*answer).to_owned()));
        pair.ask(DeltaDiscoveryRequest {
            resource_names_subscribe: vec!["*".into()],
            resource_names_unsubscribe: vec!["*".into()],
            initial_resource_versions: held.clone().into_iter().chain(questions).collect(),
            ..addresses()
        });
        next(pair)
    };
    let whole = format!("+{:016x}", podveil_model::digest(["shop/web", "w1", "w2"]));
    let asked = [(address, &*whole), (nobody, "-")];
    assert_eq!(come_again(&mut pair, &asked), Vec::<String>::new());
    // It is followed as before.
    let unready = Workload {
        health: Health::Unhealthy,
        ..w2.clone()
    };
    pair.publisher
        .publish(web(services(), [w1.clone(), unready.clone()]));
    assert_eq!(next(&mut pair), [format!("w2 {address}")]);
    // The same is meant, and one of it differs.
    assert_eq!(come_again(&mut pair, &asked), [format!("w2 {address}")]);

    // Meanwhile one has changed, one is gone, and there is one where nobody was.
    pair.publisher
        .publish(web(services(), [unready, workload("w9", "10.0.0.9")]));
    assert_eq!(
        come_again(&mut pair, &asked),
        [
            format!("shop/web {address}"),
            format!("w2 {address}"),
            format!("w9 {nobody}"),
            format!("-{nobody}"),
            format!("-{address}"),
            "-w1".into()
        ]
    );
    // A question without an answer is answered, whatever is held.
    pair.publisher.publish(web(services(), [w1, w2]));
    assert_eq!(
        come_again(&mut pair, &[(address, ""), (nobody, "+0")]),
        [
            format!("shop/web {address}"),
            format!("w1 {address}"),
            format!("w2 {address}"),
            format!("-{nobody}"),
            format!("-{address}")
        ]
    );
}
