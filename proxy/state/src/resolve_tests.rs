// SPDX-License-Identifier: Apache-2.0
use super::*;
use crate::Insert;
use podveil_model::{Epoch, Health, Lookup, Mode, Scope, Stage};
use podveil_testing::{answer_line, mesh, service, workload};

fn view(build: impl FnOnce(&mut View)) -> View {
    let mut view = View::default();
    view.insert_mesh(Arc::new(mesh()));
    view.set_synced();
    build(&mut view);
    view
}

fn resolve(view: &View, destination: &str) -> Answer {
    let source = workload("client").address("10.0.0.1").build();
    view.resolve(&source, OriginalDst(destination.parse().unwrap()))
}

#[test]
fn an_address_has_one_of_four_answers() {
    let view = view(|view| {
        view.insert_workload(workload("a").address("10.0.0.2").address("fd00::2").build());
        view.insert_workload(
            workload("b")
                .address("10.0.0.3")
                .stage(Stage::Announced)
                .exclude_inbound_port(9090)
                .build(),
        );
        for (name, ip, stage) in [
            ("none", "10.0.0.10", Stage::None),
            ("wanted", "10.0.0.11", Stage::Wanted),
            ("capturable", "10.0.0.12", Stage::Capturable),
            ("draining", "10.0.0.13", Stage::Draining),
        ] {
            view.insert_workload(workload(name).address(ip).stage(stage).build());
        }
    });
    for (destination, expected) in [
        ("10.0.0.2:80", "enrolled 10.0.0.2:80"),
        ("[fd00::2]:80", "enrolled [fd00::2]:80"),
        ("10.0.0.3:80", "enrolled 10.0.0.3:80"),
        ("10.0.0.3:9090", "plain PortExcluded 10.0.0.3:9090"),
        ("10.0.0.10:80", "plain NotEnrolled 10.0.0.10:80"),
        ("10.0.0.11:80", "plain NotEnrolled 10.0.0.11:80"),
        ("10.0.0.12:80", "plain NotEnrolled 10.0.0.12:80"),
        ("10.0.0.13:80", "enrolled 10.0.0.13:80"),
        ("1.1.1.1:443", "outside"),
        (
            "10.0.0.99:80",
            "not known: 10.0.0.99 may belong to the cluster and nothing is known about it",
        ),
        (
            "10.96.0.99:80",
            "not known: 10.96.0.99 may belong to the cluster and nothing is known about it",
        ),
    ] {
        assert_eq!(
            answer_line(resolve(&view, destination)),
            expected,
            "{destination}"
        );
    }
}

#[test]
fn a_service_is_never_passed_on_as_an_address() {
    let web = service("web")
        .address("10.96.0.80")
        .address("10.96.0.81")
        .port(80, 8080)
        .port(443, 0)
        .build();
    let empty = service("empty").address("10.96.0.70").port(80, 80).build();
    let view = view(|view| {
        for (name, ip, ports) in [
            ("a", "10.0.0.2", &[(80, 8081), (443, 8443)][..]),
            ("b", "10.0.0.3", &[][..]),
        ] {
            view.insert_workload(workload(name).address(ip).behind(&web, ports).build());
        }
        view.insert_service(web);
        view.insert_service(empty);
    });
    for (destination, expected) in [
        // The endpoint's own port comes before the service's target port.
        ("10.96.0.80:80", "enrolled 10.0.0.2:8081 10.0.0.3:8080"),
        ("10.96.0.81:80", "enrolled 10.0.0.2:8081 10.0.0.3:8080"),
        // A named port is served only by an endpoint that says which it is.
        ("10.96.0.80:443", "enrolled 10.0.0.2:8443"),
        (
            "10.96.0.80:81",
            "not known: service shop/web.shop.svc.cluster.local has no port 81",
        ),
        (
            "10.96.0.70:80",
            "not known: service shop/empty.shop.svc.cluster.local has no endpoint that can take a connection",
        ),
    ] {
        assert_eq!(
            answer_line(resolve(&view, destination)),
            expected,
            "{destination}"
        );
    }
}

