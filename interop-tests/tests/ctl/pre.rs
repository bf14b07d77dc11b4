// SPDX-License-Identifier: Apache-2.0
//! `podveilctl check --pre` and the tool's manners, without a node.

use crate::run::{Said, ctl, kubectl, podveilctl};
use anyhow::{Context, ensure};
use podveil_cluster::ApiServer;
use std::os::unix::fs::symlink;
use std::path::Path;

/// A cluster in which Podveil would not go well, each object for one finding.
const TROUBLE: &str = r#"
apiVersion: v1
kind: Namespace
metadata: { name: guard, labels: { io.cilium/mtls-enabled: "true", podveil.io/mode: strict, istio-injection: enabled } }
---
apiVersion: v1
kind: Service
metadata: { name: gate, namespace: guard }
spec: { selector: { app: gate }, ports: [{ port: 443, targetPort: 9443 }] }
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingWebhookConfiguration
metadata: { name: gate }
webhooks:
  - name: gate.guard.example
    admissionReviewVersions: [v1]
    sideEffects: None
    failurePolicy: Ignore
    clientConfig: { service: { namespace: guard, name: gate } }
    rules: [{ apiGroups: [""], apiVersions: [v1], operations: [CREATE], resources: [endpoints] }]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: { name: web, namespace: guard }
spec: { podSelector: {}, ingress: [{ ports: [{ port: 8080 }] }] }
---
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: { name: ciliumnetworkpolicies.cilium.io }
spec:
  group: cilium.io
  scope: Namespaced
  names: { kind: CiliumNetworkPolicy, plural: ciliumnetworkpolicies }
  versions:
    - name: v2
      served: true
      storage: true
      schema: { openAPIV3Schema: { type: object, x-kubernetes-preserve-unknown-fields: true } }
---
apiVersion: v1
kind: ConfigMap
metadata: { name: cilium-config, namespace: kube-system }
data: { enable-ztunnel: "true" }
---
apiVersion: v1
kind: Node
metadata: { name: old }
"#;

const CILIUM_POLICY: &str = r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: { name: api, namespace: guard }
spec:
  endpointSelector: {}
  ingress: [{ fromEndpoints: [{}], toPorts: [{ ports: [{ port: "8080", protocol: TCP }] }] }]
"#;

fn whats(said: &Said, level: &str) -> anyhow::Result<Vec<String>> {
    let report = said.json()?;
    let findings = report["findings"].as_array().context("no findings")?;
    Ok(findings
        .iter()
        .filter(|finding| finding["level"] == level)
        .filter_map(|finding| finding["what"].as_str().map(str::to_owned))
        .collect())
}

#[test]
#[ignore = "cluster"]
fn what_stands_in_the_way_of_an_installation_is_named_with_its_cure() -> anyhow::Result<()> {
    let api = ApiServer::start()?;
    let podveilctl = podveilctl()?;
    let check = |arguments: &[&str]| {
        ctl(
            &podveilctl,
            api.kubeconfig(),
            &[&["check", "--pre", "-o", "json"], arguments].concat(),
        )
    };
    let empty = check(&[])?;
    ensure!(empty.code == 0, "{empty:?}");
    ensure!(whats(&empty, "unknown")?.is_empty(), "{empty:?}");

    kubectl(&api, &["apply", "--filename=-"], TROUBLE)?;
    let kernel = r#"{"status":{"nodeInfo":{"kernelVersion":"5.4.0-1","operatingSystem":"linux","architecture":"amd64"}}}"#;
    kubectl(
        &api,
        &[
            "patch",
            "node",
            "old",
            "--subresource=status",
            "--type=merge",
            "--patch",
            kernel,
        ],
        "",
    )?;
    let established = "--for=condition=Established";
    let definition = "crd/ciliumnetworkpolicies.cilium.io";
    kubectl(&api, &["wait", established, definition], "")?;
    kubectl(&api, &["apply", "--filename=-"], CILIUM_POLICY)?;
    let trouble = check(&[])?;
    ensure!(trouble.code == 3, "{trouble:?}");
    let problems = whats(&trouble, "problem")?;
    for part in [
        "Linux 5.4.0-1 on old: older than 5.13",
        "encryption.type=ztunnel is on",
        "namespace guard is Istio's too",
        "NetworkPolicy guard/web names ports",
        "CiliumNetworkPolicy guard/api names ports from",
        "ValidatingWebhookConfiguration gate is served by guard/gate port 443",
    ] {
        ensure!(
            problems.iter().any(|problem| problem.contains(part)),
            "{part:?} is not among {problems:#?}"
        );
    }
    ensure!(problems.len() == 6, "{problems:#?}");
    ensure!(
        trouble.out.contains("podveil.io/plain-inbound-ports=9443"),
        "{trouble:?}"
    );
    Ok(())
}

