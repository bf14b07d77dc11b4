// SPDX-License-Identifier: Apache-2.0
//! Each kind of workload and of Service that Kubernetes has, in an enrolled namespace.

use anyhow::{Context, ensure};
use podveil_cluster::podveil::{APP_PORT, Podveil, curl, pod};
use podveil_cluster::wire::{across, only_tls};
use podveil_cluster::{APP_IMAGE, Cluster};
use podveil_sim::{eventually, run};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

const NAMESPACE: &str = "bazaar";
const SETTLE: Duration = Duration::from_secs(60);
/// Ports of every node: to any endpoint, and to one of that node only.
const EVERYWHERE: u16 = 30081;
const LOCAL: u16 = 30082;

pub fn every_kind_of_workload_and_service_is_served(podveil: &Podveil<'_>) -> anyhow::Result<()> {
    let cluster = podveil.cluster;
    cluster.apply(&objects())?;
    cluster.kubectl(&[
        "--namespace=bazaar",
        "rollout",
        "status",
        "statefulset/db",
        "--timeout=60s",
    ])?;
    cluster.wait_for_pods(NAMESPACE)?;
    podveil.label(NAMESPACE, true)?;
    podveil.wait_for_stage(NAMESPACE, "mandatory", SETTLE)?;
    headless(cluster).context("a headless Service")?;
    replaced(podveil).context("a replaced pod of a StatefulSet")?;
    node_ports(cluster).context("a NodePort")?;
    static_pod(podveil, NAMESPACE).context("a pod from a file on its node")?;
    job(podveil).context("a Job")
}

/// Its kubelet knows it by another UID than the cluster does.
pub fn static_pod(podveil: &Podveil<'_>, namespace: &str) -> anyhow::Result<()> {
    let cluster = podveil.cluster;
    let node = &cluster.nodes[1];
    let manifest = pod(namespace, "etched", "node-2");
    let (manifest, _service) = manifest.split_once("---").context("a pod and a Service")?;
    node.set_static_pod("etched", Some(manifest))?;
    let of = format!("--namespace={namespace}");
    let mirror = [of.as_str(), "pod", "etched-node-2"];
    eventually(SETTLE, "the kubelet shows it to the cluster", || {
        cluster.get(&mirror)
    })?;
    cluster.wait_for_pods(namespace)?;
    podveil.wait_for_stage(namespace, "mandatory", SETTLE)?;
    let status = &cluster.get(&mirror)?["status"];
    let address: IpAddr = status["podIP"].as_str().context("its address")?.parse()?;
    let url = format!("http://{}/", SocketAddr::new(address, APP_PORT));
    let captured = across(cluster, namespace, || {
        curl(cluster, namespace, "client", &url).map(drop)
    })?;
    only_tls(captured)?;
    node.set_static_pod("etched", None)?;
    eventually(SETTLE, "it is gone", || {
        ensure!(cluster.get(&mirror).is_err(), "it is still there");
        Ok(())
    })
}

/// By the name of all pods and by that of one, which its successor takes over; in tunnels, since it crosses the link so.
fn headless(cluster: &Cluster) -> anyhow::Result<()> {
    let names = ["db", "db-0.db", "db-1.db"];
    let captured = across(cluster, NAMESPACE, || {
        for name in names {
            for family in ["--ipv4", "--ipv6"] {
                let url = format!("http://{name}.{NAMESPACE}.svc.cluster.local:{APP_PORT}/");
                cluster
                    .exec(
                        NAMESPACE,
                        "client",
                        &["curl", "-sS", "--fail", "--max-time", "10", family, &url],
                    )
                    .with_context(|| format!("{url} {family}"))?;
            }
        }
        Ok(())
    })?;
    only_tls(captured).map(drop)
}

/// The same name, another pod, another address.
fn replaced(podveil: &Podveil<'_>) -> anyhow::Result<()> {
    let cluster = podveil.cluster;
    let uid = || -> anyhow::Result<String> {
        let object = cluster.get(&["--namespace=bazaar", "pod", "db-1"])?;
        Ok(object["metadata"]["uid"].to_string())
    };
    let before = uid()?;
    cluster.kubectl(&["--namespace=bazaar", "delete", "pod", "db-1"])?;
    eventually(SETTLE, "another db-1", || {
        ensure!(uid()? != before, "it is still the same");
        Ok(())
    })?;
    cluster.wait_for_pods(NAMESPACE)?;
    podveil.wait_for_stage(NAMESPACE, "mandatory", SETTLE)?;
    let url = format!("http://db-1.db.{NAMESPACE}:{APP_PORT}/");
    // The name leads to the new address once CoreDNS has seen it.
    eventually(SETTLE, "the new one serves by the old name", || {
        curl(cluster, NAMESPACE, "client", &url)
    })?;
    let captured = across(cluster, NAMESPACE, || {
        curl(cluster, NAMESPACE, "client", &url).map(drop)
    })?;
    only_tls(captured).map(drop)
}

fn node_ports(cluster: &Cluster) -> anyhow::Result<()> {
    let [one, two] = [0, 1].map(|number| cluster.nodes[number].addresses());
    let url = |address: IpAddr, port| format!("http://{}/", SocketAddr::new(address, port));
    for (address, port) in [
        (one[0], EVERYWHERE),
        (one[1], EVERYWHERE),
        (two[0], EVERYWHERE),
        (two[1], EVERYWHERE),
        (two[0], LOCAL),
        (two[1], LOCAL),
    ] {
        let url = url(address, port);
        eventually(SETTLE, "a NodePort answers from outside", || {
            from_host(&url)
        })?;
        let captured = across(cluster, NAMESPACE, || {
            curl(cluster, NAMESPACE, "client", &url).map(drop)
        })?;
        // Not by way of the node: the enrolled client's proxy chooses the endpoint.
        only_tls(captured).with_context(|| format!("{url} from an enrolled pod"))?;
    }
    // The only endpoint is on node 2, and there a client keeps its address.
    for address in one {
        let url = url(address, LOCAL);
        ensure!(from_host(&url).is_err(), "{url} is answered");
    }
    let body = from_host(&url(two[0], LOCAL))?;
    let own = format!("peer=172.29.{}.254", cluster.number());
    ensure!(
        body.contains(&own),
        "the client's address is lost, {own} is wanted: {body}"
    );
    Ok(())
}

