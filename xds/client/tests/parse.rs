// SPDX-License-Identifier: Apache-2.0
//! Each case takes a good resource, breaks one thing, and names the error.

use podveil_model::{Epoch, Health, Mode, Stage};
use podveil_policy::{Action, Match, Scope, StringMatch};
use podveil_proto::istio::security as policy;
use podveil_proto::istio::workload as wire;
use podveil_proto::podveil::node::v1 as ours;
use podveil_proto::{SERVICE_EXTENSION, WORKLOAD_EXTENSION, type_url};
use podveil_xds_client::parse::{self, Address};
use prost::Message;
use prost_types::Any;
use std::sync::Arc;

fn good_workload() -> wire::Workload {
    wire::Workload {
        uid: "uid-1".into(),
        name: "web-1".into(),
        namespace: "shop".into(),
        addresses: vec![vec![10, 0, 0, 1], [0xfd; 16].to_vec()],
        tunnel_protocol: wire::TunnelProtocol::Hbone.into(),
        trust_domain: "cluster.local".into(),
        service_account: "web".into(),
        node: "n1".into(),
        services: [(
            "shop/web.shop.svc.cluster.local".to_owned(),
            wire::PortList {
                ports: vec![wire::Port {
                    service_port: 80,
                    target_port: 8080,
                    app_protocol: 0,
                }],
            },
        )]
        .into(),
        ..Default::default()
    }
}

fn extension(extension: &ours::WorkloadExtension) -> wire::Extension {
    wire::Extension {
        name: WORKLOAD_EXTENSION.into(),
        config: Some(Any {
            type_url: type_url::WORKLOAD_EXTENSION.into(),
            value: extension.encode_to_vec(),
        }),
    }
}

fn parse_workload(wire: wire::Workload) -> Result<Arc<podveil_model::Workload>, String> {
    let name = wire.uid.clone();
    let bytes = wire::Address {
        r#type: Some(wire::address::Type::Workload(wire)),
    }
    .encode_to_vec();
    match parse::address(&name, &bytes) {
        Ok(Address::Workload(workload)) => Ok(workload),
        Ok(Address::Service(_)) => panic!("a workload became a service"),
        Err(error) => Err(error.to_string()),
    }
}

#[test]
fn a_peers_workload_is_taken_with_the_defaults_of_the_wire() {
    let workload = parse_workload(wire::Workload {
        trust_domain: String::new(),
        service_account: String::new(),
        ..good_workload()
    })
    .unwrap();
    assert_eq!(
        workload.identity.to_string(),
        "spiffe://cluster.local/ns/shop/sa/default"
    );
    assert_eq!(workload.stage, Stage::Announced);
    assert_eq!(workload.epoch, Epoch::default());
    assert_eq!(workload.mode, Mode::Permissive);
    assert_eq!(workload.capacity, 1);
    assert_eq!(&*workload.cluster, "Kubernetes");
    let (service, ports) = workload.services.first_key_value().unwrap();
    assert_eq!(service.to_string(), "shop/web.shop.svc.cluster.local");
    assert_eq!(ports.get(&80), Some(&8080));

    let plain = parse_workload(wire::Workload {
        tunnel_protocol: wire::TunnelProtocol::None.into(),
        ..good_workload()
    });
    assert_eq!(plain.unwrap().stage, Stage::None);
}

#[test]
fn our_extension_decides_where_it_is_there() {
    let workload = parse_workload(wire::Workload {
        extensions: vec![
            wire::Extension {
                name: "somebody.else/thing".into(),
                config: None,
            },
            extension(&ours::WorkloadExtension {
                stage: ours::EnrolmentStage::Mandatory.into(),
                epoch: Some(ours::Epoch {
                    resource_version: 9,
                    stage: 3,
                }),
                mode: ours::Mode::Strict.into(),
                plain_inbound_ports: vec![9090],
                terminating: true,
                ..Default::default()
            }),
        ],
        ..good_workload()
    })
    .unwrap();
    assert_eq!(workload.stage, Stage::Mandatory);
    assert_eq!(workload.mode, Mode::Strict);
    assert_eq!(workload.health, Health::Terminating);
    assert_eq!(workload.epoch.resource_version, 9);
    assert!(workload.plain_inbound_ports.contains(&9090));
}

#[test]
fn a_host_network_workload_says_that_its_addresses_are_not_its_own() {
    let workload = parse_workload(wire::Workload {
        network_mode: wire::NetworkMode::HostNetwork.into(),
        ..good_workload()
    })
    .unwrap();
    assert!(workload.host_network);
    assert_eq!(workload.addresses.len(), good_workload().addresses.len());
}

