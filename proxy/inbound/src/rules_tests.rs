// SPDX-License-Identifier: Apache-2.0
use super::*;
use podveil_model::Stage;
use podveil_policy::Scope;
use podveil_testing::{WorkloadBuilder, mesh, policy, workload};

const US: &str = "10.0.0.2";
const PEER: &str = "10.0.0.3";

fn us() -> WorkloadBuilder {
    workload("us").address(US).identity("shop", "us")
}

fn peer() -> WorkloadBuilder {
    workload("peer").address(PEER).identity("shop", "peer")
}

fn view(workloads: &[Arc<Workload>]) -> View {
    let mut view = View::default();
    view.insert_mesh(Arc::new(mesh()));
    view.set_synced();
    for workload in workloads {
        view.insert_workload(workload.clone());
    }
    view
}

fn plain(source: &str, port: u16) -> Facts {
    Facts {
        uid: "us".into(),
        source_ip: source.parse().unwrap(),
        source: Source::Plain,
        destination: SocketAddr::new(US.parse().unwrap(), port),
    }
}

fn proved(source: &str, identity: &WorkloadIdentity, port: u16) -> Facts {
    Facts {
        source: Source::Proved {
            identity: identity.clone(),
            uid: "peer".into(),
        },
        ..plain(source, port)
    }
}

fn refusal(view: &View, facts: &Facts) -> Refused {
    check(view, facts, Moment::Opening).unwrap_err()
}

#[test]
fn plain_between_two_mandatory_workloads_is_refused() {
    for (ours, theirs, refused) in [
        (Stage::Mandatory, Stage::Mandatory, true),
        (Stage::Announced, Stage::Mandatory, false),
        (Stage::Mandatory, Stage::Announced, false),
        (Stage::Mandatory, Stage::None, false),
        (Stage::Mandatory, Stage::Draining, false),
        (Stage::Draining, Stage::Mandatory, false),
    ] {
        let view = view(&[us().stage(ours).build(), peer().stage(theirs).build()]);
        let answer = check(&view, &plain(PEER, 80), Moment::Opening);
        assert_eq!(answer.is_err(), refused, "{theirs} to {ours}");
        // One that is older than that goes on.
        assert!(check(&view, &plain(PEER, 80), Moment::Living).is_ok());
    }
}

#[test]
fn plain_from_an_unknown_address_that_may_be_a_pods_is_held() {
    let mut view = view(&[us().build()]);
    let held = refusal(&view, &plain("10.0.0.9", 80));
    assert!(matches!(held, Refused::MayBeMandatory { .. }) && held.may_change());
    assert!(check(&view, &plain("192.168.0.9", 80), Moment::Opening).is_ok());
    view.insert_negative("10.0.0.9".parse().unwrap());
    assert!(check(&view, &plain("10.0.0.9", 80), Moment::Opening).is_ok());
}

#[test]
fn held_on_demand_a_source_that_was_not_asked_for_is_waited_for() {
    let told = |view: &mut View, ip: &str| {
        view.set_told(podveil_model::Lookup::Address(ip.parse().unwrap()));
    };
    let mut view = View::on_demand();
    view.insert_mesh(Arc::new(mesh()));
    view.insert_workload(us().build());
    // One that had this address before is held for another reason.
    view.insert_workload(workload("old").address(PEER).stage(Stage::None).build());
    let held = refusal(&view, &plain(PEER, 80));
    assert!(matches!(held, Refused::MayBeMandatory { .. }) && held.may_change());
    let identity = peer().build().identity.clone();
    let held = refusal(&view, &proved(PEER, &identity, 80));
    assert!(matches!(held, Refused::SourceNotKnown { .. }) && held.may_change());
    assert!(check(&view, &plain("192.168.0.9", 80), Moment::Opening).is_ok());

    view.insert_workload(peer().build());
    told(&mut view, PEER);
    assert!(check(&view, &proved(PEER, &identity, 80), Moment::Opening).is_ok());
    assert!(matches!(
        refusal(&view, &plain(PEER, 80)),
        Refused::Mandatory { .. }
    ));
    told(&mut view, "10.0.0.9");
    assert!(check(&view, &plain("10.0.0.9", 80), Moment::Opening).is_ok());
}

#[test]
fn strict_refuses_plain_also_while_it_lives() {
    let view = view(&[us().mode(Mode::Strict).plain_inbound_port(9090).build()]);
    for moment in [Moment::Opening, Moment::Living] {
        let answer = check(&view, &plain("192.168.0.9", 80), moment);
        assert_eq!(answer.unwrap_err(), Refused::Strict);
        assert!(check(&view, &plain("192.168.0.9", 9090), moment).is_ok());
    }
}