#[test]
#[ignore = "cluster"]
fn somebody_without_rights_is_told_what_could_not_be_looked_at() -> anyhow::Result<()> {
    let api = ApiServer::start()?;
    kubectl(&api, &["create", "serviceaccount", "nobody"], "")?;
    let token = kubectl(&api, &["create", "token", "nobody"], "")?;
    let theirs = api.kubeconfig_for("nobody", token.trim())?;
    let pre = ctl(&podveilctl()?, &theirs, &["check", "--pre", "-o", "json"])?;
    let unknown = whats(&pre, "unknown")?;
    ensure!(
        unknown
            .iter()
            .any(|what| what.starts_with("nodes cannot be read: ")),
        "{unknown:#?}"
    );
    let warnings = whats(&pre, "warning")?;
    ensure!(
        warnings.iter().any(|what| what
            == "you may not create pods/exec in Podveil's namespace, which is needed to use podveilctl"),
        "{warnings:#?}"
    );
    let status = ctl(&podveilctl()?, &theirs, &["status"])?;
    ensure!(status.code == 1 && status.out.is_empty(), "{status:?}");
    ensure!(
        status
            .err
            .contains("listing the pods in namespace podveil-system")
            && status.err.contains("nobody")
            && status.err.contains("try: "),
        "{status:?}"
    );
    Ok(())
}

#[test]
#[ignore = "cluster"]
fn where_podveil_is_not_the_check_says_so_and_the_plugin_is_the_same_program() -> anyhow::Result<()>
{
    let api = ApiServer::start()?;
    let plugin = api.folder().join("kubectl-podveil");
    symlink(podveilctl()?, &plugin)?;
    let check = ctl(&plugin, api.kubeconfig(), &["check"])?;
    ensure!(check.code == 3, "{check:?}");
    for program in ["podveil-ca", "podveil-controller", "podveil-node"] {
        ensure!(
            check.out.contains(&format!("no pod of {program} is there")),
            "{check:?}"
        );
    }
    let dump = ctl(&plugin, api.kubeconfig(), &["config", "dump"])?;
    ensure!(
        dump.code == 1
            && dump
                .err
                .starts_with("kubectl podveil: no pod of podveil-controller runs"),
        "{dump:?}"
    );
    Ok(())
}

#[test]
#[ignore = "cluster"]
fn an_api_server_that_is_away_is_named() -> anyhow::Result<()> {
    let mut api = ApiServer::start()?;
    api.kill();
    let check = ctl(&podveilctl()?, api.kubeconfig(), &["check", "--pre"])?;
    ensure!(check.code == 1, "{check:?}");
    ensure!(
        check.err.contains("asking the API server for its version") && check.err.contains("try: "),
        "{check:?}"
    );
    let missing = ctl(&podveilctl()?, Path::new("/nowhere"), &["status"])?;
    ensure!(
        missing.code == 1 && missing.err.contains("finding the cluster"),
        "{missing:?}"
    );
    let wrong = ctl(
        &podveilctl()?,
        api.kubeconfig(),
        &["status", "--context", "other"],
    )?;
    ensure!(wrong.code == 1 && wrong.err.contains("other"), "{wrong:?}");
    Ok(())
}
