// SPDX-License-Identifier: Apache-2.0
use super::*;
use crate::ca::{Authority, Consumer};
use crate::check::finding::Level;
use crate::cluster::pages::When;
use serde_json::json;
use std::collections::BTreeMap;
use std::time::UNIX_EPOCH;

fn noon() -> SystemTime {
    "2026-05-01T12:00:00Z".parse::<When>().unwrap().0
}

fn in_days(days: i64) -> i64 {
    let now = noon().duration_since(UNIX_EPOCH).unwrap().as_secs();
    i64::try_from(now).unwrap() + days * 86_400
}

fn pod(program: Program, name: &str, waiting: Option<&str>, version: &str) -> ProgramPod {
    ProgramPod {
        program,
        name: name.into(),
        node: Some("n1".into()),
        ready: waiting.is_none(),
        waiting: waiting.map(str::to_owned),
        restarts: 0,
        version: version.into(),
        container: None,
    }
}

fn healthy() -> Installation {
    Installation {
        programs: Programs::new(vec![
            pod(Program::Ca, "ca", None, "1"),
            pod(Program::Controller, "controller", None, "1"),
            pod(Program::Node, "node", None, "1"),
        ]),
        controller: Ok(serde_json::from_value(json!({
            "nodes": [{ "name": "n1", "modules": [{ "module": "proxy", "connected": true }] }],
            "workloads": [{ "name": "web", "stage": "mandatory" }],
        }))
        .unwrap()),
        ca: Ok(CaStatus {
            bundle_sequence: 2,
            certificate_generation: 2,
            authorities: vec![authority(true, 3650), authority(false, 90)],
            consumers: vec![consumer(2, 2)],
            ..CaStatus::default()
        }),
        proxies: BTreeMap::from([("n1".into(), Ok(proxy_page("2026-05-02T10:00:00Z")))]),
        redirects: BTreeMap::new(),
    }
}

fn authority(root: bool, days: i64) -> Authority {
    Authority {
        subject: "CN=x".into(),
        serial: "01".into(),
        root,
        issuing: !root,
        not_after: in_days(days),
    }
}

fn consumer(bundle_sequence: u64, certificate_generation: u64) -> Consumer {
    Consumer {
        spiffe_id: "spiffe://x/podveil/node/n1".into(),
        module: "proxy".into(),
        bundle_sequence,
        certificate_generation,
    }
}

fn proxy_page(until: &str) -> ProxyPage {
    serde_json::from_value(json!({ "certificates": [{ "identity": "web", "certChain": [
        { "validFrom": "2026-05-01T10:00:00Z", "expirationTime": until },
    ] }] }))
    .unwrap()
}

fn worse(installation: &Installation, counters: &Counters) -> Vec<(Level, String)> {
    judge(installation, counters, noon())
        .into_iter()
        .filter(|finding| finding.level > Level::Note)
        .map(|finding| (finding.level, finding.what))
        .collect()
}

#[test]
fn a_healthy_installation_has_nothing_to_mend() {
    assert_eq!(worse(&healthy(), &Counters::default()), []);
}

#[test]
fn each_trouble_is_named() {
    type Break = fn(&mut Installation, &mut Counters);
    let cases: [(Break, Level, &str); 13] = [
        (
            |one, _| one.programs.0.retain(|pod| pod.program != Program::Ca),
            Level::Problem,
            "no pod of podveil-ca is there",
        ),
        (
            |one, _| {
                let waiting = "proxy: CrashLoopBackOff";
                one.programs.0[2] = pod(Program::Node, "node", Some(waiting), "1");
            },
            Level::Problem,
            "node on n1 is not ready: proxy: CrashLoopBackOff",
        ),
        (
            |one, _| one.programs.0[0].version = "2".into(),
            Level::Warning,
            "programs of several versions run: 1, 2",
        ),
        (
            |one, _| one.controller = Err("refused".into()),
            Level::Problem,
            "it does not answer: refused",
        ),
        (
            |one, _| {
                let module = &mut one.controller.as_mut().unwrap().nodes[0].modules[0];
                (module.silent, module.heard_seconds_ago) = (true, 40);
            },
            Level::Problem,
            "proxy on n1 has been silent for 40s: nobody waits for it",
        ),
        (
            |one, _| {
                let workload = &mut one.controller.as_mut().unwrap().workloads[0];
                workload.stage = "wanted".into();
                workload.reason = "no listeners".into();
            },
            Level::Warning,
            "/web is wanted: no listeners",
        ),
        (
            |one, _| one.ca.as_mut().unwrap().authorities[0] = authority(true, 29),
            Level::Problem,
            "root 01 has 29d left",
        ),
        (
            |one, _| one.ca.as_mut().unwrap().consumers[0] = consumer(1, 2),
            Level::Warning,
            "1 program behind: spiffe://x/podveil/node/n1 (proxy)",
        ),
        (
            |one, _| {
                let page = proxy_page("2026-05-01T13:00:00Z");
                one.proxies.insert("n1".into(), Ok(page));
            },
            Level::Problem,
            "web on n1 has 60m left: not asked for yet",
        ),
        (
            |one, _| {
                one.proxies.insert("n1".into(), Err("no way".into()));
            },
            Level::Unknown,
            "the proxy on n1 could not be asked: no way",
        ),
        (
            |one, _| {
                let page = json!({ "cniPlugin": "not installed: no list" });
                let page = serde_json::from_value(page).map_err(|error| error.to_string());
                one.redirects.insert("n1".into(), page);
            },
            Level::Warning,
            "the CNI plugin is missing on 1 node: n1: no list",
        ),
        (
            |_, counters| {
                counters.fence.insert("n1".into(), 3);
            },
            Level::Warning,
            "on n1 the fence has refused 3 packets",
        ),
        (
            |_, counters| counters.unanswered.push("no metrics".into()),
            Level::Unknown,
            "no metrics",
        ),
    ];
    for (broken, level, what) in cases {
        let (mut installation, mut counters) = (healthy(), Counters::default());
        broken(&mut installation, &mut counters);
        assert_eq!(worse(&installation, &counters), [(level, what.to_owned())]);
    }
}
