// SPDX-License-Identifier: Apache-2.0
//! Whatever is started again on a node, capture stands in the namespace that the pod has now.

use anyhow::{Context, ensure};
use podveil_cluster::podveil::{APP_PORT, NAMESPACE, Podveil, curl, pod, urls};
use podveil_cluster::{APP_IMAGE, Cluster, Node};
use podveil_sim::eventually;
use std::time::Duration;

const SETTLE: Duration = Duration::from_secs(60);
/// Pods are found by the runtime's word on one more cluster than by looking through processes.
pub const VALUES: [&str; 1] = ["--set=node.redirect.criSocket=/run/containerd/containerd.sock"];

/// The namespace is strict: that a request is answered says that both ends are captured.
pub fn capture_follows_its_pod_and_leaves_nothing_of_the_old_one(
    podveil: &Podveil<'_>,
) -> anyhow::Result<()> {
    let cluster = podveil.cluster;
    let node = &cluster.nodes[1];
    cluster.apply(&format!(
        "apiVersion: v1\nkind: Namespace\nmetadata: {{ name: port }}\n---\n{}{}{HOST}",
        pod("port", "client", "node-1"),
        pod("port", "web", "node-2"),
    ))?;
    cluster.wait_for_pods("port")?;
    podveil.label("port", true)?;
    settled(podveil, "client")?;
    settled(podveil, "web")?;
    cluster.kubectl(&["label", "namespace", "port", "podveil.io/mode=strict"])?;
    answers(cluster, "web", "before")?;
    found_by_runtime(podveil)?;
    only_the_kubelet_probes(cluster)?;

    // A container: the namespace is the sandbox's, and stays.
    let before = netns(node, cluster)?;
    let container = container(cluster)?;
    kill(node, &format!("grep -l {container} /proc/[0-9]*/cgroup"))?;
    restarted(cluster, 1)?;
    ensure!(
        netns(node, cluster)? == before,
        "a container's restart made another sandbox"
    );
    answers(cluster, "web", "after the container's restart")?;

    // The sandbox: another namespace, and nobody holds the old one.
    let uid = uid(cluster)?;
    kill(node, &format!("grep -l pod{uid} /proc/[0-9]*/cgroup"))?;
    restarted(cluster, 2)?;
    let after = netns(node, cluster)?;
    ensure!(after != before, "the sandbox is still {before}");
    settled(podveil, "web")?;
    answers(cluster, "web", "after the sandbox's restart")?;
    eventually(SETTLE, "nobody holds the old namespace", || {
        let named = before.replace('[', "\\[");
        let holders = format!("find /proc/[0-9]*/fd /proc/[0-9]*/ns -lname '{named}' 2>/dev/null");
        let holders = node
            .machine
            .run(&["sh", "-c", &format!("{holders} || true")])?;
        ensure!(holders.trim().is_empty(), "{holders}");
        Ok(())
    })?;

    // The runtime: pods live on, and new ones are found.
    node.restart_containerd()?;
    answers(cluster, "web", "after containerd's restart")?;
    cluster.apply(&pod("port", "late", "node-2"))?;
    cluster.wait_for_pods("port")?;
    settled(podveil, "late")?;
    // Its endpoint follows the pod's readiness after a while, as in any cluster.
    answers(cluster, "late", "a pod that started after it")?;

    // Ourselves: capture stands all the while.
    let own = format!("--namespace={NAMESPACE}");
    let ours = cluster.kubectl(&[
        &own,
        "get",
        "pods",
        "--selector=app.kubernetes.io/component=podveil-node",
        "--field-selector=spec.nodeName=node-2",
        "--output=name",
    ])?;
    cluster.kubectl(&[&own, "delete", ours.trim(), "--timeout=60s"])?;
    ensure!(
        has_rules(node, cluster)?,
        "capture went with the node program"
    );
    cluster.kubectl(&[
        &own,
        "rollout",
        "status",
        "daemonset/podveil-node",
        "--timeout=60s",
    ])?;
    settled(podveil, "web")?;
    answers(cluster, "web", "after the node program's restart")?;
    ensure!(
        netns(node, cluster)? == after,
        "its namespace is another one"
    );
    cluster.kubectl(&["delete", "namespace", "port", "--timeout=60s"])?;
    Ok(())
}

/// Calls itself the kubelet, in the node's network: it is one in a pod all the same.
const HOST: &str = "
apiVersion: v1
kind: Pod
metadata: { name: forger, namespace: port }
spec:
  hostNetwork: true
  nodeSelector: { kubernetes.io/hostname: node-2 }
  terminationGracePeriodSeconds: 0
  containers:
    - name: app
      image: podveil.test/app:1
      imagePullPolicy: Never
      command: [/bin/sh, -c, 'cp /usr/bin/curl /tmp/kubelet && sleep 3600']
";

