// SPDX-License-Identifier: Apache-2.0
//! Pods, services and slices as Kubernetes makes them: what a connection of an enrolled pod becomes.

use crate::objects::Pod;
use crate::world::{World, holds};
use anyhow::{Context, ensure};
use podveil_model::{Stage, Uid};
use serde_json::{Value, json};
use std::time::Duration;

fn labelled() -> Value {
    json!({"io.cilium/mtls-enabled": "true"})
}

fn port(service: &Value, path: &str) -> anyhow::Result<u64> {
    let port = service.pointer(path).and_then(Value::as_u64);
    port.with_context(|| format!("{path} of {service}"))
}

fn addresses(service: &Value) -> anyhow::Result<Vec<String>> {
    let ips = service
        .pointer("/spec/clusterIPs")
        .and_then(Value::as_array);
    let ips = ips.with_context(|| format!("no addresses: {service}"))?;
    Ok(ips
        .iter()
        .filter_map(Value::as_str)
        .map(|ip| match ip.contains(':') {
            true => format!("[{ip}]"),
            false => ip.to_owned(),
        })
        .collect())
}

pub async fn every_address_of_a_service_leads_to_an_endpoint(
    world: &mut World,
) -> anyhow::Result<()> {
    let objects = &world.objects;
    objects.namespace("addresses", labelled()).await?;
    let client = Pod::new(
        "addresses",
        "client",
        "n1",
        &["10.244.1.10", "fd00:10:244:1::10"],
    );
    let client = objects.pod(&client).await?;
    let labels = json!({"app": "web"});
    let one = Pod::new(
        "addresses",
        "web-1",
        "n1",
        &["10.244.1.11", "fd00:10:244:1::11"],
    )
    .labels(labels.clone());
    let two = Pod::new(
        "addresses",
        "web-2",
        "n2",
        &["10.244.2.11", "fd00:10:244:2::11"],
    )
    .labels(labels)
    .ports(json!([{"name": "http", "containerPort": 8081, "hostPort": 18081}]));
    let one = objects.pod(&one).await?;
    let two = objects.pod(&two).await?;
    let web = objects
        .service(
            "addresses",
            "web",
            json!({
                "type": "LoadBalancer", "ipFamilyPolicy": "RequireDualStack", "selector": {"app": "web"},
                "externalIPs": ["198.51.100.9"],
                // Each pod calls another port so.
                "ports": [{"name": "http", "port": 80, "targetPort": "http"}],
            }),
        )
        .await?;
    objects
        .patch(
            "/api/v1/namespaces/addresses/services/web/status",
            json!({"status": {"loadBalancer": {"ingress": [
                {"ip": "198.51.100.1"},
                {"ip": "198.51.100.2", "ipMode": "Proxy"},
            ]}}}),
        )
        .await?;
    objects
        .service(
            "addresses",
            "headless",
            json!({"clusterIP": "None", "selector": {"app": "web"}, "ports": [{"port": 80}]}),
        )
        .await?;
    let elsewhere = json!({"type": "ExternalName", "externalName": "example.com"});
    objects.service("addresses", "elsewhere", elsewhere).await?;

    let [n1, _] = &world.nodes[..] else {
        anyhow::bail!("two nodes")
    };
    n1.reaches(Stage::Mandatory, &[&client, &one, &two]).await?;
    let (v4, v6) = (
        "enrolled 10.244.1.11:8080 10.244.2.11:8081",
        "enrolled [fd00:10:244:1::11]:8080 [fd00:10:244:2::11]:8081",
    );
    let ips = addresses(&web)?;
    ensure!(ips.len() == 2, "{ips:?}");
    for ip in &ips {
        let expected = if ip.starts_with('[') { v6 } else { v4 };
        n1.answers(&client, &format!("{ip}:80"), expected).await?;
    }
    let node_port = port(&web, "/spec/ports/0/nodePort")?;
    for (to, expected) in [
        ("198.51.100.1:80".to_owned(), v4),
        ("198.51.100.9:80".to_owned(), v4),
        // This balancer wants to see the connection itself.
        ("198.51.100.2:80".to_owned(), "outside"),
        (format!("172.30.0.1:{node_port}"), v4),
        (format!("172.30.0.2:{node_port}"), v4),
        ("172.30.0.2:18081".to_owned(), "enrolled 10.244.2.11:8081"),
        // Not a port of that node's, and so not ours.
        ("172.30.0.1:18081".to_owned(), "outside"),
        // Clients of a headless service connect to its pods.
        ("10.244.2.11:8081".to_owned(), "enrolled 10.244.2.11:8081"),
        (
            "[fd00:10:244:2::11]:8081".to_owned(),
            "enrolled [fd00:10:244:2::11]:8081",
        ),
        ("192.0.2.1:443".to_owned(), "outside"),
    ] {
        n1.answers(&client, &to, expected).await?;
    }
    let to = format!("{}:81", ips[0]);
    let expected = "not known: service addresses/web.addresses.svc.cluster.local has no port 81";
    n1.answers(&client, &to, expected).await
}

