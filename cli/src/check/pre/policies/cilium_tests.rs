// SPDX-License-Identifier: Apache-2.0
use super::*;
use crate::check::pre::testing::worse;
use serde_json::json;

fn judged(namespace: Option<&str>, content: Value) -> Vec<String> {
    let policy = json!({
        "apiVersion": "cilium.io/v2", "kind": "-", "metadata": { "name": "web", "namespace": namespace },
    });
    let mut policy: DynamicObject = serde_json::from_value(policy).unwrap();
    policy.data = content;
    let findings = match read(&policy, &BTreeSet::from(["shop".to_owned()])) {
        Ok(read) => read.judge(Directions::default()),
        Err(finding) => vec![finding],
    };
    worse(findings)
}

fn of_shop(spec: Value) -> Vec<String> {
    judged(Some("shop"), json!({ "spec": spec }))
}

fn ports(ports: Value) -> Value {
    json!([{ "ports": ports }])
}

#[test]
fn a_rule_that_leaves_out_the_tunnels_port_is_told() {
    for (named, told) in [
        (json!([]), false),
        (json!([{ "port": "8080", "protocol": "TCP" }]), true),
        (json!([{ "port": "8080", "endPort": 0 }]), true),
        (json!([{ "port": "http" }]), true),
        (json!([{ "port": "0" }]), false),
        (
            json!([{ "port": "8080" }, { "port": "15008", "protocol": "TCP" }]),
            false,
        ),
        (
            json!([{ "port": "8080" }, { "port": "15008", "protocol": "UDP" }]),
            true,
        ),
        (json!([{ "port": "15000", "endPort": 15010 }]), false),
        (json!([{ "port": "53", "protocol": "ANY" }]), false),
    ] {
        for direction in ["ingress", "egress"] {
            let rule = json!([{ "toPorts": ports(named.clone()) }]);
            let found = of_shop(json!({ "endpointSelector": {}, direction: rule }));
            assert_eq!(
                found.len(),
                usize::from(told),
                "{direction} {named}: {found:?}"
            );
        }
    }
    let one = json!({ "ingress": [{ "toPorts": ports(json!([{ "port": "80" }])) }] });
    let several = judged(Some("shop"), json!({ "specs": [{}, one] }));
    assert_eq!(
        several,
        [
            "Problem: CiliumNetworkPolicy shop/web names ports from its pods' peers and leaves out 15008, where tunnels go"
        ]
    );
    let mut lenient = one.clone();
    lenient["enableDefaultDeny"] = json!({ "ingress": false });
    assert_eq!(of_shop(lenient), Vec::<String>::new(), "it refuses nobody");
    assert_eq!(
        of_shop(json!({ "ingress": [{ "icmps": [{}] }] })),
        Vec::<String>::new()
    );
}

#[test]
fn a_rule_about_whoever_is_no_pod_is_not_about_tunnels() {
    for (peers, told) in [
        (json!({ "toEndpoints": [{}] }), true),
        (json!({ "toEntities": ["cluster"] }), true),
        (json!({ "toEntities": ["world", "kube-apiserver"] }), false),
        (
            json!({ "toFQDNs": [{ "matchName": "example.com" }] }),
            false,
        ),
        (json!({ "toCIDRSet": [{ "cidr": "192.0.2.0/24" }] }), false),
        (
            json!({ "toCIDR": ["192.0.2.0/24"], "toEndpoints": [{}] }),
            true,
        ),
    ] {
        let mut rule = peers.clone();
        rule["toPorts"] = ports(json!([{ "port": "443" }]));
        let found = of_shop(json!({ "egress": [rule] }));
        assert_eq!(found.len(), usize::from(told), "{peers}");
    }
}

#[test]
fn a_denial_of_a_port_holds_for_tunnels_only_where_it_is_theirs() {
    let deny = |named: Value| {
        let rule = json!([{ "fromEndpoints": [{}], "toPorts": named }]);
        of_shop(json!({ "ingressDeny": rule }))
    };
    let told = deny(ports(json!([{ "port": "9000" }])));
    assert!(
        told[0].starts_with("Warning: ") && told[0].contains("denies ports from"),
        "{told:?}"
    );
    let told = deny(ports(json!([{ "port": "1024", "endPort": 65535 }])));
    assert!(
        told[0].starts_with("Problem: ") && told[0].contains("15008 among them"),
        "{told:?}"
    );
    // Those peers are meant to be refused.
    assert_eq!(deny(json!([])), Vec::<String>::new());
}

#[test]
fn a_rule_about_requests_sees_none_in_tunnels_and_breaks_those_it_is_about() {
    let http = json!({ "http": [{ "method": "GET" }] });
    let both = json!([{ "port": "8080" }, { "port": "15008" }]);
    let told = |items: Value| of_shop(json!({ "ingress": [{ "toPorts": items }] }));
    let broken = told(json!([{ "ports": both, "rules": http }]));
    assert!(broken[0].starts_with("Problem: "), "{broken:?}");
    assert!(broken[1].contains("has rules about requests"), "{broken:?}");
    let apart = told(json!([
        { "ports": [{ "port": "8080" }], "rules": http },
        { "ports": [{ "port": "15008" }] },
    ]));
    assert_eq!(apart.len(), 1, "{apart:?}");
    assert!(apart[0].starts_with("Warning: "), "{apart:?}");
    let by_name = json!([{ "ports": both, "serverNames": ["example.com"] }]);
    assert!(told(by_name)[0].starts_with("Problem: "));
    let dns =
        json!([{ "ports": [{ "port": "53" }], "rules": { "dns": [{ "matchPattern": "*" }] } }]);
    assert_eq!(told(dns), Vec::<String>::new());
}

#[test]
fn a_policy_of_the_whole_cluster_counts_where_it_may_choose_an_enrolled_pod() {
    let rule = json!([{ "toPorts": ports(json!([{ "port": "80" }])) }]);
    let label = |namespace: &str| json!({ "matchLabels": { "k8s:io.kubernetes.pod.namespace": namespace } });
    let expression = |operator: &str| {
        let key = "io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name";
        json!({ "matchExpressions": [{ "key": key, "operator": operator, "values": ["shop"] }] })
    };
    for (more, told) in [
        (json!({ "endpointSelector": {} }), true),
        (json!({ "endpointSelector": label("shop") }), true),
        (json!({ "endpointSelector": label("other") }), false),
        (json!({ "endpointSelector": expression("In") }), true),
        (json!({ "endpointSelector": expression("NotIn") }), false),
        (json!({ "nodeSelector": {} }), false),
    ] {
        let mut spec = more.clone();
        spec["ingress"] = rule.clone();
        let found = judged(None, json!({ "spec": spec }));
        assert_eq!(found.len(), usize::from(told), "{more}");
    }
}

#[test]
fn a_policy_that_is_not_understood_is_named() {
    let told = of_shop(json!({ "ingress": "everything" }));
    let expected = "Unknown: CiliumNetworkPolicy shop/web is not understood: ";
    assert!(told[0].starts_with(expected), "{told:?}");
}