#[test]
fn only_endpoints_that_can_take_a_connection_are_offered() {
    for (publish_not_ready, expected) in [
        (false, "enrolled 10.0.0.2:80"),
        (true, "enrolled 10.0.0.2:80 10.0.0.3:80"),
    ] {
        let web = service("web").address("10.96.0.80").port(80, 80);
        let web = if publish_not_ready {
            web.publish_not_ready().build()
        } else {
            web.build()
        };
        let view = view(|view| {
            for (name, ip, health) in [
                ("a", "10.0.0.2", Health::Healthy),
                ("b", "10.0.0.3", Health::Unhealthy),
                ("c", "10.0.0.4", Health::Terminating),
            ] {
                view.insert_workload(
                    workload(name)
                        .address(ip)
                        .health(health)
                        .behind(&web, &[])
                        .build(),
                );
            }
            view.insert_service(web);
        });
        assert_eq!(answer_line(resolve(&view, "10.96.0.80:80")), expected);
        // Its own address still reaches a terminating workload.
        assert_eq!(
            answer_line(resolve(&view, "10.0.0.4:80")),
            "enrolled 10.0.0.4:80"
        );
    }
}

#[test]
fn terminating_endpoints_are_used_only_where_there_is_no_other() {
    let web = service("web").address("10.96.0.80").port(80, 80).build();
    let mut view = view(|view| {
        let leaving = workload("leaving").address("10.0.0.2");
        let leaving = leaving.health(Health::Terminating).behind(&web, &[]);
        view.insert_workload(leaving.build());
        view.insert_service(web.clone());
    });
    assert_eq!(
        answer_line(resolve(&view, "10.96.0.80:80")),
        "enrolled 10.0.0.2:80"
    );
    let new = workload("new").address("10.0.0.3").behind(&web, &[]);
    view.insert_workload(new.build());
    assert_eq!(
        answer_line(resolve(&view, "10.96.0.80:80")),
        "enrolled 10.0.0.3:80"
    );
}

/// A mesh with nodes n1 and n2 at 172.18.0.1 and .2, a service on node port 30080 and host port 443 of n2.
fn nodes() -> View {
    let web = service("web").address("10.96.0.80").port(80, 8080);
    let web = web.node_port(30080, 80).build();
    view(|view| {
        let mut with_nodes = mesh();
        for (name, ip) in [("n1", "172.18.0.1"), ("n2", "172.18.0.2")] {
            let addresses = vec![ip.parse().unwrap()];
            with_nodes.nodes.insert(name.parse().unwrap(), addresses);
        }
        view.insert_mesh(Arc::new(with_nodes));
        let a = workload("a").address("10.0.0.2").behind(&web, &[]);
        view.insert_workload(a.node("n2").host_port(443, 8443).build());
        view.insert_service(web);
    })
}

#[test]
fn a_nodes_ports_lead_to_endpoints() {
    let mut view = nodes();
    for (destination, expected) in [
        ("172.18.0.1:30080", "enrolled 10.0.0.2:8080"),
        ("172.18.0.2:30080", "enrolled 10.0.0.2:8080"),
        ("172.18.0.2:443", "enrolled 10.0.0.2:8443"),
        // The host port is the other node's.
        ("172.18.0.1:443", "outside"),
        ("172.18.0.1:10250", "outside"),
        ("172.18.0.3:30080", "outside"),
    ] {
        assert_eq!(
            answer_line(resolve(&view, destination)),
            expected,
            "{destination}"
        );
    }
    assert!(view.remove_address("a"));
    assert_eq!(answer_line(resolve(&view, "172.18.0.2:443")), "outside");
    assert!(answer_line(resolve(&view, "172.18.0.2:30080")).contains("has no endpoint"));
    assert!(view.remove_address("shop/web.shop.svc.cluster.local"));
    assert_eq!(answer_line(resolve(&view, "172.18.0.2:30080")), "outside");
}

