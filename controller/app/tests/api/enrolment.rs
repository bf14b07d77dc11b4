// SPDX-License-Identifier: Apache-2.0
//! Labels and what becomes of them: stages, events, and what is said of bad ones.

use crate::objects::Pod;
use crate::world::{World, holds};
use anyhow::{Context, ensure};
use podveil_model::{Mode, Stage, Uid};
use serde_json::{Value, json};

fn labelled() -> Value {
    json!({"io.cilium/mtls-enabled": "true"})
}

pub async fn a_label_removed_and_a_namespace_deleted_are_two_ends(
    world: &mut World,
) -> anyhow::Result<()> {
    let objects = &world.objects;
    let [n1, _] = &world.nodes[..] else {
        anyhow::bail!("two nodes")
    };
    objects.namespace("leaving", labelled()).await?;
    objects.namespace("deleted", labelled()).await?;
    let client = objects
        .pod(&Pod::new("leaving", "client", "n1", &["10.244.1.50"]))
        .await?;
    let web = objects
        .pod(&Pod::new("leaving", "web", "n2", &["10.244.2.50"]))
        .await?;
    let gone = objects
        .pod(&Pod::new("deleted", "web", "n2", &["10.244.2.51"]))
        .await?;
    n1.reaches(Stage::Mandatory, &[&client, &web, &gone])
        .await?;
    world
        .event("leaving", "web", "Enrolled", "encrypted and authenticated")
        .await?;

    objects.delete("/api/v1/namespaces/deleted", 0).await?;
    // There is no kubelet that would end it: as long as it is there, it stays what it is.
    n1.answers(&client, "10.244.2.51:80", "enrolled 10.244.2.51:80")
        .await?;
    holds("it is told to end", async || {
        let pod = objects.get("/api/v1/namespaces/deleted/pods/web").await?;
        Ok(pod.pointer("/metadata/deletionTimestamp").is_some())
    })
    .await?;
    ensure!(
        n1.state
            .view()
            .by_uid(&Uid::from(&*gone))
            .map(|one| one.stage)
            == Some(Stage::Mandatory)
    );
    objects.delete_pod("deleted", "web", 0).await?;
    let not_known =
        "not known: 10.244.2.51 may belong to the cluster and nothing is known about it";
    n1.answers(&client, "10.244.2.51:80", not_known).await?;

    let off = json!({"io.cilium/mtls-enabled": null});
    objects.label("leaving", off).await?;
    n1.reaches(Stage::None, &[&client, &web]).await?;
    n1.answers(
        &client,
        "10.244.2.50:80",
        "plain NotEnrolled 10.244.2.50:80",
    )
    .await
}