pub async fn endpoints_are_chosen_as_the_service_says(world: &mut World) -> anyhow::Result<()> {
    let objects = &world.objects;
    objects.namespace("choice", labelled()).await?;
    let mut uids = Vec::new();
    for (name, node, ip) in [
        ("client", "n1", "10.244.1.20"),
        ("far", "n2", "10.244.2.20"),
        ("web-1", "n1", "10.244.1.21"),
        ("web-2", "n2", "10.244.2.21"),
    ] {
        let ip = [ip];
        let app = if name.starts_with("web") { "web" } else { name };
        let pod = Pod::new("choice", name, node, &ip).labels(json!({"app": app}));
        uids.push(objects.pod(&pod).await?);
    }
    let uids: Vec<&str> = uids.iter().map(String::as_str).collect();
    let [client, far, ..] = uids[..] else {
        anyhow::bail!("four pods")
    };
    let service = async |name: &str, app: &str, more: Value| {
        let mut spec =
            json!({"selector": {"app": app}, "ports": [{"port": 80, "targetPort": 8080}]});
        let fields = spec.as_object_mut().context("an object")?;
        fields.extend(more.as_object().cloned().unwrap_or_default());
        let made = objects.service("choice", name, spec).await?;
        anyhow::Ok(format!("{}:80", addresses(&made)?[0]))
    };
    let local = service("local", "web", json!({"internalTrafficPolicy": "Local"})).await?;
    let near = service("near", "web", json!({"trafficDistribution": "PreferClose"})).await?;
    let sticky = service(
        "sticky",
        "web",
        json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}}}),
    )
    .await?;
    let own = service("own", "client", json!({})).await?;
    let far_only = service("far-only", "far", json!({"internalTrafficPolicy": "Local"})).await?;
    let plain = service("plain", "web", json!({})).await?;

    let [n1, n2] = &world.nodes[..] else {
        anyhow::bail!("two nodes")
    };
    for node in [n1, n2] {
        node.reaches(Stage::Mandatory, &uids).await?;
    }
    let both = "enrolled 10.244.1.21:8080 10.244.2.21:8080";
    n1.answers(client, &local, "enrolled 10.244.1.21:8080")
        .await?;
    n2.answers(far, &local, "enrolled 10.244.2.21:8080").await?;
    let refused = "not known: service choice/far-only.choice.svc.cluster.local has no endpoint that can take a connection";
    n1.answers(client, &far_only, refused).await?;
    n1.answers(client, &near, both).await?;
    n1.answers(client, &sticky, both).await?;
    // A pod that dials its own service is an endpoint as any other.
    n1.answers(client, &own, "enrolled 10.244.1.20:8080")
        .await?;

    let view = n1.state.view();
    let first = |node: &crate::node::Node, from: &str, to: &str| {
        let view = node.state.view();
        let source = view.by_uid(&Uid::from(from)).context("no source")?;
        match view.resolve(source, podveil_model::OriginalDst(to.parse()?)) {
            podveil_model::Answer::Enrolled(upstreams) => Ok(upstreams
                .first()
                .context("no endpoint")?
                .address
                .to_string()),
            answer => anyhow::bail!("{answer:?}"),
        }
    };
    ensure!(
        first(n1, client, &near)? == "10.244.1.21:8080",
        "of its own zone"
    );
    ensure!(
        first(n2, far, &near)? == "10.244.2.21:8080",
        "of its own zone"
    );
    let services: Vec<_> = view
        .services()
        .filter(|one| &*one.name == "sticky")
        .map(|one| one.balancing.affinity)
        .collect();
    ensure!(services == [Some(Duration::from_secs(60))], "{services:?}");

    // An endpoint that ends is left alone while another serves, and is used where none else does.
    n1.answers(client, &plain, both).await?;
    objects.delete_pod("choice", "web-2", 600).await?;
    n1.answers(client, &plain, "enrolled 10.244.1.21:8080")
        .await?;
    objects.delete_pod("choice", "web-1", 600).await?;
    n1.answers(client, &plain, both).await?;
    // One that is not ready any more takes nothing.
    let web = Pod::new("choice", "web-1", "n1", &["10.244.1.21"]);
    objects.pod_status(&web, "Running", false).await?;
    n1.answers(client, &plain, "enrolled 10.244.2.21:8080")
        .await
}

