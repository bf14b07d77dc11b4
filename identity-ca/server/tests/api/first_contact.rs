// SPDX-License-Identifier: Apache-2.0
//! Who gets a program's SVID by a token, and who does not.

use crate::world::{Ca, NAMESPACE, PATIENCE, World, eventually, get, holds, node};
use anyhow::{Context, bail, ensure};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use podveil_ca_client::ProgramCredentials;
use podveil_identity::{ProgramIdentity, SpiffeId};
use rustls_pki_types::PrivatePkcs8KeyDer;
use rustls_pki_types::pem::PemObject;
use serde_json::json;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

const AUDIENCE: &str = "podveil-ca";
const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

async fn svid(program: &ProgramCredentials) -> anyhow::Result<SpiffeId> {
    let ready = tokio::time::timeout(PATIENCE, program.ready()).await;
    let credentials =
        ready.with_context(|| format!("no SVID: {:?}", program.last_error().borrow()))?;
    Ok(credentials.svid.id().clone())
}

/// The reason of the first refusal.
async fn refusal(
    world: &World,
    ca: &Ca,
    identity: ProgramIdentity,
    token: &str,
) -> anyhow::Result<String> {
    let stop = CancellationToken::new();
    let _stopped = stop.clone().drop_guard();
    let program = world.program(ca.address(), identity, token, &stop).await?;
    let mut last = program.last_error();
    tokio::select! {
        refused = last.wait_for(Option::is_some) => refused?,
        _ = program.ready() => bail!("it was issued"),
        () = tokio::time::sleep(PATIENCE) => bail!("neither issued nor refused"),
    };
    let reason = last.borrow().clone();
    ensure!(program.current().is_none(), "it was issued");
    Ok(reason.unwrap_or_default())
}

/// What the bundle stream answers somebody who has a token and no certificate.
async fn bundles_by_token(ca: &Ca, token: &str) -> anyhow::Result<String> {
    let url = format!(
        "https://{}/podveil.node.v1.TrustBundles/Stream",
        ca.address()
    );
    let authorization = format!("authorization: Bearer {token}");
    let asked = tokio::process::Command::new("curl")
        // Who answers is of no matter here: only that it does not answer with roots.
        .args([
            "--silent",
            "--show-error",
            "--insecure",
            "--http2",
            "--include",
            &url,
        ])
        .args([
            "--header",
            "content-type: application/grpc",
            "--header",
            "te: trailers",
        ])
        .args([
            "--header",
            &authorization,
            "--data-binary",
            "",
            "--max-time",
            "20",
        ])
        .output()
        .await?;
    ensure!(asked.status.success(), "{asked:?}");
    Ok(String::from_utf8_lossy(&asked.stdout).into_owned())
}

/// `token` as the API server would have signed it some hours ago: those that it issues live ten minutes or more.
fn issued_earlier(world: &World, token: &str, hours: u64) -> anyhow::Result<String> {
    let mut parts = token.split('.');
    let (header, payload) = parts.next().zip(parts.next()).context("a JWT")?;
    let mut claims: serde_json::Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(payload)?)?;
    for claim in ["exp", "iat", "nbf"] {
        let time = claims[claim].as_u64().context("a time")?;
        claims[claim] = json!(time - hours * 3600);
    }
    let signed = format!("{header}.{}", URL_SAFE_NO_PAD.encode(claims.to_string()));
    let key = PrivatePkcs8KeyDer::from_pem_file(world.api.folder().join("sa.key"))?;
    let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, key.secret_pkcs8_der())?;
    let signature = key.sign(&SystemRandom::new(), signed.as_bytes())?;
    Ok(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature)))
}

