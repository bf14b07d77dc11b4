// SPDX-License-Identifier: Apache-2.0
//! Keys and journal in the Secret, roots in the ConfigMap.

use crate::world::{NAMESPACE, PATIENCE, World, eventually, get, holds, node};
use anyhow::{Context, ensure};
use podveil_kube::k8s_openapi::api::core::v1::{ConfigMap, Secret};
use podveil_kube::kube::{self, Api};
use podveil_proto::podveil::ca::v1::{RotateRequest, RotationKind};
use serde_json::json;
use tokio_util::sync::CancellationToken;

pub async fn a_restart_keeps_the_root(world: &mut World) -> anyhow::Result<()> {
    let ca = world.ca("podveil-ca-a").await?;
    let roots = world.published().await?;
    let (journal, status) = (world.journal().await?, ca.status().await?);
    ca.stop().await?;
    // With another name, as a Deployment's next pod.
    let ca = world.ca("podveil-ca-b").await?;
    ensure!(ca.status().await?.authorities == status.authorities);
    ensure!(world.journal().await? == journal, "nothing was written");
    ensure!(world.roots().await?.as_ref() == Some(&roots));
    ca.stop().await
}

pub async fn edited_roots_are_repaired_and_other_keys_left(
    world: &mut World,
) -> anyhow::Result<()> {
    let ca = world.ca("podveil-ca-a").await?;
    let good = world.published().await?;
    for patch in [
        json!({"data": {"bundle.pem": "-----BEGIN CERTIFICATE-----\nliar\n", "note": "mine"}}),
        json!({"data": {"bundle.pem": null}}),
    ] {
        let patch = format!("--patch={patch}");
        let arguments = [
            "patch",
            "configmap",
            "podveil-roots",
            "-n",
            NAMESPACE,
            "--type=merge",
            &patch,
        ];
        world.kubectl(&arguments, "")?;
        holds("the roots are as they were", async || {
            Ok(world.roots().await?.as_ref() == Some(&good))
        })
        .await?;
    }
    let maps: Api<ConfigMap> = Api::namespaced(world.admin.clone(), NAMESPACE);
    let map = maps.get("podveil-roots").await?;
    ensure!(map.data.context("no data")?.get("note").map(String::as_str) == Some("mine"));
    ca.stop().await
}

pub async fn a_record_emptied_under_a_running_ca_is_written_again_and_a_lost_one_is_refused(
    world: &mut World,
) -> anyhow::Result<()> {
    let ca = world.ca("podveil-ca-a").await?;
    world.published().await?;
    let journal = world.journal().await?;
    let empty = [
        "patch",
        "secret",
        "podveil-ca",
        "-n",
        NAMESPACE,
        "--type=merge",
        "--patch={\"data\":null}",
    ];
    world.kubectl(&empty, "")?;
    holds("the record is back", async || {
        Ok(world.journal().await.is_ok_and(|now| now == journal))
    })
    .await?;
    ca.stop().await?;

    world.kubectl(&empty, "")?;
    let error = world
        .ca("podveil-ca-b")
        .await
        .err()
        .context("it made another root in silence")?;
    ensure!(format!("{error:#}").contains("is missing"), "{error:#}");
    ensure!(
        world.secret().await?.is_empty(),
        "nothing is made in its place"
    );
    Ok(())
}

