// SPDX-License-Identifier: Apache-2.0
//! The bed itself, without Podveil.

use anyhow::ensure;
use podveil_cluster::{APP_IMAGE, Cluster};
use podveil_sim::run;
use std::path::PathBuf;
use std::time::Instant;

/// The programs that cargo built with this test: `target/<profile>`, above `deps`.
fn podveilctl() -> PathBuf {
    let test = std::env::current_exe().expect("a test has a path");
    test.ancestors()
        .nth(2)
        .expect("a test lies in target/<profile>/deps")
        .join("podveilctl")
}

fn pod(name: &str, node: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Pod
metadata: {{ name: {name}, labels: {{ app: {name} }} }}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 0
  containers:
    - name: app
      image: {APP_IMAGE}
      imagePullPolicy: Never
      args: [serve, '8080']
---
apiVersion: v1
kind: Service
metadata: {{ name: {name}-service }}
spec:
  ipFamilyPolicy: RequireDualStack
  selector: {{ app: {name} }}
  ports: [{{ port: 80, targetPort: 8080 }}]
---
"
    )
}

#[test]
#[ignore = "cluster"]
fn pods_reach_each_other_by_name_and_address_and_nothing_is_left() -> anyhow::Result<()> {
    let began = Instant::now();
    let cluster = Cluster::up(&podveilctl())?;
    println!("up after {:?}", began.elapsed());
    cluster.apply(&format!(
        "{}{}{}",
        pod("client", "node-1"),
        pod("near", "node-1"),
        pod("far", "node-2")
    ))?;
    cluster.kubectl(&[
        "wait",
        "--for=condition=Ready",
        "pod",
        "--all",
        "--timeout=60s",
    ])?;
    println!("pods after {:?}", began.elapsed());
    for server in ["client", "near", "far"] {
        let object = cluster.get(&["pod", server])?;
        // A pod's own name is in its own /etc/hosts: the service has another.
        let name = format!("{server}-service");
        let service = cluster.get(&["service", &name])?;
        let mut names = vec![name.clone(), format!("{name}.default.svc.cluster.local")];
        for (list, port) in [
            (&object["status"]["podIPs"], ":8080"),
            (&service["spec"]["clusterIPs"], ""),
        ] {
            let addresses = list.as_array().into_iter().flatten();
            for address in addresses.filter_map(|entry| entry["ip"].as_str().or(entry.as_str())) {
                names.push(if address.contains(':') {
                    format!("[{address}]{port}")
                } else {
                    format!("{address}{port}")
                });
            }
        }
        ensure!(names.len() == 6, "{names:?}");
        for name in names {
            let url = format!("http://{name}/");
            let body = cluster.exec(
                "default",
                "client",
                &["curl", "-sS", "--max-time", "10", &url],
            )?;
            ensure!(body.contains(podveil_sim::app::MARKER), "{url}: {body}");
        }
    }
    println!("curls after {:?}", began.elapsed());
    let folder = cluster.folder().to_owned();
    drop(cluster);
    println!("down after {:?}", began.elapsed());
    ensure!(!folder.exists(), "{} is left", folder.display());
    let cgroups = run("find", ["/sys/fs/cgroup", "-name", "podveil*-node-*"])?;
    ensure!(cgroups.is_empty(), "cgroups are left: {cgroups}");
    let links = run("ip", ["-brief", "link"])?;
    ensure!(!links.contains("podveil"), "a link is left: {links}");
    Ok(())
}
