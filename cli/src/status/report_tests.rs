// SPDX-License-Identifier: Apache-2.0
use super::*;
use crate::cluster::Programs;
use crate::status::human;
use serde_json::{Value, json};

/// 12:00, when every test happens.
fn noon() -> SystemTime {
    "2026-05-01T12:00:00Z".parse::<When>().unwrap().0
}

fn controller() -> ControllerPage {
    let module = |name: &str, silent: bool, current: bool| {
        json!({ "module": name, "connected": !silent, "silent": silent, "heard_seconds_ago": 34,
                "current": current, "bundle_sequence": 1, "certificate_generation": 1 })
    };
    let workload = |namespace: &str, name: &str, node: &str, stage: &str, reason: &str| {
        json!({ "uid": name, "namespace": namespace, "name": name, "node": node, "stage": stage, "reason": reason,
                "identity": format!("spiffe://cluster.local/ns/{namespace}/sa/{name}"), "mode": "permissive",
                "connections_older": 1, "connections_captured": 2, "a_newer_field": true })
    };
    serde_json::from_value(json!({
        "version": "7.3",
        "source": { "error": "pods cannot be watched: forbidden" },
        "nodes": [
            { "name": "n1", "modules": [module("proxy", false, true), module("redirect", false, false)] },
            { "name": "n2", "modules": [module("proxy", true, true)] },
        ],
        "workloads": [
            workload("shop", "web", "n1", "mandatory", ""),
            workload("shop", "new", "n2", "wanted", "proxy on n2: has not reported"),
            workload("legacy", "old", "n1", "none", "the namespace has no label io.cilium/mtls-enabled=true"),
            workload("shop", "out", "n1", "none", "opted out by its label"),
        ],
    }))
    .unwrap()
}

fn proxy(identity: &str, from: &str, until: &str) -> Value {
    json!({
        "version": { "version": "0.1.0" },
        "certificates": [{ "identity": identity, "certChain": [
            { "validFrom": from, "expirationTime": until, "generation": 1 }, { "pem": "the issuer's" },
        ] }, { "identity": "spiffe://cluster.local/ns/shop/sa/later", "certChain": [] }],
    })
}

fn installation() -> Installation {
    let page = |value| Ok(serde_json::from_value(value).unwrap());
    Installation {
        programs: Programs::default(),
        controller: Ok(controller()),
        ca: Err("forbidden".to_owned()),
        proxies: BTreeMap::from([
            (
                "n1".to_owned(),
                page(proxy(
                    "spiffe://cluster.local/ns/shop/sa/web",
                    "2026-05-01T09:00:00Z",
                    "2026-05-02T09:00:00Z",
                )),
            ),
            (
                "n2".to_owned(),
                page(proxy(
                    "spiffe://cluster.local/ns/shop/sa/new",
                    "2026-04-30T22:00:00Z",
                    "2026-05-02T01:30:00Z",
                )),
            ),
            ("n3".to_owned(), Err("connection refused".to_owned())),
        ]),
        redirects: BTreeMap::from([(
            "n1".to_owned(),
            Ok(serde_json::from_value(json!({
                "backEnd": { "chosen": "nftables", "unusable": [
                    { "backEnd": "ebpf", "feature": "sk_lookup", "reason": "not permitted" },
                ] },
                // 11:58 and 11:59:55.
                "pods": [{ "uid": "web", "backEnd": "nftables", "capturedSince": 1_777_636_680,
                           "verified": 1_777_636_795, "repairs": 1 }],
            }))
            .unwrap()),
        )]),
    }
}

#[test]
fn the_reserve_ends_with_the_first_certificate() {
    let reserve = reserve(&installation().proxies, noon()).unwrap();
    assert_eq!((reserve.hours, reserve.node.as_str()), (13, "n2"));
    assert!(super::reserve(&BTreeMap::new(), noon()).is_none());
}

#[test]
fn an_ended_certificate_leaves_no_time() {
    let page = proxy("a", "2026-04-01T00:00:00Z", "2026-04-02T00:00:00Z");
    let page = serde_json::from_value(page).unwrap();
    let reserve = reserve(&BTreeMap::from([("n1".to_owned(), Ok(page))]), noon()).unwrap();
    assert_eq!(reserve.hours, 0);
}

#[test]
fn pods_that_nobody_asked_for_are_counted_and_not_listed() {
    let shown = |of: Option<&str>, all| {
        let report = report(&installation(), &Filter::new(of, all), noon());
        let names: Vec<_> = report.pods.iter().map(|pod| pod.name.clone()).collect();
        names.join(" ")
    };
    assert_eq!(shown(None, false), "new out web");
    assert_eq!(shown(None, true), "old new out web");
    assert_eq!(shown(Some("shop"), false), "new out web");
    assert_eq!(shown(Some("legacy"), false), "");
    assert_eq!(shown(Some("legacy/old"), false), "old");
    assert_eq!(shown(Some("shop/web"), false), "web");
}

#[test]
fn a_person_reads_where_everything_stands_and_why() {
    let report = report(&installation(), &Filter::new(None, false), noon());
    let expected = "\
Pods: 1 mandatory, 1 none, 1 wanted; 1 not asked for
If everything went away now, new connections would work for 13 h: until 2026-05-02T01:30:00Z, when the certificate of \
spiffe://cluster.local/ns/shop/sa/new on n2 ends

NODE   PROXY        REDIRECT      BACK END   PODS   VERSION   WAITS FOR
n1     connected    catching up   nftables   1      0.1.0     -
n2     silent 34s   -             -          1      0.1.0     -

POD        NODE   STAGE       MODE         CERTIFICATE         CAPTURE                            CONNECTIONS   WHY
shop/new   n2     wanted      permissive   14h old, 13h left   -                                  2 + 1 older   proxy on n2: has not reported
shop/out   n1     none        permissive   -                   -                                  2 + 1 older   opted out by its label
shop/web   n1     mandatory   permissive   3h old, 21h left    nftables for 2m, verified 5s ago   2 + 1 older   -

Conditions:
  the controller's source: pods cannot be watched: forbidden
  n1: ebpf cannot be used, sk_lookup is missing: not permitted

Not answered:
  the CA: forbidden
  the proxy on n3: connection refused
";
    assert_eq!(human::status(&report), expected);
}

#[test]
fn without_an_answer_of_the_controller_its_silence_is_told() {
    let installation = Installation {
        controller: Err("no pod of podveil-controller runs".to_owned()),
        ..installation()
    };
    let report = report(&installation, &Filter::new(None, false), noon());
    assert!(report.pods.is_empty() && report.reserve.is_some());
    assert_eq!(
        report.unanswered[0],
        "the controller: no pod of podveil-controller runs"
    );
}

#[test]
fn what_nobody_knows_is_no_empty_answer() {
    let known = |of: &str| Filter::new(Some(of), false).known(&controller());
    for of in ["shop", "shop/web", "legacy", "legacy/old"] {
        assert!(known(of).is_ok(), "{of}");
    }
    for (of, sentence) in [
        ("shopp", "no pod is known in a namespace \"shopp\""),
        (
            "shop/typo",
            "no pod \"typo\" is known in a namespace \"shop\"",
        ),
        (
            "legacy/web",
            "no pod \"web\" is known in a namespace \"legacy\"",
        ),
    ] {
        let failure = known(of).unwrap_err();
        assert_eq!(failure.to_string(), sentence);
        assert!(failure.cure.contains("kubectl get pods -n"));
    }
    assert!(Filter::new(None, false).known(&controller()).is_ok());
}