pub async fn a_record_deleted_under_a_running_ca_stops_changes_only_and_is_written_where_a_secret_is_made(
    world: &mut World,
) -> anyhow::Result<()> {
    let ca = world.ca("podveil-ca-a").await?;
    world.published().await?;
    let journal = world.journal().await?;
    world.pod(NAMESPACE, "node-1", "podveil-node", "n1")?;
    let token = world.token(
        NAMESPACE,
        "podveil-node",
        Some("node-1"),
        "podveil-ca",
        3600,
    )?;
    world.delete(NAMESPACE, "secret", "podveil-ca")?;
    holds("it is said that the record is gone", async || {
        Ok(ca.metrics().await?.contains("podveil_ca_record_lost 1"))
    })
    .await?;
    // Certificates go on, since what is in use is in memory; nothing of it may change, and nothing new is made.
    let n1 = world
        .program(ca.address(), node("n1")?, &token, &ca.stop)
        .await?;
    tokio::time::timeout(PATIENCE, n1.ready()).await?;
    let request = RotateRequest {
        kind: RotationKind::Leaf.into(),
        timeout_seconds: 1,
    };
    let refused = ca.admin().await?.rotate(request).await;
    let refused = refused.err().context("it was changed without a record")?;
    let cure = "Secret podveil-system/podveil-ca does not exist. Make it";
    ensure!(refused.message().contains(cure), "{refused}");
    ensure!(world.secret().await.is_err());

    let create = ["create", "secret", "generic", "podveil-ca", "-n", NAMESPACE];
    world.kubectl(&create, "")?;
    holds("the record is back", async || {
        Ok(world.journal().await.is_ok_and(|now| now == journal))
    })
    .await?;
    holds("and this is said", async || {
        Ok(ca.metrics().await?.contains("podveil_ca_record_lost 0"))
    })
    .await?;
    ca.stop().await
}

pub async fn nobody_else_reads_the_keys_and_everybody_the_roots(
    world: &mut World,
) -> anyhow::Result<()> {
    let ca = world.ca("podveil-ca-a").await?;
    let secret = world.secret().await?;
    ensure!(secret.keys().any(|key| key.ends_with(".key")));
    world.kubectl(&["create", "serviceaccount", "anyone", "-n", NAMESPACE], "")?;
    for account in ["podveil-node", "podveil-controller", "anyone"] {
        let client = world.client_of(account).await?;
        let secrets: Api<Secret> = Api::namespaced(client.clone(), NAMESPACE);
        for refused in [
            secrets.get("podveil-ca").await.map(drop),
            secrets.list(&Default::default()).await.map(drop),
        ] {
            let error = refused
                .err()
                .with_context(|| format!("{account} reads the keys"))?;
            ensure!(
                matches!(&error, kube::Error::Api(status) if status.code == 403),
                "{error}"
            );
        }
        let maps: Api<ConfigMap> = Api::namespaced(client, NAMESPACE);
        maps.get("podveil-roots")
            .await
            .with_context(|| format!("{account} and the roots"))?;
    }
    // And the CA reads no other Secret.
    world.kubectl(
        &[
            "create",
            "secret",
            "generic",
            "other",
            "-n",
            NAMESPACE,
            "--from-literal=a=b",
        ],
        "",
    )?;
    let secrets: Api<Secret> = Api::namespaced(world.client_of("podveil-ca").await?, NAMESPACE);
    secrets.get("podveil-ca").await?;
    ensure!(
        secrets.get("other").await.is_err() && secrets.list(&Default::default()).await.is_err()
    );
    ca.stop().await
}

pub async fn a_ca_that_starts_before_its_api_server_says_what_it_waits_for_and_then_serves(
    world: &mut World,
) -> anyhow::Result<()> {
    world.pod(NAMESPACE, "podveil-ca-a", "podveil-ca", "n1")?;
    let client = world.client_of("podveil-ca").await?;
    world.api.kill();
    let readiness: std::net::SocketAddr = {
        let free = std::net::TcpListener::bind("127.0.0.1:0")?;
        free.local_addr()?
    };
    let config = serde_json::from_value(json!({
        "listen": "127.0.0.1:0",
        "source": "kubernetes",
        "replica": "podveil-ca-a",
        "admin_socket": world.folder.path().join("a/run/admin.sock"),
        "metrics_address": "127.0.0.1:0",
        "readiness_address": readiness,
    }))?;
    let stop = CancellationToken::new();
    let starting = tokio::spawn(podveil_ca::RunningCa::start_with(
        config,
        Some(client),
        stop.clone(),
    ));
    let said = eventually("it says what it waits for", async || {
        let said = get(readiness, "/healthz/ready").await?;
        Ok(said.contains("record").then_some(said))
    })
    .await?;
    ensure!(said.contains("not ready"), "{said}");
    world.api.resume()?;
    let running = starting.await??;
    holds("it is ready", async || {
        Ok(get(readiness, "/healthz/ready").await? == "ready\n")
    })
    .await?;
    stop.cancel();
    running.ended().await
}