fn only_the_kubelet_probes(cluster: &Cluster) -> anyhow::Result<()> {
    assert_eq!(APP_IMAGE, "podveil.test/app:1", "the image of the forger");
    let direct = &urls(cluster, "port", "web")?[3];
    let forged = ["/tmp/kubelet", "-sS", "--fail", "--max-time", "5", direct];
    ensure!(
        cluster.exec("port", "forger", &forged).is_err(),
        "a pod's process of that name passes as the kubelet"
    );
    // Probed once a second, strict since a while.
    let status = &cluster.get(&["--namespace=port", "pod", "web"])?["status"];
    ensure!(
        status["containerStatuses"][0]["ready"] == true,
        "the kubelet's probe of port {APP_PORT} fails: {status}"
    );
    Ok(())
}

fn answers(cluster: &Cluster, name: &str, when: &str) -> anyhow::Result<()> {
    eventually(SETTLE, when, || {
        for url in urls(cluster, "port", name)? {
            curl(cluster, "port", "client", &url).with_context(|| url.clone())?;
        }
        Ok(())
    })
}

fn settled(podveil: &Podveil<'_>, name: &str) -> anyhow::Result<()> {
    eventually(SETTLE, &format!("{name} is mandatory"), || {
        let status = podveil.ctl(&["status", "--all", "port"])?;
        let pods = status["pods"].as_array().map_or(&[][..], Vec::as_slice);
        let found = pods.iter().find(|pod| pod["name"] == name);
        ensure!(
            found.is_some_and(|pod| pod["stage"] == "mandatory"),
            "{found:?}"
        );
        Ok(())
    })
}

/// The runtime's word and `/proc` agree, or it would say that it looked through all processes.
fn found_by_runtime(podveil: &Podveil<'_>) -> anyhow::Result<()> {
    let uid = uid(podveil.cluster)?;
    let logs = podveil.cluster.kubectl(&[
        &format!("--namespace={NAMESPACE}"),
        "logs",
        "--selector=app.kubernetes.io/component=podveil-node",
        "--container=redirect",
        "--tail=-1",
    ])?;
    let found = (logs.lines())
        .find(|line| line.contains(&uid) && line.contains("a pod's namespace is found"))
        .with_context(|| format!("nothing of {uid} is found:\n{logs}"))?;
    ensure!(found.contains("Runtime"), "{found}");
    Ok(())
}

fn uid(cluster: &Cluster) -> anyhow::Result<String> {
    let web = cluster.get(&["--namespace=port", "pod", "web"])?;
    let uid = web["metadata"]["uid"].as_str();
    uid.map(str::to_owned).context("a pod has a uid")
}

fn container(cluster: &Cluster) -> anyhow::Result<String> {
    let web = cluster.get(&["--namespace=port", "pod", "web"])?;
    let id = web["status"]["containerStatuses"][0]["containerID"].as_str();
    let id = id.and_then(|id| id.strip_prefix("containerd://"));
    id.map(str::to_owned)
        .context("a running container has an id")
}

/// Kills the processes whose cgroup files `list` names.
fn kill(node: &Node, list: &str) -> anyhow::Result<()> {
    let script = format!("{list} 2>/dev/null | cut -d/ -f3 | xargs kill -KILL");
    node.machine.run(&["sh", "-c", &script]).map(drop)
}

fn restarted(cluster: &Cluster, count: u32) -> anyhow::Result<()> {
    eventually(SETTLE, "the pod has been started again", || {
        let web = cluster.get(&["--namespace=port", "pod", "web"])?;
        let status = &web["status"]["containerStatuses"][0];
        ensure!(
            status["ready"] == true && status["restartCount"] == count,
            "{status}"
        );
        Ok(())
    })
}

/// The network namespace of the pod's container, as `net:[<inode>]`.
fn netns(node: &Node, cluster: &Cluster) -> anyhow::Result<String> {
    let link = format!("readlink $({})/ns/net", process(cluster)?);
    let link = node.machine.run(&["sh", "-c", &link])?;
    let link = link.trim().to_owned();
    ensure!(link.starts_with("net:["), "the pod's namespace is {link:?}");
    Ok(link)
}

fn has_rules(node: &Node, cluster: &Cluster) -> anyhow::Result<bool> {
    let script = format!("nsenter --net=$({})/ns/net ip rule show", process(cluster)?);
    // Every back end has this one.
    let rules = node.machine.run(&["sh", "-c", &script])?;
    Ok(rules.contains("lookup 1338"))
}

/// A shell's way to a process of the pod's container: `/proc/<pid>`.
fn process(cluster: &Cluster) -> anyhow::Result<String> {
    let container = container(cluster)?;
    Ok(format!(
        "grep -l {container} /proc/[0-9]*/cgroup 2>/dev/null | head -n 1 | xargs dirname"
    ))
}