#[test]
fn a_probe_passes_in_every_mode_and_against_every_policy_on_the_ports_of_the_spec_only() {
    let kubelet = |port| Facts {
        source: Source::Kubelet,
        ..plain("10.0.0.99", port)
    };
    for mode in [Mode::Permissive, Mode::Strict] {
        let mut view = view(&[us().mode(mode).probe_port(8080).build()]);
        view.insert_policy("shop/nobody".into(), policy("nobody").build());
        for moment in [Moment::Opening, Moment::Living] {
            let allowed = check(&view, &kubelet(8080), moment).unwrap();
            let rule = Some("kubelet probe".to_owned());
            assert_eq!(allowed.verdict(), Verdict::Allowed { rule });
            assert!(check(&view, &kubelet(8081), moment).is_err());
            assert!(check(&view, &plain("10.0.0.99", 8080), moment).is_err());
        }
    }
}

#[test]
fn plain_and_excluded_ports_take_plain() {
    let ours = us().plain_inbound_port(9090).exclude_inbound_port(9091);
    let view = view(&[ours.build(), peer().build()]);
    assert!(check(&view, &plain(PEER, 9090), Moment::Opening).is_ok());
    assert!(check(&view, &plain(PEER, 9091), Moment::Opening).is_ok());
    assert_eq!(
        refusal(&view, &plain(PEER, 9092)).reason(),
        DropReason::PlaintextMandatory
    );
}

#[test]
fn an_identity_is_good_only_at_its_own_addresses() {
    let peer = peer().build();
    let other = workload("other")
        .address("10.0.0.4")
        .identity("shop", "other");
    let view = view(&[us().build(), peer.clone(), other.build()]);
    assert!(check(&view, &proved(PEER, &peer.identity, 80), Moment::Opening).is_ok());
    let elsewhere = refusal(&view, &proved("10.0.0.4", &peer.identity, 80));
    assert_eq!(elsewhere.reason(), DropReason::PeerAddressMismatch);
    assert!(!elsewhere.may_change());
    let nowhere = refusal(&view, &proved("10.0.0.9", &peer.identity, 80));
    assert_eq!(nowhere.reason(), DropReason::PeerAddressMismatch);
    assert!(nowhere.may_change());
}

#[test]
fn a_replaced_peer_is_not_the_same_peer() {
    let old = peer().build();
    let facts = proved(PEER, &old.identity, 80);
    let mut view = view(&[us().build(), old]);
    view.remove_address("peer");
    view.insert_workload(
        workload("peer-2")
            .address(PEER)
            .identity("shop", "peer")
            .build(),
    );
    let refused = check(&view, &facts, Moment::Living).unwrap_err();
    assert_eq!(refused, Refused::SourceGone { uid: "peer".into() });
    assert_eq!(refused.close(), CloseReason::WorkloadGone);
}

#[test]
fn only_our_own_address_is_reached() {
    let view = view(&[us().build(), peer().build()]);
    for ip in [PEER, "192.168.0.1", "10.0.0.77"] {
        let facts = Facts {
            destination: SocketAddr::new(ip.parse().unwrap(), 80),
            ..plain("192.168.0.9", 80)
        };
        assert_eq!(
            refusal(&view, &facts).reason(),
            DropReason::BadTarget,
            "{ip}"
        );
    }
}

#[test]
fn policy_decides_on_the_original_port_and_names_its_rule() {
    let peer = peer().build();
    let mut view = view(&[us().build(), peer.clone()]);
    let ports = policy("ports").port(8080).port(8081).build();
    view.insert_policy("shop/ports".into(), ports);
    let allowed = check(&view, &proved(PEER, &peer.identity, 8081), Moment::Opening).unwrap();
    assert_eq!(
        allowed.verdict(),
        Verdict::Allowed {
            rule: Some("shop/ports rule 1".to_owned())
        }
    );
    let denied = refusal(&view, &proved(PEER, &peer.identity, 80));
    assert_eq!(denied.reason(), DropReason::PolicyDenied);
    assert_eq!(denied.close(), CloseReason::PolicyChanged);
}

#[test]
fn a_policy_that_is_named_and_not_known_is_waited_for() {
    let peer = peer().build();
    let mut view = view(&[us().policy("shop/late").build(), peer.clone()]);
    let facts = proved(PEER, &peer.identity, 80);
    assert!(refusal(&view, &facts).may_change());
    let late = policy("late")
        .scope(Scope::WorkloadSelector)
        .port(80)
        .build();
    view.insert_policy("shop/late".into(), late);
    assert!(check(&view, &facts, Moment::Opening).is_ok());
}