pub async fn bad_input_has_an_answer_and_harms_nobody_else(
    world: &mut World,
) -> anyhow::Result<()> {
    let objects = &world.objects;
    let [n1, _] = &world.nodes[..] else {
        anyhow::bail!("two nodes")
    };
    objects.namespace("good", labelled()).await?;
    objects
        .namespace("typo", json!({"io.cilium/mtls-enabled": "yes"}))
        .await?;
    let mode = json!({"io.cilium/mtls-enabled": "true", "podveil.io/mode": "Strict"});
    objects.namespace("mode", mode).await?;
    let good = objects
        .pod(&Pod::new("good", "web", "n1", &["10.244.1.60"]))
        .await?;
    let typo = objects
        .pod(&Pod::new("typo", "web", "n1", &["10.244.1.61"]))
        .await?;
    let mode = objects
        .pod(
            &Pod::new("mode", "web", "n1", &["10.244.1.62"])
                .annotations(json!({"podveil.io/exclude-inbound-ports": "80-90"})),
        )
        .await?;
    // Broken label values: said on the namespace, and the strictest counts where no good one is known.
    world
        .event("", "typo", "BadSetting", r#""yes", not "true" or "false""#)
        .await?;
    world
        .event(
            "",
            "mode",
            "BadSetting",
            r#""Strict", not "permissive" or "strict""#,
        )
        .await?;
    world
        .event("mode", "web", "BadSetting", r#""80-90" is not a port"#)
        .await?;
    n1.reaches(Stage::Mandatory, &[&good, &mode]).await?;
    let view = n1.state.view();
    let stage = |uid: &str| {
        view.by_uid(&Uid::from(uid))
            .map(|one| (one.stage, one.mode))
    };
    ensure!(stage(&typo) == Some((Stage::None, Mode::Permissive)));
    ensure!(stage(&mode) == Some((Stage::Mandatory, Mode::Strict)));

    // Two pods that claim one address: the newer has it, the other is told.
    objects.namespace("thief", json!({})).await?;
    let victim = objects
        .pod(&Pod::new("good", "victim", "n1", &["10.244.1.63"]))
        .await?;
    n1.reaches(Stage::Mandatory, &[&victim]).await?;
    // Creation has a resolution of a second, and the newest of one second would be the last one seen.
    let made = objects.get("/api/v1/namespaces/good/pods/victim").await?;
    holds("a second has passed", async || {
        let probe = json!({"metadata": {"generateName": "clock-"}});
        let probe = objects
            .post("/api/v1/namespaces/thief/configmaps", probe)
            .await?;
        let time = |object: &Value| {
            let time = object.pointer("/metadata/creationTimestamp");
            time.and_then(Value::as_str).map(ToOwned::to_owned)
        };
        Ok(time(&probe) > time(&made))
    })
    .await?;
    let thief = objects
        .pod(&Pod::new("thief", "late", "n2", &["10.244.1.63"]))
        .await?;
    world
        .event(
            "good",
            "victim",
            "BadSetting",
            &format!("belongs to the newer {thief}"),
        )
        .await?;
    objects.delete_pod("thief", "late", 0).await?;
    holds("the address is back", async || {
        let view = n1.state.view();
        let owner = view.by_address("10.244.1.63".parse()?);
        Ok(owner.is_some_and(|owner| owner.uid == Uid::from(&*victim)))
    })
    .await?;

    // Absurd sizes: cut down, and enrolled all the same.
    let ports: Vec<_> = (1..=10_000)
        .map(|port| json!({"name": format!("p{port}"), "containerPort": port}))
        .collect();
    let huge = Pod::new("good", "huge", "n1", &["10.244.1.64"])
        .ports(ports.into())
        .annotations(json!({"example.com/large": "x".repeat(200_000), "podveil.io/plain-inbound-ports": "1,".repeat(20_000)}));
    let huge = objects.pod(&huge).await?;
    let many: Vec<_> = (1..=10_000)
        .map(|port| json!({"name": format!("p{port}"), "port": port}))
        .collect();
    objects
        .service(
            "good",
            "many",
            json!({"selector": {"app": "huge"}, "ports": many}),
        )
        .await?;
    n1.reaches(Stage::Mandatory, &[&huge]).await?;
    world
        .event("good", "huge", "BadSetting", "the last good value stays")
        .await?;
    holds("its first ports are known", async || {
        let view = n1.state.view();
        let many = view.services().find(|one| &*one.name == "many").cloned();
        Ok(many.is_some_and(|many| (1..=1024).contains(&many.ports.len())))
    })
    .await?;
    // Nobody else noticed.
    let last = objects
        .pod(&Pod::new("good", "last", "n2", &["10.244.2.65"]))
        .await?;
    n1.reaches(Stage::Mandatory, &[&good, &last]).await?;
    n1.answers(&good, "10.244.2.65:80", "enrolled 10.244.2.65:80")
        .await
}

pub async fn a_node_says_why_a_pod_is_not_captured(world: &mut World) -> anyhow::Result<()> {
    let objects = &world.objects;
    let [n1, _] = &world.nodes[..] else {
        anyhow::bail!("two nodes")
    };
    objects.namespace("capture", json!({})).await?;
    let held = objects
        .pod(&Pod::new("capture", "held", "n1", &["10.244.1.70"]))
        .await?;
    n1.breaks(&held, "another program holds port 15001");
    objects.label("capture", labelled()).await?;
    world
        .event(
            "capture",
            "held",
            "NotCaptured",
            "redirect on n1: another program holds port 15001",
        )
        .await?;
    n1.reaches(Stage::Wanted, &[&held]).await?;
    n1.mend();
    n1.reaches(Stage::Mandatory, &[&held]).await?;
    // One that was captured stays mandatory, and its trouble is told.
    n1.breaks(&held, "the rules are gone");
    world
        .event(
            "capture",
            "held",
            "CaptureBroken",
            "redirect on n1: the rules are gone",
        )
        .await?;
    let status = world.workload(0, &held).await?.context("it is known")?;
    ensure!(status["stage"] == "mandatory", "{status}");
    ensure!(
        status["reason"] == "redirect on n1: the rules are gone",
        "{status}"
    );
    n1.mend();
    holds("it is well again", async || {
        let status = world.workload(0, &held).await?.context("it is known")?;
        Ok(status["reason"] == "")
    })
    .await
}

pub async fn a_strict_namespace_is_told_what_the_api_server_dials_in_it(
    world: &mut World,
) -> anyhow::Result<()> {
    let objects = &world.objects;
    objects.namespace("gates", labelled()).await?;
    let gate = Pod::new("gates", "gate", "n1", &["10.244.1.80"])
        .ports(json!([{"name": "hook", "containerPort": 9443}]));
    objects.pod(&gate).await?;
    let ports = json!([{"port": 443, "targetPort": "hook"}]);
    objects
        .service(
            "gates",
            "gate",
            json!({"selector": {"app": "gate"}, "ports": ports}),
        )
        .await?;
    // It matches nothing that anybody here makes.
    objects
        .post(
            "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations",
            json!({"metadata": {"name": "policy"}, "webhooks": [{
                "name": "policy.example.com", "admissionReviewVersions": ["v1"], "sideEffects": "None",
                "failurePolicy": "Ignore",
                "rules": [{"apiGroups": ["example.com"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["gates"]}],
                "clientConfig": {"service": {"namespace": "gates", "name": "gate"}, "caBundle": ""},
            }]}),
        )
        .await?;
    objects
        .label("gates", json!({"podveil.io/mode": "strict"}))
        .await?;
    let told = "ValidatingWebhookConfiguration policy is served by service gate port 443: strict mode refuses the API \
                server there. Annotate the pods behind it with podveil.io/plain-inbound-ports=9443";
    world.event("", "gates", "RefusesApiServer", told).await
}

pub async fn nothing_is_begun_where_cilium_encrypts(world: &mut World) -> anyhow::Result<()> {
    let objects = &world.objects;
    let [n1, _] = &world.nodes[..] else {
        anyhow::bail!("two nodes")
    };
    objects.namespace("cilium", labelled()).await?;
    let before = objects
        .pod(&Pod::new("cilium", "before", "n1", &["10.244.1.90"]))
        .await?;
    n1.reaches(Stage::Mandatory, &[&before]).await?;
    let maps = "/api/v1/namespaces/kube-system/configmaps";
    let config = json!({"metadata": {"name": "cilium-config"}, "data": {"enable-ztunnel": "true"}});
    objects.post(maps, config).await?;
    let why = "Cilium's encryption.type=ztunnel is on";
    world.event("", "cilium", "NotEnrolled", why).await?;
    let later = objects
        .pod(&Pod::new("cilium", "later", "n1", &["10.244.1.91"]))
        .await?;
    for replica in 0..2 {
        holds("both replicas say why", async || {
            let later = world.workload(replica, &later).await?;
            let reason = later.and_then(|later| later["reason"].as_str().map(ToOwned::to_owned));
            Ok(reason.is_some_and(|reason| reason.starts_with(why)))
        })
        .await?;
    }
    n1.reaches(Stage::None, &[&later]).await?;
    // What is under way already is not torn out.
    n1.reaches(Stage::Mandatory, &[&before]).await?;
    let off = json!({"data": {"enable-ztunnel": "false"}});
    objects.patch(&format!("{maps}/cilium-config"), off).await?;
    n1.reaches(Stage::Mandatory, &[&before, &later]).await
}