pub async fn the_token_of_a_program_s_own_pod_is_taken_and_says_the_node(
    world: &mut World,
) -> anyhow::Result<()> {
    let ca = world.ca("podveil-ca-a").await?;
    world.pod(NAMESPACE, "podveil-node-1", "podveil-node", "n1")?;
    world.pod(
        NAMESPACE,
        "podveil-controller-1",
        "podveil-controller",
        "n2",
    )?;
    let token = world.token(
        NAMESPACE,
        "podveil-node",
        Some("podveil-node-1"),
        AUDIENCE,
        3600,
    )?;
    let n1 = world
        .program(ca.address(), node("n1")?, &token, &ca.stop)
        .await?;
    ensure!(svid(&n1).await?.to_string() == "spiffe://cluster.local/podveil/node/n1");

    let token = world.token(
        NAMESPACE,
        "podveil-controller",
        Some("podveil-controller-1"),
        AUDIENCE,
        3600,
    )?;
    let identity = ProgramIdentity::Controller;
    let controller = world
        .program(ca.address(), identity, &token, &ca.stop)
        .await?;
    ensure!(svid(&controller).await?.to_string() == "spiffe://cluster.local/podveil/controller");

    let ready = get(ca.running().readiness_address, "/healthz/ready").await?;
    ensure!(ready == "ready\n", "{ready}");
    ca.stop().await
}

pub async fn any_other_token_is_refused_with_its_reason_and_counted(
    world: &mut World,
) -> anyhow::Result<()> {
    let ca = world.ca("podveil-ca-a").await?;
    world.namespace("shop", "web", json!({}))?;
    world.kubectl(
        &["create", "serviceaccount", "podveil-node", "-n", "shop"],
        "",
    )?;
    for (namespace, pod, account) in [
        (NAMESPACE, "node-1", "podveil-node"),
        (NAMESPACE, "node-gone", "podveil-node"),
        (NAMESPACE, "node-failed", "podveil-node"),
        (NAMESPACE, "ca-2", "podveil-ca"),
        ("shop", "web-1", "web"),
        ("shop", "node-1", "podveil-node"),
    ] {
        world.pod(namespace, pod, account, "n1")?;
    }
    let ours =
        |pod, audience, seconds| world.token(NAMESPACE, "podveil-node", pod, audience, seconds);
    let good = ours(Some("node-1"), AUDIENCE, 3600)?;
    let of_deleted = ours(Some("node-gone"), AUDIENCE, 3600)?;
    world.delete(NAMESPACE, "pod", "node-gone")?;
    let of_failed = ours(Some("node-failed"), AUDIENCE, 3600)?;
    world.phase(NAMESPACE, "node-failed", "Failed")?;
    // The first shows that what we sign is good but for its time.
    let (signed_by_us, expired) = (
        issued_earlier(world, &good, 0)?,
        issued_earlier(world, &good, 2)?,
    );
    // Not its last character, of which base64 leaves some bits without meaning.
    let mut forged = good.clone();
    let end = forged.split_off(good.len() - 8);
    let first = if end.starts_with('A') { 'B' } else { 'A' };
    forged.push(first);
    forged.push_str(&end[1..]);

    let cases = [
        ("of another node", good, "csr_names_another_identity", "n2"),
        (
            "of another node, signed by us",
            signed_by_us,
            "csr_names_another_identity",
            "n2",
        ),
        (
            "of another audience",
            ours(Some("node-1"), "istio-ca", 3600)?,
            "token_other_audience",
            "n1",
        ),
        (
            "for the API server itself",
            ours(Some("node-1"), "https://kubernetes.default.svc", 3600)?,
            "token_other_audience",
            "n1",
        ),
        (
            "of an ordinary pod",
            world.token("shop", "web", Some("web-1"), AUDIENCE, 3600)?,
            "token_other_service_account",
            "n1",
        ),
        (
            "of an account of our name in another namespace",
            world.token("shop", "podveil-node", Some("node-1"), AUDIENCE, 3600)?,
            "token_other_service_account",
            "n1",
        ),
        (
            "of the CA",
            world.token(NAMESPACE, "podveil-ca", Some("ca-2"), AUDIENCE, 3600)?,
            "token_other_service_account",
            "n1",
        ),
        (
            "without a pod",
            ours(None, AUDIENCE, 3600)?,
            "token_not_pod_bound",
            "n1",
        ),
        (
            "of a deleted pod",
            of_deleted,
            "token_not_authenticated",
            "n1",
        ),
        (
            "of a pod that has failed",
            of_failed,
            "token_pod_not_running",
            "n1",
        ),
        ("that has expired", expired, "token_expired", "n1"),
        (
            "with a forged signature",
            forged,
            "token_not_authenticated",
            "n1",
        ),
        (
            "that is none",
            "not-a-token-at-all".into(),
            "token_malformed",
            "n1",
        ),
    ];
    for (what, token, reason, asked) in cases {
        let refused = refusal(world, &ca, node(asked)?, &token).await?;
        ensure!(refused.contains(reason), "a token {what}: {refused}");
        let metrics = ca.metrics().await?;
        let counted = format!("podveil_ca_refusals_total{{reason=\"{reason}\"}}");
        ensure!(metrics.contains(&counted), "{what}: {metrics}");
    }
    // A bundle stream takes no token at all, not even the best.
    let token = ours(Some("node-1"), AUDIENCE, 3600)?;
    let refused = bundles_by_token(&ca, &token).await?;
    let unauthenticated = format!("grpc-status: {}", tonic::Code::Unauthenticated as i32);
    ensure!(refused.contains(&unauthenticated), "{refused}");
    ca.stop().await
}