#[test]
fn a_broken_workload_is_refused() {
    type Break = fn(&mut wire::Workload);
    let cases: &[(&str, Break)] = &[
        ("addresses: not a usable IP address", |w| {
            w.addresses.push(vec![1, 2, 3]);
        }),
        ("addresses: not a usable IP address", |w| {
            w.addresses
                .push(vec![0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 1]);
        }),
        ("addresses: more than 64", |w| {
            w.addresses = vec![vec![10, 0, 0, 1]; 65];
        }),
        ("tunnel_protocol: 7 is not a value known here", |w| {
            w.tunnel_protocol = 7;
        }),
        (
            "tunnel_protocol: not understood here, and leaving it out could widen what is allowed",
            |w| w.tunnel_protocol = wire::TunnelProtocol::LegacyIstioMtls.into(),
        ),
        ("status: 2 is not a value known here", |w| w.status = 2),
        ("workload_type: 9 is not a value known here", |w| {
            w.workload_type = 9;
        }),
        ("network_mode: -1 is not a value known here", |w| {
            w.network_mode = -1;
        }),
        ("uid: empty", |w| w.uid.clear()),
        ("namespace", |w| w.namespace = "Shop".into()),
        ("namespace", |w| w.namespace.clear()),
        ("service_account", |w| w.service_account = "../ca".into()),
        ("name: not printable, or holds a separator", |w| {
            w.name = "a\nb".into();
        }),
        ("name: more than 1024 bytes", |w| w.name = "a".repeat(1025)),
        ("services: not printable, or holds a separator", |w| {
            w.services
                .insert("nothing".into(), wire::PortList::default());
        }),
        ("services: not printable, or holds a separator", |w| {
            w.services.insert("a/b/c".into(), wire::PortList::default());
        }),
        ("services.ports.service_port: 0 is not a port", |w| {
            let ports = vec![wire::Port::default()];
            w.services.insert("a/b".into(), wire::PortList { ports });
        }),
        ("tunnel protocol and enrolment stage disagree", |w| {
            w.extensions = vec![extension(&ours::WorkloadExtension::default())];
        }),
        ("stage: 6 is not a value known here", |w| {
            w.extensions = vec![extension(&ours::WorkloadExtension {
                stage: 6,
                ..Default::default()
            })];
        }),
        ("exclude_inbound_ports: 65536 is not a port", |w| {
            w.extensions = vec![extension(&ours::WorkloadExtension {
                stage: ours::EnrolmentStage::Announced.into(),
                exclude_inbound_ports: vec![65536],
                ..Default::default()
            })];
        }),
        ("external: 2 is not a value known here", |w| {
            w.extensions = vec![extension(&ours::WorkloadExtension {
                stage: ours::EnrolmentStage::Announced.into(),
                external: 2,
                ..Default::default()
            })];
        }),
        ("probe_ports: 0 is not a port", |w| {
            w.extensions = vec![extension(&ours::WorkloadExtension {
                stage: ours::EnrolmentStage::Announced.into(),
                probe_ports: vec![0],
                ..Default::default()
            })];
        }),
        ("host_ports: two of the same", |w| {
            let twice = ours::PortMapping {
                node_port: 80,
                port: 8080,
            };
            w.extensions = vec![extension(&ours::WorkloadExtension {
                stage: ours::EnrolmentStage::Announced.into(),
                host_ports: vec![twice; 2],
                ..Default::default()
            })];
        }),
        ("extensions: two of the same", |w| {
            w.extensions = vec![extension(&ours::WorkloadExtension::default()); 2];
        }),
        ("not a protobuf message of its type", |w| {
            w.extensions = vec![extension(&ours::WorkloadExtension::default())];
            w.extensions[0].config.as_mut().unwrap().value = vec![0xff];
        }),
    ];
    for (expected, damage) in cases {
        let mut wire = good_workload();
        damage(&mut wire);
        assert_eq!(parse_workload(wire).unwrap_err(), *expected);
    }
}

#[test]
fn a_resource_under_another_name_is_refused() {
    let bytes = wire::Address {
        r#type: Some(wire::address::Type::Workload(good_workload())),
    }
    .encode_to_vec();
    let error = parse::address("uid-2", &bytes).unwrap_err();
    assert_eq!(
        error.to_string(),
        r#"the resource is named "uid-2" and calls itself "uid-1""#
    );
}

fn good_service() -> wire::Service {
    wire::Service {
        name: "web".into(),
        namespace: "shop".into(),
        hostname: "web.shop.svc.cluster.local".into(),
        addresses: vec![wire::NetworkAddress {
            network: String::new(),
            address: vec![10, 96, 0, 80],
            length: None,
        }],
        ports: vec![wire::Port {
            service_port: 80,
            target_port: 0,
            app_protocol: 0,
        }],
        visibility: 99,
        ..Default::default()
    }
}

