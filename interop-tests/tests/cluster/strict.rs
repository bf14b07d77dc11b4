// SPDX-License-Identifier: Apache-2.0
//! Strict mode: whoever has no identity is refused, and what Kubernetes itself does goes on.

use anyhow::{Context, ensure};
use podveil_cluster::Cluster;
use podveil_cluster::podveil::{APP_PORT, Podveil, curl, pod, urls, wait_for_ways};
use podveil_sim::app::MARKER;
use podveil_sim::{eventually, run};
use std::time::Duration;

const SETTLE: Duration = Duration::from_secs(60);

pub fn strict_refuses_everybody_without_identity_but_the_kubelet(
    podveil: &Podveil<'_>,
) -> anyhow::Result<()> {
    let cluster = podveil.cluster;
    cluster.apply(&format!(
        "apiVersion: v1\nkind: Namespace\nmetadata: {{ name: vault }}\n---\n\
         apiVersion: v1\nkind: Namespace\nmetadata: {{ name: outside }}\n---\n{}{}{}
apiVersion: v1
kind: Service
metadata: {{ name: far-port, namespace: vault }}
spec:
  type: NodePort
  selector: {{ app: far }}
  ports: [{{ port: 80, targetPort: {APP_PORT}, nodePort: 30080 }}]
",
        pod("vault", "client", "node-1"),
        pod("vault", "far", "node-2"),
        pod("outside", "plain", "node-2"),
    ))?;
    cluster.wait_for_pods("vault")?;
    cluster.wait_for_pods("outside")?;
    podveil.label("vault", true)?;
    podveil.wait_for_stage("vault", "mandatory", SETTLE)?;
    // Permissive: in plain it is reached from everywhere.
    wait_for_ways(cluster, ("outside", "plain"), ("vault", "far"))?;
    let node_port = format!("http://{}:30080/", cluster.nodes[0].v4);
    eventually(SETTLE, "the NodePort answers", || from_host(&node_port))?;

    cluster.kubectl(&["label", "namespace", "vault", "podveil.io/mode=strict"])?;
    let far = urls(cluster, "vault", "far")?;
    eventually(SETTLE, "a pod without identity is refused", || {
        ensure!(
            curl(cluster, "outside", "plain", &far[3]).is_err(),
            "it is still answered"
        );
        Ok(())
    })?;
    for url in &far {
        ensure!(
            curl(cluster, "outside", "plain", url).is_err(),
            "outside is answered at {url}"
        );
        curl(cluster, "vault", "client", url).with_context(|| format!("enrolled, {url}"))?;
    }
    ensure!(
        from_host(&node_port).is_err(),
        "whoever comes from outside by NodePort is answered"
    );
    // An enrolled pod's dial to a NodePort is tunnelled.
    curl(cluster, "vault", "client", &node_port)?;

    // A node's own processes are not the kubelet because of their address.
    let direct = &far[3];
    ensure!(
        cluster.nodes[1]
            .machine
            .run(&["curl", "-sS", "--fail", "--max-time", "5", direct])
            .is_err(),
        "a process of the node is answered"
    );
    still_ready(cluster)?;
    // Port-forward enters at the pod's loopback.
    let body = cluster.port_forward("vault", "far", APP_PORT, |address| {
        from_host(&format!("http://{address}/"))
    })?;
    ensure!(body.contains(MARKER), "port-forward answers {body:?}");
    Ok(())
}

fn from_host(url: &str) -> anyhow::Result<String> {
    run(
        "curl",
        ["-sS", "--fail", "--noproxy", "*", "--max-time", "5", url],
    )
}

/// Each pod has been probed once a second since strict began: none has become unready or been started again.
fn still_ready(cluster: &Cluster) -> anyhow::Result<()> {
    let pods = cluster.get(&["--namespace=vault", "pods"])?;
    for pod in pods["items"].as_array().into_iter().flatten() {
        let status = &pod["status"]["containerStatuses"][0];
        ensure!(
            status["ready"] == true && status["restartCount"] == 0,
            "{}: {status}",
            pod["metadata"]["name"]
        );
    }
    Ok(())
}