pub async fn a_token_whose_pod_is_deleted_is_refused_although_it_was_taken_before(
    world: &mut World,
) -> anyhow::Result<()> {
    let ca = world.ca("podveil-ca-a").await?;
    world.pod(NAMESPACE, "node-1", "podveil-node", "n1")?;
    let token = world.token(NAMESPACE, "podveil-node", Some("node-1"), AUDIENCE, 3600)?;
    let stop = CancellationToken::new();
    let n1 = world
        .program(ca.address(), node("n1")?, &token, &stop)
        .await?;
    svid(&n1).await?;
    stop.cancel();
    world.delete(NAMESPACE, "pod", "node-1")?;
    // The answer of the API server is kept for a minute; the pod watch is what refuses here.
    let refused = refusal(world, &ca, node("n1")?, &token).await?;
    ensure!(refused.contains("token_pod_not_running"), "{refused}");
    ca.stop().await
}

pub async fn without_the_api_server_a_new_token_is_unavailable_and_a_renewal_goes_on(
    world: &mut World,
) -> anyhow::Result<()> {
    // Renewed at once, again and again.
    let short = [("program_ttl", json!("10s"))];
    world.pod(NAMESPACE, "podveil-ca-a", "podveil-ca", "n1")?;
    let ca = world.ca_with("podveil-ca-a", &short).await?;
    for (pod, on) in [("node-1", "n1"), ("node-2", "n2")] {
        world.pod(NAMESPACE, pod, "podveil-node", on)?;
    }
    let token = |pod| world.token(NAMESPACE, "podveil-node", Some(pod), AUDIENCE, 3600);
    let (first, second) = (token("node-1")?, token("node-2")?);
    let n1 = world
        .program(ca.address(), node("n1")?, &first, &ca.stop)
        .await?;
    svid(&n1).await?;

    let roots = world.roots().await?.context("no roots")?;
    world.api.kill();
    let n2 = world.program_trusting(&roots, ca.address(), node("n2")?, &second, &ca.stop)?;
    let mut last = n2.last_error();
    let refused = last.wait_for(Option::is_some);
    let refused = tokio::time::timeout(PATIENCE, refused).await??.clone();
    let refused = refused.unwrap_or_default();
    ensure!(refused.contains("token_review_unavailable"), "{refused}");

    let serial = n1.current().context("no SVID")?.svid.serial().to_owned();
    holds("n1 renews while the API server is away", async || {
        Ok(n1.current().is_some_and(|now| now.svid.serial() != serial))
    })
    .await?;
    world.api.resume()?;
    svid(&n2).await?;
    ca.stop().await
}