#[test]
fn an_endpoint_whose_address_is_not_its_own_is_reached_as_whoever_has_it() {
    let web = service("web").address("10.96.0.80").port(80, 80).build();
    for (address, expected) in [
        // A host-network pod, or something outside the cluster.
        ("172.18.0.1", "plain NotEnrolled 172.18.0.1:80"),
        // An enrolled pod: no service makes it plain.
        ("10.0.0.2", "enrolled 10.0.0.2:80"),
        // A pod's that is not known: never plain.
        (
            "10.0.0.99",
            "not known: service shop/web.shop.svc.cluster.local has no endpoint that can take a connection",
        ),
        (
            "169.254.169.254",
            "not known: service shop/web.shop.svc.cluster.local has no endpoint that can take a connection",
        ),
    ] {
        let view = view(|view| {
            view.insert_workload(workload("pod").address("10.0.0.2").build());
            let endpoint = workload("endpoint").address(address).host_network();
            let endpoint = endpoint.stage(Stage::None).behind(&web, &[]);
            view.insert_workload(endpoint.build());
            view.insert_service(web.clone());
        });
        assert_eq!(
            answer_line(resolve(&view, "10.96.0.80:80")),
            expected,
            "{address}"
        );
        let ip = address.parse().unwrap();
        assert!(
            view.all_by_address(ip)
                .iter()
                .all(|one| one.uid == "pod".into())
        );
    }
}

#[test]
fn endpoints_that_share_more_with_the_client_come_first() {
    let with = |prefer: &[Scope], only: bool| {
        let mut web = service("web").address("10.96.0.80").address("192.0.2.80");
        for scope in prefer {
            web = web.prefer(*scope);
        }
        let web = if only { web.only_preferred() } else { web };
        let web = web.port(80, 80).build();
        let view = view(|view| {
            for (name, ip, node, zone) in [
                ("a", "10.0.0.2", "n1", "z1"),
                ("b", "10.0.0.3", "n2", "z1"),
                ("c", "10.0.0.4", "n3", "z2"),
            ] {
                let endpoint = workload(name).address(ip).node(node).zone(zone);
                view.insert_workload(endpoint.behind(&web, &[]).build());
            }
            view.insert_service(web);
        });
        move |node: &str, zone: &str, to: &str| {
            let source = workload("client").address("10.0.0.1").node(node).zone(zone);
            match view.resolve(&source.build(), OriginalDst(to.parse().unwrap())) {
                Answer::Enrolled(upstreams) => upstreams
                    .iter()
                    .map(|upstream| upstream.workload.name.to_string())
                    .collect::<String>(),
                other => answer_line(other),
            }
        }
    };
    let zone = with(&[Scope::Zone, Scope::Node], false);
    assert_eq!(zone("n2", "z1", "10.96.0.80:80"), "bac");
    assert_eq!(zone("n1", "z1", "10.96.0.80:80"), "abc");
    // Nobody is near: anybody will do.
    assert_eq!(zone("n9", "z9", "10.96.0.80:80").len(), 3);

    let local = with(&[Scope::Node], true);
    assert_eq!(local("n3", "z1", "10.96.0.80:80"), "c");
    assert!(local("n9", "z1", "10.96.0.80:80").contains("has no endpoint"));
    // The policy is for the cluster's own addresses.
    assert_eq!(local("n3", "z1", "192.0.2.80:80").len(), 3);
}

#[test]
fn a_client_keeps_its_endpoint_while_that_is_there() {
    let time = std::time::Duration::from_secs(60);
    let web = service("web").address("10.96.0.80").port(80, 80);
    let web = web.affinity(time).build();
    let mut view = view(|view| {
        for number in 2..=9 {
            let ip = format!("10.0.0.{number}");
            view.insert_workload(workload(&ip).address(&ip).behind(&web, &[]).build());
        }
        view.insert_service(web.clone());
    });
    let affinity = Affinity::default();
    let first = |view: &View, client: &str, affinity: &Affinity| {
        let source = workload(client).address("10.0.0.1").build();
        let to = OriginalDst("10.96.0.80:80".parse().unwrap());
        match view.resolve_with(&source, to, affinity) {
            Answer::Enrolled(upstreams) => upstreams[0].workload.uid.clone(),
            other => panic!("{other:?}"),
        }
    };
    // Also without memory, as after a restart, it is the same one; for other clients there are others.
    let chosen = first(&view, "client", &affinity);
    for _ in 0..10 {
        assert_eq!(first(&view, "client", &affinity), chosen);
    }
    let others = (0..50).map(|number| first(&view, &format!("client-{number}"), &affinity));
    assert!(others.collect::<std::collections::BTreeSet<_>>().len() > 2);
    // What was used is kept, whoever else comes.
    let other = if chosen == "10.0.0.2".into() {
        "10.0.0.3"
    } else {
        "10.0.0.2"
    };
    affinity.keep(&web, &other.into());
    assert_eq!(first(&view, "client", &affinity), other.into());
    assert!(view.remove_address(other));
    assert_eq!(first(&view, "client", &affinity), chosen);
}