pub async fn endpoints_without_pods_and_services_without_endpoints(
    world: &mut World,
) -> anyhow::Result<()> {
    let objects = &world.objects;
    objects.namespace("slices", labelled()).await?;
    let client = objects
        .pod(&Pod::new("slices", "client", "n1", &["10.244.1.30"]))
        .await?;
    let web = objects
        .pod(&Pod::new("slices", "web", "n2", &["10.244.2.30"]))
        .await?;
    let ports = json!([{"port": 80}]);
    let empty = objects
        .service(
            "slices",
            "empty",
            json!({"selector": {"app": "nobody"}, "ports": ports}),
        )
        .await?;
    let manual = objects
        .service("slices", "manual", json!({"ports": ports}))
        .await?;
    let pod = json!({"kind": "Pod", "namespace": "slices", "name": "web", "uid": web});
    let known =
        json!({"addresses": ["10.244.2.30"], "targetRef": pod, "conditions": {"ready": true}});
    let address =
        |ip: &str, conditions: Value| json!({"addresses": [ip], "conditions": conditions});
    // During a move one endpoint is in two slices at once.
    objects
        .slice(
            "slices",
            "manual-a",
            "manual",
            8080,
            json!([
                known,
                address("192.0.2.2", json!({"ready": false})),
                address(
                    "192.0.2.3",
                    json!({"ready": false, "serving": true, "terminating": true})
                ),
            ]),
        )
        .await?;
    objects
        .slice("slices", "manual-b", "manual", 8080, json!([known]))
        .await?;
    let [n1, _] = &world.nodes[..] else {
        anyhow::bail!("two nodes")
    };
    n1.reaches(Stage::Mandatory, &[&client, &web]).await?;
    let manual = format!("{}:80", addresses(&manual)?[0]);
    n1.answers(&client, &manual, "enrolled 10.244.2.30:8080")
        .await?;

    let none = "has no endpoint that can take a connection";
    let refused =
        |name: &str| format!("not known: service slices/{name}.slices.svc.cluster.local {none}");
    let empty = format!("{}:80", addresses(&empty)?[0]);
    n1.answers(&client, &empty, &refused("empty")).await?;

    // Endpoints that are no pods are reached in plain, and known not to be enrolled.
    let slices = "/apis/discovery.k8s.io/v1/namespaces/slices/endpointslices";
    for slice in ["manual-a", "manual-b"] {
        objects.delete(&format!("{slices}/{slice}"), 0).await?;
    }
    n1.answers(&client, &manual, &refused("manual")).await?;
    let endpoints = json!([address("192.0.2.1", json!({}))]);
    objects
        .slice("slices", "manual-c", "manual", 9000, endpoints)
        .await?;
    n1.answers(&client, &manual, "plain NotEnrolled 192.0.2.1:9000")
        .await
}

pub async fn an_address_belongs_to_the_pod_that_has_it_now(
    world: &mut World,
) -> anyhow::Result<()> {
    let objects = &world.objects;
    objects.namespace("owners", labelled()).await?;
    let [n1, _] = &world.nodes[..] else {
        anyhow::bail!("two nodes")
    };
    let client = Pod::new("owners", "client", "n1", &["10.244.1.40"]);
    let client = objects.pod(&client).await?;
    let job = Pod::new("owners", "job", "n2", &["10.244.2.40"]);
    let finished = objects.pod(&job).await?;
    n1.reaches(Stage::Mandatory, &[&client, &finished]).await?;

    // A finished pod keeps the address in its status; another one has it by now.
    objects.pod_status(&job, "Succeeded", false).await?;
    let next = objects
        .pod(&Pod::new("owners", "next", "n2", &["10.244.2.40"]))
        .await?;
    n1.reaches(Stage::Mandatory, &[&next]).await?;
    let has = async |ip: &str, uid: &str| {
        let ip = ip.parse()?;
        holds("the address has changed hands", async || {
            let view = n1.state.view();
            let owner = view.by_address(ip).map(|owner| owner.uid.to_string());
            Ok(owner.as_deref() == Some(uid))
        })
        .await
    };
    has("10.244.2.40", &next).await?;
    ensure!(n1.state.view().by_uid(&Uid::from(&*finished)).is_none());

    // A StatefulSet's pod is replaced under its own name.
    let first = Pod::new("owners", "db-0", "n2", &["10.244.2.41"]);
    let before = objects.pod(&first).await?;
    n1.reaches(Stage::Mandatory, &[&before]).await?;
    objects.delete_pod("owners", "db-0", 0).await?;
    let again = Pod::new("owners", "db-0", "n2", &["10.244.2.42"]);
    let after = objects.pod(&again).await?;
    ensure!(before != after);
    n1.reaches(Stage::Mandatory, &[&after]).await?;
    n1.answers(&client, "10.244.2.42:8080", "enrolled 10.244.2.42:8080")
        .await?;
    let gone = "not known: 10.244.2.41 may belong to the cluster and nothing is known about it";
    n1.answers(&client, "10.244.2.41:8080", gone).await?;
    n1.answers(&client, "10.244.2.40:8080", "enrolled 10.244.2.40:8080")
        .await
}