fn from_host(url: &str) -> anyhow::Result<String> {
    run(
        "curl",
        ["-sS", "--fail", "--noproxy", "*", "--max-time", "5", url],
    )
}

/// Its init container asks from the pod's first moment on, its container goes on until the pod is mandatory: nothing fails
/// on the way, and afterwards the finished pod is nobody's any more.
fn job(podveil: &Podveil<'_>) -> anyhow::Result<()> {
    let cluster = podveil.cluster;
    let ask = format!(
        "curl -sS --fail --max-time 10 --output /dev/null http://db.{NAMESPACE}:{APP_PORT}/ || exit 1"
    );
    cluster.apply(&format!(
        "
apiVersion: batch/v1
kind: Job
metadata: {{ name: report, namespace: {NAMESPACE} }}
spec:
  backoffLimit: 0
  template:
    metadata: {{ labels: {{ app: report }} }}
    spec:
      restartPolicy: Never
      nodeSelector: {{ kubernetes.io/hostname: node-1 }}
      initContainers:
        - name: first
          image: {APP_IMAGE}
          imagePullPolicy: Never
          command: [sh, -c, 'for n in 1 2 3 4 5 6 7 8 9 10; do {ask}; done']
      containers:
        - name: app
          image: {APP_IMAGE}
          imagePullPolicy: Never
          command: [sh, -c, 'until [ -e /go ]; do {ask}; done; {ask}']
"
    ))?;
    let stage = || -> anyhow::Result<Option<String>> {
        let status = podveil.ctl(&["status", "--all", NAMESPACE])?;
        let pods = status["pods"].as_array().cloned().unwrap_or_default();
        let pod = pods.iter().find(|pod| {
            pod["name"]
                .as_str()
                .is_some_and(|name| name.contains("report-"))
        });
        Ok(pod.map(|pod| pod["stage"].as_str().unwrap_or_default().to_owned()))
    };
    let logs = || {
        cluster
            .kubectl(&[
                "--namespace=bazaar",
                "logs",
                "job/report",
                "--all-containers",
            ])
            .unwrap_or_else(|error| format!("{error:#}"))
    };
    eventually(SETTLE, "the Job's pod is mandatory", || {
        let stage = stage()?;
        ensure!(stage.as_deref() == Some("mandatory"), "it is {stage:?}");
        Ok(())
    })
    .with_context(logs)?;
    let pod = cluster.kubectl(&[
        "--namespace=bazaar",
        "get",
        "pods",
        "--selector=app=report",
        "--output=jsonpath={.items[0].metadata.name}",
    ])?;
    eventually(SETTLE, "its init container has ended", || {
        cluster.exec(NAMESPACE, &pod, &["touch", "/go"])
    })
    .with_context(logs)?;
    cluster
        .kubectl(&[
            "--namespace=bazaar",
            "wait",
            "--for=condition=Complete",
            "job/report",
            "--timeout=60s",
        ])
        .with_context(logs)?;
    eventually(SETTLE, "the finished pod is let go", || {
        let stage = stage()?;
        ensure!(
            stage.as_deref().is_none_or(|stage| stage == "none"),
            "it is {stage:?}"
        );
        Ok(())
    })
}

fn objects() -> String {
    let mut objects =
        format!("apiVersion: v1\nkind: Namespace\nmetadata: {{ name: {NAMESPACE} }}\n---\n");
    objects.push_str(&pod(NAMESPACE, "client", "node-1"));
    objects.push_str(&pod(NAMESPACE, "web", "node-2"));
    for (name, policy, port) in [
        ("web-everywhere", "Cluster", EVERYWHERE),
        ("web-local", "Local", LOCAL),
    ] {
        objects.push_str(&format!(
            "
apiVersion: v1
kind: Service
metadata: {{ name: {name}, namespace: {NAMESPACE} }}
spec:
  type: NodePort
  externalTrafficPolicy: {policy}
  ipFamilyPolicy: RequireDualStack
  selector: {{ app: web }}
  ports: [{{ port: 80, targetPort: {APP_PORT}, nodePort: {port} }}]
---
"
        ));
    }
    objects.push_str(&format!(
        "
apiVersion: v1
kind: Service
metadata: {{ name: db, namespace: {NAMESPACE} }}
spec:
  clusterIP: None
  ipFamilyPolicy: RequireDualStack
  selector: {{ app: db }}
  ports: [{{ port: {APP_PORT} }}]
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {{ name: db, namespace: {NAMESPACE} }}
spec:
  serviceName: db
  replicas: 2
  podManagementPolicy: Parallel
  selector: {{ matchLabels: {{ app: db }} }}
  template:
    metadata: {{ labels: {{ app: db }} }}
    spec:
      nodeSelector: {{ kubernetes.io/hostname: node-2 }}
      terminationGracePeriodSeconds: 0
      containers:
        - name: app
          image: {APP_IMAGE}
          imagePullPolicy: Never
          args: [serve, '{APP_PORT}']
          readinessProbe: {{ httpGet: {{ path: /, port: {APP_PORT} }}, periodSeconds: 1 }}
"
    ));
    objects
}