#[test]
fn before_everything_is_told_nothing_is_refused_for_good() {
    let mut view = View::default();
    view.insert_mesh(Arc::new(mesh()));
    view.insert_service(service("web").address("10.96.0.80").port(80, 80).build());
    for destination in ["10.96.0.80:80", "10.96.0.80:81", "203.0.113.1:80"] {
        assert!(answer_line(resolve(&view, destination)).contains("has not told everything yet"));
    }
}

#[test]
fn an_endpoint_of_another_family_is_not_offered() {
    let web = service("web").address("fd00::80").port(80, 80).build();
    let view = view(|view| {
        for number in 2..=20 {
            let ip = format!("10.0.0.{number}");
            view.insert_workload(workload(&ip).address(&ip).behind(&web, &[]).build());
        }
        let both = workload("both").address("10.0.0.30").address("fd00::30");
        view.insert_workload(both.behind(&web, &[]).build());
        view.insert_service(web);
    });
    for _ in 0..20 {
        assert_eq!(
            answer_line(resolve(&view, "[fd00::80]:80")),
            "enrolled [fd00::30]:80"
        );
    }
}

#[test]
fn one_connection_is_offered_endpoints_of_one_kind_only() {
    let web = service("web").address("10.96.0.80").port(80, 80).build();
    let view = view(|view| {
        for (name, ip, stage) in [
            ("a", "10.0.0.2", Stage::Mandatory),
            ("b", "10.0.0.3", Stage::None),
        ] {
            view.insert_workload(
                workload(name)
                    .address(ip)
                    .stage(stage)
                    .behind(&web, &[])
                    .build(),
            );
        }
        view.insert_service(web);
    });
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..200 {
        seen.insert(answer_line(resolve(&view, "10.96.0.80:80")));
    }
    assert_eq!(
        seen.into_iter().collect::<Vec<_>>(),
        ["enrolled 10.0.0.2:80", "plain NotEnrolled 10.0.0.3:80"]
    );
}

#[test]
fn a_service_cannot_take_a_workloads_address() {
    let thief = service("thief").address("10.0.0.2").port(80, 6666).build();
    let view = view(|view| {
        view.insert_workload(workload("a").address("10.0.0.2").build());
        view.insert_workload(
            workload("evil")
                .address("10.0.0.6")
                .behind(&thief, &[])
                .build(),
        );
        view.insert_service(thief);
    });
    assert_eq!(
        answer_line(resolve(&view, "10.0.0.2:80")),
        "enrolled 10.0.0.2:80"
    );
}

#[test]
fn without_ranges_every_address_is_asked_for_once() {
    let view = view(|view| {
        let mut without = mesh();
        without.ranges_known = false;
        view.insert_mesh(Arc::new(without));
        view.insert_negative("1.1.1.1".parse().unwrap());
    });
    assert_eq!(answer_line(resolve(&view, "1.1.1.1:80")), "outside");
    assert!(answer_line(resolve(&view, "1.1.1.2:80")).starts_with("not known"));
}

#[test]
fn before_the_mesh_is_known_nothing_is_outside() {
    let view = View::default();
    assert!(answer_line(resolve(&view, "1.1.1.1:80")).starts_with("not known"));
}

#[test]
fn a_range_named_as_plain_is_plain_only_where_nobody_is_known() {
    let listed = |view: &mut View| {
        let mut listed = mesh();
        listed.plain_outbound_ranges = vec!["10.96.0.10/32".parse().unwrap()];
        listed
            .plain_outbound_ranges
            .push("10.0.0.0/24".parse().unwrap());
        view.insert_mesh(Arc::new(listed));
        view.insert_workload(workload("a").address("10.0.0.2").build());
        // As the API server's: its endpoints are on the nodes' own network.
        let kubernetes = service("kubernetes").address("10.0.0.200").port(443, 6443);
        view.insert_service(kubernetes.build());
    };
    let complete = view(listed);
    assert_eq!(answer_line(resolve(&complete, "10.96.0.10:53")), "outside");
    assert_eq!(
        answer_line(resolve(&complete, "10.0.0.2:80")),
        "enrolled 10.0.0.2:80"
    );
    assert_eq!(answer_line(resolve(&complete, "10.0.0.200:443")), "outside");
    let mut incomplete = View::default();
    listed(&mut incomplete);
    assert!(answer_line(resolve(&incomplete, "10.96.0.10:53")).starts_with("not known"));
}

