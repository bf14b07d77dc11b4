// SPDX-License-Identifier: Apache-2.0
//! What a file may say, and how a fault is named.

use podveil_model::{Mode, Uid};
use podveil_policy::{Match, Scope, ServiceAccountMatch, StringMatch};
use podveil_source::{Cluster, Fault, ParseError, Phase, parse};
use std::path::Path;

const FULL: &str = r#"
trustDomain: cluster.local
ranges: {pods: [10.244.0.0/16, "fd00:10:244::/48"], services: [10.96.0.0/16]}
plainOutbound: ["10.96.0.10"]
nodes: [{name: n1}, {name: n2}]
namespaces: [{name: shop, labels: {io.cilium/mtls-enabled: "true", podveil.io/mode: strict}}]
workloads:
  - {name: web-1, namespace: shop, uid: pv-x-web-1, node: n1, serviceAccount: web,
     addresses: [10.244.1.10, "fd00:10:244:1::10"], labels: {}, annotations: {a: b}, phase: Running}
  - {name: job, namespace: shop, uid: u2, node: n2, serviceAccount: job, phase: Succeeded, hostNetwork: true, ready: false}
services:
  - {name: web, namespace: shop, addresses: [10.96.0.80], ports: [{port: 80, targetPort: 8080}, {port: 81}], endpoints: [web-1]}
policies:
  - {name: everyone, scope: global, action: deny, dryRun: true, rules: [{}]}
  - name: p
    namespace: shop
    scope: workloads
    workloads: [web-1]
    action: allow
    rules:
      - from: [{principals: ["*/ns/shop/sa/web", "cluster.local/*", "*"], serviceAccounts: ["shop/web"], notIps: [10.0.0.0/8]}]
        to: [{ports: [8080]}]
"#;

fn one(text: &str) -> Result<Cluster, ParseError> {
    parse(7, [(Path::new("cluster.yaml"), text)])
}

#[test]
fn every_field_is_read() {
    let cluster = one(FULL).unwrap();
    assert_eq!(cluster.version, 7);
    assert_eq!(cluster.trust_domain.as_str(), "cluster.local");
    let ranges = cluster.ranges.as_ref().unwrap();
    assert_eq!((ranges.pods.len(), ranges.services.len()), (2, 1));
    assert_eq!(cluster.plain_outbound, ["10.96.0.10/32".parse().unwrap()]);
    assert_eq!(cluster.nodes.len(), 2);
    let shop = cluster.namespace(&"shop".parse().unwrap()).unwrap();
    assert!(shop.is_labelled());
    assert_eq!(shop.mode(), Ok(Some(Mode::Strict)));

    let [web, job] = cluster.pods.as_slice() else {
        panic!("two workloads")
    };
    assert_eq!(web.uid, Uid::from("pv-x-web-1"));
    assert_eq!(web.addresses.len(), 2);
    assert!(web.ready && cluster.wants_enrolment(web));
    assert_eq!(job.phase, Phase::Succeeded);
    assert!(job.host_network && !job.ready && !cluster.wants_enrolment(job));

    let [service] = cluster.services.as_slice() else {
        panic!("one service")
    };
    let ports: Vec<_> = service.ports.iter().map(|p| (p.port, p.target)).collect();
    assert_eq!(ports, [(80, 8080), (81, 81)]);

    let [everyone, p] = cluster.policies.as_slice() else {
        panic!("two policies")
    };
    assert_eq!(everyone.policy.scope, Scope::Global);
    assert!(everyone.policy.dry_run);
    assert!(everyone.policy.rules.first().unwrap().clauses.is_empty());
    assert_eq!(p.policy.scope, Scope::WorkloadSelector);
    assert_eq!(p.workloads.len(), 1);
    let [from, to] = p.policy.rules.first().unwrap().clauses.as_slice() else {
        panic!("two clauses")
    };
    let expected = Match {
        principals: vec![
            StringMatch::Suffix("/ns/shop/sa/web".to_owned()),
            StringMatch::Prefix("cluster.local/".to_owned()),
            StringMatch::Presence,
        ],
        service_accounts: vec![ServiceAccountMatch {
            namespace: "shop".to_owned(),
            service_account: "web".to_owned(),
        }],
        not_source_ips: vec!["10.0.0.0/8".parse().unwrap()],
        ..Match::default()
    };
    assert_eq!(from.as_slice(), [expected]);
    assert_eq!(to.first().unwrap().destination_ports, [8080]);
}

#[test]
fn files_are_merged() {
    let a = "trustDomain: td\nnodes: [{name: n1}]\nranges: {pods: [10.0.0.0/8]}\n";
    let b = "nodes: [{name: n2}]\nranges: {services: [11.0.0.0/8]}\n";
    let cluster = parse(1, [(Path::new("a.yaml"), a), (Path::new("b.yaml"), b)]).unwrap();
    assert_eq!(cluster.nodes.len(), 2);
    let ranges = cluster.ranges.unwrap();
    assert_eq!((ranges.pods.len(), ranges.services.len()), (1, 1));
}

#[test]
fn the_same_thing_in_two_files_is_refused() {
    let a = "trustDomain: td\nnodes: [{name: n1}]\n";
    let b = "\nnodes:\n- name: n1\n";
    let error = parse(1, [(Path::new("a.yaml"), a), (Path::new("b.yaml"), b)]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "b.yaml:3: node n1 stands at a.yaml:2 already"
    );
}

#[test]
fn ranges_left_out_are_not_known() {
    assert_eq!(one("trustDomain: td").unwrap().ranges, None);
}