fn parse_service(wire: wire::Service) -> Result<Arc<podveil_model::Service>, String> {
    let name = format!("{}/{}", wire.namespace, wire.hostname);
    let bytes = wire::Address {
        r#type: Some(wire::address::Type::Service(wire)),
    }
    .encode_to_vec();
    match parse::address(&name, &bytes) {
        Ok(Address::Service(service)) => Ok(service),
        Ok(Address::Workload(_)) => panic!("a service became a workload"),
        Err(error) => Err(error.to_string()),
    }
}

#[test]
fn a_service_is_taken_without_its_ranges() {
    let mut wire = good_service();
    wire.addresses.push(wire::NetworkAddress {
        network: String::new(),
        address: vec![192, 0, 2, 0],
        length: Some(24),
    });
    let service = parse_service(wire).unwrap();
    assert_eq!(
        service.addresses,
        ["10.96.0.80".parse::<std::net::IpAddr>().unwrap()]
    );
    assert_eq!(service.ports[0].target, 0);
    assert!(!service.publish_not_ready);
}

#[test]
fn a_broken_service_is_refused() {
    type Break = fn(&mut wire::Service);
    let cases: &[(&str, Break)] = &[
        ("hostname: empty", |s| s.hostname.clear()),
        ("hostname: not printable, or holds a separator", |s| {
            s.hostname = "a/b".into();
        }),
        ("ports.target_port: 70000 is not a port", |s| {
            s.ports[0].target_port = 70000;
        }),
        ("addresses: not a usable IP address", |s| {
            s.addresses[0].length = Some(33);
        }),
        ("ip_families: 4 is not a value known here", |s| {
            s.ip_families = 4
        }),
        (
            "load_balancing.routing_preference: not understood here, and leaving it out could widen what is allowed",
            |s| {
                s.load_balancing = Some(wire::LoadBalancing {
                    routing_preference: vec![0],
                    ..Default::default()
                });
            },
        ),
        ("node_ports: 70000 is not a port", |s| {
            let node_ports = vec![ours::PortMapping {
                node_port: 70000,
                port: 80,
            }];
            s.extensions = vec![wire::Extension {
                name: SERVICE_EXTENSION.into(),
                config: Some(prost_types::Any {
                    type_url: type_url::SERVICE_EXTENSION.into(),
                    value: ours::ServiceExtension {
                        node_ports,
                        ..Default::default()
                    }
                    .encode_to_vec(),
                }),
            }];
        }),
        ("load_balancing.mode: 4 is not a value known here", |s| {
            s.load_balancing = Some(wire::LoadBalancing {
                mode: 4,
                ..Default::default()
            });
        }),
    ];
    for (expected, damage) in cases {
        let mut wire = good_service();
        damage(&mut wire);
        assert_eq!(parse_service(wire).unwrap_err(), *expected);
    }
}

fn good_policy() -> policy::Authorization {
    policy::Authorization {
        name: "p".into(),
        namespace: "shop".into(),
        scope: policy::Scope::Namespace.into(),
        action: policy::Action::Allow.into(),
        rules: vec![policy::Rule {
            clauses: vec![policy::Clause {
                matches: vec![policy::Match {
                    principals: vec![policy::StringMatch {
                        match_type: Some(policy::string_match::MatchType::Suffix(
                            "/ns/shop/sa/web".into(),
                        )),
                    }],
                    source_ips: vec![policy::Address {
                        address: vec![10, 0, 0, 0],
                        length: 8,
                    }],
                    destination_ports: vec![8080],
                    ..Default::default()
                }],
            }],
        }],
        dry_run: false,
        extensions: Vec::new(),
    }
}

fn only_match(policy: &mut policy::Authorization) -> &mut policy::Match {
    &mut policy.rules[0].clauses[0].matches[0]
}

#[test]
fn a_policy_is_taken_with_every_matcher() {
    let policy = parse::authorization(&good_policy().encode_to_vec()).unwrap();
    assert_eq!(policy.key.to_string(), "shop/p");
    assert_eq!(
        policy.rules[0].clauses[0][0],
        Match {
            principals: vec![StringMatch::Suffix("/ns/shop/sa/web".into())],
            source_ips: vec!["10.0.0.0/8".parse().unwrap()],
            destination_ports: vec![8080],
            ..Default::default()
        }
    );
}