#[test]
fn an_older_state_never_unenrols() {
    let mut view = view(|view| {
        view.insert_workload(workload("a").address("10.0.0.2").epoch(5, 4).build());
    });
    for (resource_version, stage, expected) in [
        (5, 3, "enrolled 10.0.0.2:80"),
        (4, 9, "enrolled 10.0.0.2:80"),
        (5, 5, "plain NotEnrolled 10.0.0.2:80"),
    ] {
        let older = workload("a").address("10.0.0.2").stage(Stage::None);
        view.insert_workload(older.epoch(resource_version, stage).build());
        assert_eq!(
            answer_line(resolve(&view, "10.0.0.2:80")),
            expected,
            "{resource_version}.{stage}"
        );
    }
}

/// A replica that began to count earlier says what it knows at a lower epoch.
#[test]
fn an_older_decision_is_passed_over_and_what_it_does_not_decide_is_taken() {
    let view = view(|view| {
        for (uid, ip, stage) in [
            ("plain", "10.0.0.2", Stage::None),
            ("enrolled", "10.0.0.3", Stage::Mandatory),
        ] {
            let held = workload(uid).address(ip).stage(stage).mode(Mode::Strict);
            view.insert_workload(held.epoch(9, 2).build());
        }
        for (uid, ip) in [("plain", "10.0.0.4"), ("enrolled", "10.0.0.5")] {
            let older = workload(uid).address(ip).stage(Stage::None).epoch(7, 2);
            let insert = view.insert_workload(older.build());
            assert_eq!(
                insert,
                Insert::Older {
                    held: Epoch {
                        resource_version: 9,
                        stage: 2
                    }
                }
            );
        }
    });
    for (destination, expected) in [
        ("10.0.0.4:80", "plain NotEnrolled 10.0.0.4:80"),
        ("10.0.0.5:80", "enrolled 10.0.0.5:80"),
    ] {
        assert_eq!(
            answer_line(resolve(&view, destination)),
            expected,
            "{destination}"
        );
    }
    let enrolled = view.by_uid(&"enrolled".into()).unwrap();
    assert_eq!(enrolled.mode, Mode::Strict);
}

#[test]
fn a_removed_workload_is_not_brought_back_by_an_older_state() {
    let mut view = view(|view| {
        view.insert_workload(workload("a").address("10.0.0.2").epoch(5, 4).build());
    });
    assert!(view.remove_address("a"));
    assert!(answer_line(resolve(&view, "10.0.0.2:80")).starts_with("not known"));
    let older = workload("a").address("10.0.0.2").stage(Stage::None);
    view.insert_workload(older.epoch(5, 3).build());
    assert!(answer_line(resolve(&view, "10.0.0.2:80")).starts_with("not known"));
    view.insert_workload(workload("a").address("10.0.0.2").epoch(6, 0).build());
    assert_eq!(
        answer_line(resolve(&view, "10.0.0.2:80")),
        "enrolled 10.0.0.2:80"
    );
}

#[test]
fn an_address_that_passed_on_belongs_to_the_newer_workload() {
    let view = view(|view| {
        let old = workload("old").address("10.0.0.2").epoch(9, 0);
        view.insert_workload(old.health(Health::Terminating).build());
        view.insert_workload(workload("new").address("10.0.0.2").epoch(3, 0).build());
    });
    let ip = "10.0.0.2".parse().unwrap();
    assert_eq!(view.by_address(ip).unwrap().uid, "new".into());
    assert_eq!(view.all_by_address(ip).len(), 2);
}