pub async fn a_node_gets_what_its_pods_are_and_a_request_ahead_of_the_watch_waits(
    world: &mut World,
) -> anyhow::Result<()> {
    use podveil_ca_client::Key;
    use podveil_ca_client::transport::channel;
    use podveil_proto::istio::v1::auth::IstioCertificateRequest;
    use podveil_proto::istio::v1::auth::istio_certificate_service_client::IstioCertificateServiceClient;
    use prost_types::value::Kind;

    let ca = world.ca("podveil-ca-a").await?;
    world.namespace("shop", "web", json!({"io.cilium/mtls-enabled": "true"}))?;
    world.namespace("plain", "web", json!({}))?;
    world.pod("plain", "web-1", "web", "n1")?;
    world.pod(NAMESPACE, "node-1", "podveil-node", "n1")?;
    let token = world.token(NAMESPACE, "podveil-node", Some("node-1"), AUDIENCE, 3600)?;
    let n1 = world
        .program(ca.address(), node("n1")?, &token, &ca.stop)
        .await?;
    svid(&n1).await?;

    let ask = async |id: &str| -> anyhow::Result<Result<(), tonic::Status>> {
        let request = IstioCertificateRequest {
            csr: Key::generate()?.request(&SpiffeId::new(id)?)?,
            validity_duration: 0,
            metadata: Some(prost_types::Struct {
                fields: [(
                    "ImpersonatedIdentity".to_owned(),
                    prost_types::Value {
                        kind: Some(Kind::StringValue(id.to_owned())),
                    },
                )]
                .into(),
            }),
        };
        let ca = channel(&ca.address().to_string(), &n1, ProgramIdentity::Ca);
        let mut client = IstioCertificateServiceClient::new(ca);
        Ok(client.create_certificate(request).await.map(drop))
    };
    // Asked first, bound after: as a node that is quicker than the CA's watch.
    let bind = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        world.pod("shop", "web-1", "web", "n1")
    };
    let (answer, bound) = tokio::join!(ask(WEB), bind);
    bound?;
    answer??;
    for (id, reason) in [
        (
            "spiffe://cluster.local/ns/plain/sa/web",
            "workload_not_enrolled",
        ),
        (
            "spiffe://cluster.local/ns/shop/sa/db",
            "no_such_workload_on_node",
        ),
    ] {
        let refused = ask(id).await?.err().context("it was issued")?;
        ensure!(refused.message().contains(reason), "{id}: {refused}");
    }
    // A finished pod entitles nobody any more.
    world.phase("shop", "web-1", "Succeeded")?;
    eventually("a finished pod entitles nobody", async || {
        Ok(ask(WEB).await?.err())
    })
    .await?;
    ca.stop().await
}

pub async fn a_node_whose_pod_left_does_not_renew_its_own_svid(
    world: &mut World,
) -> anyhow::Result<()> {
    world.pod(NAMESPACE, "podveil-ca-a", "podveil-ca", "n1")?;
    let ca = world
        .ca_with("podveil-ca-a", &[("program_ttl", json!("10s"))])
        .await?;
    world.pod(NAMESPACE, "node-2", "podveil-node", "n2")?;
    let token = world.token(NAMESPACE, "podveil-node", Some("node-2"), AUDIENCE, 3600)?;
    let n2 = world
        .program(ca.address(), node("n2")?, &token, &ca.stop)
        .await?;
    svid(&n2).await?;
    world.delete(NAMESPACE, "pod", "node-2")?;
    let mut last = n2.last_error();
    let refused = last.wait_for(|last| {
        last.as_ref()
            .is_some_and(|last| last.contains("no_such_program"))
    });
    tokio::time::timeout(PATIENCE, refused)
        .await
        .context("it still renews")??;
    ca.stop().await
}