#[test]
fn a_policy_with_a_part_that_is_not_understood_is_refused() {
    type Break = fn(&mut policy::Authorization);
    let unsupported = "not understood here, and leaving it out could widen what is allowed";
    let cases: &[(&str, Break)] = &[
        ("source_ips: not a usable IP address", |p| {
            only_match(p).source_ips[0].address.pop();
        }),
        ("source_ips: not a usable IP address", |p| {
            only_match(p).source_ips[0].length = 33;
        }),
        ("principals: empty", |p| {
            only_match(p).principals[0].match_type = None;
        }),
        ("principals: empty", |p| {
            let empty = policy::string_match::MatchType::Prefix(String::new());
            only_match(p).principals[0].match_type = Some(empty);
        }),
        ("destination_ports: 0 is not a port", |p| {
            only_match(p).destination_ports[0] = 0;
        }),
        ("service_accounts: empty", |p| {
            only_match(p)
                .service_accounts
                .push(policy::ServiceAccountMatch::default());
        }),
        ("match.extensions: ", |p| {
            only_match(p).extensions.push(policy::Extension::default());
        }),
        ("extensions: ", |p| {
            p.extensions.push(policy::Extension::default())
        }),
        ("scope: 3 is not a value known here", |p| p.scope = 3),
        ("action: 2 is not a value known here", |p| p.action = 2),
        ("namespace: empty", |p| p.namespace.clear()),
        ("name: empty", |p| p.name.clear()),
    ];
    for (expected, damage) in cases {
        let mut wire = good_policy();
        damage(&mut wire);
        let error = parse::authorization(&wire.encode_to_vec())
            .unwrap_err()
            .to_string();
        let expected = match expected.strip_suffix(": ") {
            Some(field) => format!("{field}: {unsupported}"),
            None => (*expected).to_owned(),
        };
        assert_eq!(error, expected);
    }
}

#[test]
fn what_stands_in_for_a_refused_policy_allows_nobody() {
    let mut wire = good_policy();
    wire.rules[0].clauses[0].matches[0].destination_ports = vec![0];
    let stand_in = parse::refuse_all("shop/p", &wire.encode_to_vec()).unwrap();
    assert_eq!(
        (stand_in.scope, stand_in.action),
        (Scope::Namespace, Action::Allow)
    );
    assert!(stand_in.rules.is_empty());

    wire.action = policy::Action::Deny.into();
    let stand_in = parse::refuse_all("shop/p", &wire.encode_to_vec()).unwrap();
    assert_eq!(stand_in.action, Action::Deny);
    assert_eq!(stand_in.rules.len(), 1);
    assert!(stand_in.rules[0].clauses.is_empty());

    wire.scope = 77;
    let stand_in = parse::refuse_all("shop/p", &wire.encode_to_vec()).unwrap();
    assert_eq!(stand_in.scope, Scope::Global);
}

#[test]
fn a_mesh_configuration_with_a_bad_range_is_refused() {
    let good = ours::MeshConfig {
        trust_domain: "cluster.local".into(),
        pod_ranges: vec!["10.244.0.0/16".into(), "fd00:10:244::/48".into()],
        ranges_known: true,
        ..Default::default()
    };
    let mesh = parse::mesh_config(&good.encode_to_vec()).unwrap();
    assert_eq!(mesh.pod_ranges.len(), 2);
    let bad = ours::MeshConfig {
        service_ranges: vec!["10.96.0.0".into()],
        ..good.clone()
    };
    let error = parse::mesh_config(&bad.encode_to_vec()).unwrap_err();
    assert_eq!(
        error.to_string(),
        r#"service_ranges: "10.96.0.0" is not a range (CIDR)"#
    );
    let bad = ours::MeshConfig {
        trust_domain: String::new(),
        ..good
    };
    assert!(parse::mesh_config(&bad.encode_to_vec()).is_err());
}

#[test]
fn any_bytes_are_parsed_or_refused() {
    // The cases of the fuzz target that need no corpus: every prefix of good resources, and each with a bit turned.
    let good = [
        wire::Address {
            r#type: Some(wire::address::Type::Workload(good_workload())),
        }
        .encode_to_vec(),
        good_policy().encode_to_vec(),
    ];
    for bytes in &good {
        for end in 0..bytes.len() {
            let _ = parse::address("uid-1", &bytes[..end]);
            let _ = parse::authorization(&bytes[..end]);
            let _ = parse::mesh_config(&bytes[..end]);
            let _ = parse::response(&bytes[..end]);
            let mut turned = bytes.clone();
            turned[end] ^= 0x41;
            let _ = parse::address("uid-1", &turned);
            let _ = parse::authorization(&turned);
            let _ = parse::refuse_all("x", &turned);
        }
    }
    assert!(parse::address("x", &vec![0; parse::MAX_RESOURCE_BYTES + 1]).is_err());
}