#[test]
fn tables_shrink_with_what_they_hold() {
    let web = service("web").address("10.96.0.80").port(80, 80).build();
    let mut view = view(|view| {
        view.insert_workload(workload("a").address("10.0.0.2").behind(&web, &[]).build());
        view.insert_service(web.clone());
    });
    assert!(view.remove_address("a"));
    assert!(view.remove_address("shop/web.shop.svc.cluster.local"));
    assert!(!view.remove_address("shop/web.shop.svc.cluster.local"));
    assert!(view.endpoints(&web.key).is_none());
    assert!(view.services_at("10.96.0.80".parse().unwrap()).is_empty());
    assert!(view.all_by_address("10.0.0.2".parse().unwrap()).is_empty());
}

/// One that holds what is asked for, of a mesh with node `n1` at 172.18.0.2 and one address outside all ranges.
fn on_demand(build: impl FnOnce(&mut View)) -> View {
    let mut view = View::on_demand();
    let mut mesh = mesh();
    mesh.nodes = [("n1".parse().unwrap(), vec!["172.18.0.2".parse().unwrap()])].into();
    mesh.outlying = Some(["203.0.113.7".parse().unwrap()].into());
    view.insert_mesh(Arc::new(mesh));
    view.set_synced();
    build(&mut view);
    view
}

fn told(view: &mut View, ip: &str) {
    view.set_told(Lookup::Address(ip.parse().unwrap()));
}

#[test]
fn on_demand_nothing_is_concluded_from_what_was_not_asked_for() {
    let unknown = |ip: &str| {
        format!("not known: {ip} may belong to the cluster and nothing is known about it")
    };
    let line = |view: &View, to: &str| answer_line(resolve(view, to));
    let mut view = on_demand(|view| {
        // Held for another reason, e.g. as an endpoint of a service: somebody newer may have its address.
        view.insert_workload(workload("a").address("10.0.0.2").build());
        // Somebody claims an address by a service of his own.
        view.insert_service(service("taker").address("10.0.0.3").port(80, 80).build());
    });
    for (to, ip) in [
        ("10.0.0.2:80", "10.0.0.2"),
        ("10.0.0.3:80", "10.0.0.3"),
        ("10.96.0.1:80", "10.96.0.1"),
        ("203.0.113.7:80", "203.0.113.7"),
    ] {
        assert_eq!(line(&view, to), unknown(ip));
        let asked = Lookup::Address(ip.parse().unwrap());
        assert_eq!(view.lookups(to.parse().unwrap()), [asked]);
    }
    // Nobody asks for what nobody can be known by.
    assert_eq!(line(&view, "203.0.113.8:80"), "outside");
    assert_eq!(view.lookups("203.0.113.8:80".parse().unwrap()), []);

    for ip in ["10.0.0.2", "10.96.0.1", "203.0.113.7"] {
        told(&mut view, ip);
    }
    assert_eq!(line(&view, "10.0.0.2:80"), "enrolled 10.0.0.2:80");
    assert_eq!(
        line(&view, "10.96.0.1:80"),
        unknown("10.96.0.1"),
        "refused in the end"
    );
    assert_eq!(line(&view, "203.0.113.7:80"), "outside");
    view.forget(&Lookup::Address("10.0.0.2".parse().unwrap()));
    assert_eq!(line(&view, "10.0.0.2:80"), unknown("10.0.0.2"));
}

#[test]
fn on_demand_a_nodes_address_is_outside_once_nobody_has_its_port() {
    let to = "172.18.0.2:30080";
    let mut view = on_demand(|_| {});
    let lookups = view.lookups(to.parse().unwrap());
    let names: Vec<String> = lookups.iter().map(ToString::to_string).collect();
    assert_eq!(
        names,
        [
            "podveil.io/host-port/n1/30080",
            "podveil.io/node-port/30080"
        ]
    );
    for lookup in lookups {
        assert!(matches!(resolve(&view, to), Answer::NotKnown(_)));
        view.set_told(lookup);
    }
    assert_eq!(answer_line(resolve(&view, to)), "outside");
}

#[test]
fn on_demand_without_known_ranges_every_address_is_asked_for() {
    let mut view = View::on_demand();
    let mut ours = mesh();
    (ours.ranges_known, ours.outlying) = (false, None);
    view.insert_mesh(Arc::new(ours));
    view.set_synced();
    assert!(matches!(resolve(&view, "1.1.1.1:443"), Answer::NotKnown(_)));
    told(&mut view, "1.1.1.1");
    assert_eq!(answer_line(resolve(&view, "1.1.1.1:443")), "outside");
}