#[test]
fn each_fault_names_its_line() {
    // The text after `trustDomain: td\n`, the line, and a part of the sentence.
    for (text, line, part) in [
        ("nodes:\n- name: n1\n  color: red\n", 4, "color"),
        ("colour: red\n", 2, "colour"),
        ("nodes:\n- name: N1\n", 3, "Kubernetes name"),
        ("nodes:\n- [\n", 3, "unclosed"),
        ("plainOutbound:\n- 10.0.0.0/33\n", 3, "CIDR"),
        (
            "workloads:\n- name: a\n  namespace: s\n  uid: u\n  node: n\n  serviceAccount: a\n  addresses: [10.0.0]\n",
            8,
            "IP address",
        ),
        (
            "workloads:\n- {name: a, namespace: s, uid: u, node: n, serviceAccount: a, phase: Sleeping}\n",
            3,
            "Sleeping",
        ),
        (
            "workloads:\n- {name: a, namespace: s, node: n, serviceAccount: a}\n",
            3,
            "uid",
        ),
        (
            "workloads:\n- {name: a, namespace: s, uid: u, node: n, serviceAccount: a}\n- {name: b, namespace: s, uid: u, node: n, serviceAccount: a}\n",
            4,
            "workload with uid u stands at cluster.yaml:3 already",
        ),
        (
            "workloads:\n- {name: a, namespace: s, uid: a/b, node: n, serviceAccount: a}\n",
            3,
            "uid",
        ),
        (
            "services:\n- {name: a, namespace: s, ports: [{port: 0}]}\n",
            3,
            "1 to 65535",
        ),
        (
            "services:\n- {name: a, namespace: s, ports: [{port: 70000}]}\n",
            3,
            "",
        ),
        (
            "policies:\n- {name: p, scope: namespace, action: allow}\n",
            3,
            "namespace",
        ),
        (
            "policies:\n- {name: p, namespace: s, scope: workloads, action: allow}\n",
            3,
            "workloads",
        ),
        (
            "policies:\n- name: p\n  namespace: s\n  scope: namespace\n  action: allow\n  rules:\n  - from:\n    - {}\n",
            9,
            "never matches",
        ),
        (
            "policies:\n- name: p\n  namespace: s\n  scope: namespace\n  action: allow\n  rules:\n  - from:\n    - principals: ['a*b']\n",
            9,
            "one *",
        ),
        (
            "policies:\n- name: p\n  namespace: s\n  scope: namespace\n  action: allow\n  rules:\n  - from:\n    - serviceAccounts: [web]\n",
            9,
            "service account",
        ),
        (
            "policies:\n- {name: p, namespace: s, scope: namespace, action: maybe}\n",
            3,
            "maybe",
        ),
        ("trustDomain: td\n", 2, "trustDomain"),
    ] {
        let error = one(&format!("trustDomain: td\n{text}")).expect_err(text);
        assert_eq!(error.line, line, "{error}\n{text}");
        assert!(error.to_string().contains(part), "{error}\n{text}");
    }
}

#[test]
fn no_trust_domain_is_refused() {
    assert_eq!(one("nodes: []").unwrap_err().fault, Fault::NoTrustDomain);
    assert_eq!(one("").unwrap_err().fault, Fault::NoTrustDomain);
}

#[test]
fn an_opt_out_counts_only_where_the_mode_is_not_strict() {
    for (mode, enrolled) in [("permissive", false), ("strict", true)] {
        let cluster = one(&format!(
            "trustDomain: td
namespaces: [{{name: s, labels: {{io.cilium/mtls-enabled: 'true', podveil.io/mode: {mode}}}}}]
workloads: [{{name: a, namespace: s, uid: u, node: n, serviceAccount: a, labels: {{io.cilium/mtls-enabled: 'false'}}}}]
"
        ))
        .unwrap();
        assert_eq!(
            cluster.wants_enrolment(cluster.pods.first().unwrap()),
            enrolled
        );
    }
}

/// The page is the example: what it shows is taken, and it shows every key that there is.
#[test]
fn the_page_shows_every_key_and_all_of_it_is_taken() {
    let page = include_str!("../../../docs/cluster-file.md");
    let (_, rest) = page.split_once("```yaml\n").unwrap();
    let (example, _) = rest.split_once("```").unwrap();
    let cluster = one(example).unwrap();
    assert_eq!(cluster.services[0].endpoints.len(), 1);
    assert_eq!(cluster.policies[0].workloads.len(), 1);
    // The types name what they know where a key is none of theirs.
    let mut sections = 0;
    for (at, line) in example.lines().enumerate() {
        let key = line.trim_start_matches([' ', '-']);
        let indent = line.len() - key.len();
        if key.is_empty() || key.starts_with('#') {
            continue;
        }
        let mut lines: Vec<_> = example.lines().map(str::to_owned).collect();
        lines.insert(at, format!("{}{key}", line.get(..indent).unwrap()));
        let (name, _) = key.split_once(':').unwrap();
        lines[at] = lines[at].replacen(name, "noSuchKey", 1);
        lines[at + 1] = format!("{}{key}", " ".repeat(indent));
        let Err(error) = one(&lines.join("\n")) else {
            continue;
        };
        let error = error.to_string();
        let Some((_, known)) = error.split_once("expected ") else {
            continue;
        };
        sections += 1;
        for known in known.split(['`', '"', '\'']).skip(1).step_by(2) {
            let shown = example.lines().any(|line| {
                let line = line.trim_start_matches([' ', '-']);
                line.starts_with(&format!("{known}:"))
            });
            assert!(shown, "the page does not show {known}");
        }
    }
    assert!(sections > 20, "{sections} keys were tried");
}
