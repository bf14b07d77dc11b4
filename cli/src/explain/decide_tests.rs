// SPDX-License-Identifier: Apache-2.0
use super::*;
use crate::explain::human;
use podveil_model::Mode;
use podveil_testing::{WorkloadBuilder, mesh, policy, service, workload};
use serde_json::json;

struct Case {
    view: View,
    page: ProxyPage,
    source: ControllerWorkload,
}

impl Case {
    /// An enrolled pod `us` with a certificate, an enrolled `web` on another node behind a service, and `legacy`.
    fn new() -> Self {
        let mut view = View::default();
        let shop = service("web").address("10.96.0.80").port(80, 8080).build();
        view.insert_mesh(mesh().into());
        let web = workload("web")
            .address("10.0.0.2")
            .node("n2")
            .behind(&shop, &[]);
        view.insert_workload(web.build());
        view.insert_service(shop);
        let legacy = workload("legacy").address("10.0.0.9").stage(Stage::None);
        view.insert_workload(legacy.identity("legacy", "old").build());
        view.set_synced();
        let mut case = Self {
            view,
            page: serde_json::from_value(json!({
                "certificates": [{ "identity": "spiffe://cluster.local/ns/shop/sa/web", "certChain": [
                    { "validFrom": "2026-05-01T09:00:00Z", "expirationTime": "2026-05-02T09:00:00Z" },
                ] }],
                "workloadState": { "us": { "state": "Up" } },
            }))
            .unwrap(),
            source: ControllerWorkload {
                uid: "us".into(),
                namespace: "shop".into(),
                name: "us".into(),
                node: "n1".into(),
                ..ControllerWorkload::default()
            },
        };
        case.us(|us| us);
        case
    }

    fn us(&mut self, with: impl FnOnce(WorkloadBuilder) -> WorkloadBuilder) {
        let us = with(workload("us").address("10.0.0.1"));
        self.view.insert_workload(us.build());
    }

    fn explain(&self, destination: &str) -> Explanation {
        let ends = Ends {
            view: &self.view,
            page: &self.page,
            source: &self.source,
            destination: OriginalDst(destination.parse().unwrap()),
        };
        let others = BTreeMap::from([("n2".to_owned(), self.view.clone())]);
        explain(&ends, &Uid::from("us"), &others)
    }

    /// The verdict, and what decides.
    fn decides(&self, destination: &str) -> (Verdict, String) {
        let mut explanation = self.explain(destination);
        let last = explanation.steps.pop().unwrap();
        (explanation.verdict, format!("{} [{}]", last.what, last.by))
    }
}

#[test]
fn a_person_reads_each_step_and_what_decides_it() {
    assert_eq!(
        human::explanation(&Case::new().explain("10.96.0.80:80")),
        "\
shop/us to 10.96.0.80:80: tunnel: encrypted and authenticated
  1. the source is captured: mandatory
     by pod shop/us on node n1
  2. 10.96.0.80:80 is a service; its endpoint is chosen here, e.g. pod shop/web at 10.0.0.2:8080
     by service shop/web.shop.svc.cluster.local
  3. pod shop/web at 10.0.0.2:8080 takes it from spiffe://cluster.local/ns/shop/sa/web
     by no policy applies: what is not denied is allowed
"
    );
}

#[test]
fn each_answer_names_what_decides() {
    let unchanged: fn(&mut Case) = |_| {};
    for (change, destination, verdict, decides) in [
        (
            unchanged,
            "10.0.0.9:80",
            Verdict::Plain,
            "pod legacy/legacy at 10.0.0.9:80 is not captured: nothing of ours decides there [pod legacy/legacy]",
        ),
        (
            unchanged,
            "1.1.1.1:443",
            Verdict::Plain,
            "1.1.1.1:443 is nobody's in the cluster: plain to that address [the ranges of pods and services, and those listed \
             as plain]",
        ),
        (
            unchanged,
            "10.0.0.77:80",
            Verdict::Refused,
            "10.0.0.77 may belong to the cluster and nothing is known about it: the connection is held while it may become \
             known, then refused; it never goes in plain [the state of the source's node]",
        ),
        (
            unchanged,
            "10.0.0.2:15008",
            Verdict::Refused,
            "10.0.0.2:15008 is never dialled: one of the proxy's own ports (bad_target) [a fixed rule]",
        ),
        (
            |case| case.us(|us| us.mode(Mode::Strict)),
            "10.0.0.9:80",
            Verdict::Refused,
            "10.0.0.9:80 is not enrolled, and this workload is strict [namespace shop: its mode, and what it may reach outside]",
        ),
        (
            |case| case.page.certificates.clear(),
            "10.0.0.2:80",
            Verdict::Refused,
            "the source has no certificate: the connection is held, then refused (certificate_missing): not asked for yet [the \
             CA, for spiffe://cluster.local/ns/shop/sa/web]",
        ),
        (
            |case| {
                case.view
                    .insert_policy("shop/deny".into(), policy("deny").deny().port(8080).build());
            },
            "10.96.0.80:80",
            Verdict::Refused,
            "pod shop/web at 10.0.0.2:8080 refuses it: explicitly denied by: shop/deny (policy_denied) [policy shop/deny rule 0]",
        ),
        (
            |case| {
                case.view
                    .insert_policy("shop/allow".into(), policy("allow").port(8080).build());
            },
            "10.96.0.80:80",
            Verdict::Tunnel,
            "pod shop/web at 10.0.0.2:8080 takes it from spiffe://cluster.local/ns/shop/sa/web [policy shop/allow rule 0]",
        ),
        // Not captured: the destination's own rules still hold.
        (
            |case| case.us(|us| us.stage(Stage::None)),
            "10.0.0.9:80",
            Verdict::Direct,
            "pod legacy/legacy at 10.0.0.9:80 is not captured: nothing of ours decides there [pod legacy/legacy]",
        ),
        (
            |case| {
                case.us(|us| us.stage(Stage::None));
                let strict = workload("web")
                    .address("10.0.0.2")
                    .node("n2")
                    .mode(Mode::Strict);
                case.view.insert_workload(strict.build());
            },
            "10.0.0.2:80",
            Verdict::Refused,
            "pod shop/web at 10.0.0.2:80 refuses it: plain, and this workload is strict (plaintext_strict) [label \
             podveil.io/mode of namespace shop]",
        ),
        (
            |case| case.page.workload_state.clear(),
            "1.1.1.1:80",
            Verdict::Direct,
            "the source is not captured yet:  [node n1]",
        ),
    ] {
        let mut case = Case::new();
        change(&mut case);
        assert_eq!(case.decides(destination), (verdict, decides.to_owned()));
    }
}

#[test]
fn a_destination_whose_node_cannot_be_asked_is_judged_by_the_sources() {
    let case = Case::new();
    let ends = Ends {
        view: &case.view,
        page: &case.page,
        source: &case.source,
        destination: OriginalDst("10.0.0.2:80".parse().unwrap()),
    };
    let explanation = explain(&ends, &Uid::from("us"), &BTreeMap::new());
    assert_eq!(explanation.verdict, Verdict::Tunnel);
    let last = &explanation.steps.last().unwrap().what;
    assert!(
        last.ends_with("(as the source's node knows it: node n2 could not be asked)"),
        "{last}"
    );
}
