// SPDX-License-Identifier: Apache-2.0
//! Podveil on the cluster, as a person would put it there.

use crate::{APP_IMAGE, Cluster};
use anyhow::{Context, ensure};
use podveil_sim::{eventually, run};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// In each line that a proxy writes of a connection.
const ACCESS: &str = "\"scope\":\"access\"";
pub const NAMESPACE: &str = "podveil-system";
pub const LABEL: &str = "io.cilium/mtls-enabled";
/// The port of the application in each pod that [`pod`] describes.
pub const APP_PORT: u16 = 8080;

/// From a pod's readiness to its Service in every node's rules.
const SERVICES: Duration = Duration::from_secs(30);

/// What a checkout has built.
#[derive(Clone, Debug)]
pub struct Checkout {
    /// Holds `charts/podveil` and `target/images`.
    pub root: PathBuf,
    pub podveilctl: PathBuf,
}

/// An installed Podveil. Dropping it does nothing: it goes with the cluster, or by [`Podveil::uninstall`].
#[derive(Debug)]
pub struct Podveil<'a> {
    pub cluster: &'a Cluster,
    podveilctl: PathBuf,
    chart: PathBuf,
}

impl<'a> Podveil<'a> {
    /// `helm install` with images of this checkout; all programs are ready when it returns.
    ///
    /// # Errors
    /// With what their pods say, if they do not become ready.
    pub fn install(
        cluster: &'a Cluster,
        checkout: &Checkout,
        values: &[&str],
    ) -> anyhow::Result<Self> {
        for image in ["ca", "controller", "node"] {
            let archive = checkout.root.join(format!("target/images/{image}.tar"));
            cluster
                .import_image(&archive)
                .with_context(|| format!("{image}: `cargo xtask image` makes it"))?;
        }
        let chart = checkout.root.join("charts/podveil");
        let mut command = vec![
            "install",
            "podveil",
            chart.to_str().context("the checkout has a plain path")?,
            "--namespace=podveil-system",
            "--create-namespace",
            "--set=image.pullPolicy=Never",
        ];
        let cgroup = format!("--set=node.cgroup={}", cluster.cgroup());
        if !Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
            // With cgroup v1 the folder lies beside those of other clusters' nodes of the same name.
            command.push(&cgroup);
        }
        command.extend_from_slice(values);
        cluster.helm(&command)?;
        let podveil = Self {
            cluster,
            podveilctl: checkout.podveilctl.clone(),
            chart: chart.clone(),
        };
        podveil.wait_for_programs()?;
        Ok(podveil)
    }

    /// `helm upgrade` with these values changed; all programs are the new ones and ready when it returns.
    ///
    /// # Errors
    /// With what their pods say, if they do not become ready.
    pub fn upgrade(&self, values: &[&str]) -> anyhow::Result<()> {
        let chart = self
            .chart
            .to_str()
            .context("the checkout has a plain path")?;
        let mut command = vec![
            "upgrade",
            "podveil",
            chart,
            "--namespace=podveil-system",
            "--reuse-values",
        ];
        command.extend_from_slice(values);
        self.cluster.helm(&command)?;
        self.wait_for_programs()
    }

    fn wait_for_programs(&self) -> anyhow::Result<()> {
        for program in [
            "deployment/podveil-ca",
            "deployment/podveil-controller",
            "daemonset/podveil-node",
        ] {
            self.cluster
                .kubectl(&[
                    "--namespace=podveil-system",
                    "rollout",
                    "status",
                    program,
                    "--timeout=120s",
                ])
                .with_context(|| self.diagnosis())?;
        }
        Ok(())
    }

    /// The one that is installed already.
    pub fn installed(cluster: &'a Cluster, checkout: &Checkout) -> Self {
        Self {
            cluster,
            chart: checkout.root.join("charts/podveil"),
            podveilctl: checkout.podveilctl.clone(),
        }
    }

    /// The pods of our own namespace and the last lines of each program, connections' lines apart, for a report of what went
    /// wrong.
    pub fn diagnosis(&self) -> String {
        let ask = |arguments: &[&str]| {
            self.cluster
                .kubectl(&[&["--namespace=podveil-system"], arguments].concat())
                .unwrap_or_else(|error| format!("{error:#}"))
        };
        let mut text = ask(&["get", "pods", "--output=wide"]);
        for program in ["ca", "controller", "node"] {
            let logs = ask(&[
                "logs",
                &format!("--selector=app.kubernetes.io/component=podveil-{program}"),
                "--all-containers",
                "--prefix",
                "--tail=100",
            ]);
            for line in logs.lines().filter(|line| !line.contains(ACCESS)) {
                text.push_str(line);
                text.push('\n');
            }
        }
        text
    }

    /// Sets or removes the label that enrols a namespace.
    ///
    /// # Errors
    /// If there is no such namespace.
    pub fn label(&self, namespace: &str, enrolled: bool) -> anyhow::Result<()> {
        let change = if enrolled {
            format!("{LABEL}=true")
        } else {
            format!("{LABEL}-")
        };
        self.cluster
            .kubectl(&["label", "--overwrite", "namespace", namespace, &change])
            .map(drop)
    }

    /// `podveilctl` with these arguments, as JSON.
    ///
    /// # Errors
    /// If it says that it could not be done.
    pub fn ctl(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let kubeconfig = format!("KUBECONFIG={}", self.cluster.kubeconfig().display());
        let podveilctl = self.podveilctl.display().to_string();
        let answer = run(
            "env",
            [
                &[kubeconfig.as_str(), &podveilctl],
                arguments,
                &["--output=json"],
            ]
            .concat(),
        )?;
        serde_json::from_str(&answer).context("podveilctl answers JSON")
    }

    /// Waits until every pod of the namespace is at this stage.
    ///
    /// # Errors
    /// With the stages and reasons, if they are not in time.
    pub fn wait_for_stage(
        &self,
        namespace: &str,
        stage: &str,
        patience: Duration,
    ) -> anyhow::Result<()> {
        let object = self
            .cluster
            .get(&["pods", &format!("--namespace={namespace}")])?;
        let wanted = object["items"].as_array().map_or(0, Vec::len);
        eventually(patience, &format!("all of {namespace} are {stage}"), || {
            let status = self.ctl(&["status", "--all", namespace])?;
            let pods = status["pods"].as_array().map_or(&[][..], Vec::as_slice);
            let there = pods.iter().filter(|pod| pod["stage"] == stage).count();
            let seen: Vec<String> = pods
                .iter()
                .map(|pod| format!("{}: {} {}", pod["name"], pod["stage"], pod["reason"]))
                .collect();
            ensure!(there == wanted && wanted > 0, "{}", seen.join(", "));
            Ok(())
        })
    }

    /// `helm uninstall`, and its namespace.
    ///
    /// # Errors
    /// If Helm's hook fails, with what it says.
    pub fn uninstall(self) -> anyhow::Result<()> {
        self.cluster
            .helm(&[
                "uninstall",
                "podveil",
                "--namespace=podveil-system",
                "--wait",
                "--timeout=3m",
            ])
            .with_context(|| self.diagnosis())?;
        self.cluster
            .kubectl(&["delete", "namespace", NAMESPACE, "--timeout=60s"])
            .map(drop)
    }
}

/// A pod with the test application on [`APP_PORT`], ready when it serves, and a Service `<name>-service` of both families
/// on port 80 for it.
pub fn pod(namespace: &str, name: &str, node: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Pod
metadata: {{ name: {name}, namespace: {namespace}, labels: {{ app: {name} }} }}
spec:
  nodeSelector: {{ kubernetes.io/hostname: {node} }}
  terminationGracePeriodSeconds: 0
  containers:
    - name: app
      image: {APP_IMAGE}
      imagePullPolicy: Never
      args: [serve, '{APP_PORT}']
      readinessProbe: {{ httpGet: {{ path: /, port: {APP_PORT} }}, periodSeconds: 1 }}
---
apiVersion: v1
kind: Service
metadata: {{ name: {name}-service, namespace: {namespace} }}
spec:
  ipFamilyPolicy: RequireDualStack
  selector: {{ app: {name} }}
  ports: [{{ port: 80, targetPort: {APP_PORT} }}]
---
"
    )
}

/// A Deployment with the test application on [`APP_PORT`], whose pods end as an application should: they leave the Service
/// first, then serve what still comes. And a Service `<name>-service` of both families on port 80 for it.
pub fn deployment(namespace: &str, name: &str, replicas: u32) -> String {
    format!(
        "
apiVersion: apps/v1
kind: Deployment
metadata: {{ name: {name}, namespace: {namespace} }}
spec:
  replicas: {replicas}
  selector: {{ matchLabels: {{ app: {name} }} }}
  template:
    metadata: {{ labels: {{ app: {name} }} }}
    spec:
      terminationGracePeriodSeconds: 5
      containers:
        - name: app
          image: {APP_IMAGE}
          imagePullPolicy: Never
          args: [serve, '{APP_PORT}']
          readinessProbe: {{ httpGet: {{ path: /, port: {APP_PORT} }}, periodSeconds: 1 }}
          lifecycle: {{ preStop: {{ sleep: {{ seconds: 4 }} }} }}
---
apiVersion: v1
kind: Service
metadata: {{ name: {name}-service, namespace: {namespace} }}
spec:
  ipFamilyPolicy: RequireDualStack
  selector: {{ app: {name} }}
  ports: [{{ port: 80, targetPort: {APP_PORT} }}]
---
"
    )
}

/// The application's URLs that a client may use: by name of the Service, by its addresses, by the pod's addresses.
///
/// # Errors
/// If there is no such pod or Service.
pub fn urls(cluster: &Cluster, namespace: &str, pod: &str) -> anyhow::Result<Vec<String>> {
    let scope = format!("--namespace={namespace}");
    let object = cluster.get(&[&scope, "pod", pod])?;
    // A pod's own name is in its own /etc/hosts: the service has another.
    let service = format!("{pod}-service");
    let service_object = cluster.get(&[&scope, "service", &service])?;
    let mut urls = vec![format!("http://{service}.{namespace}/")];
    for (list, port) in [
        (&service_object["spec"]["clusterIPs"], 80),
        (&object["status"]["podIPs"], APP_PORT),
    ] {
        for entry in list.as_array().into_iter().flatten() {
            let address = entry["ip"].as_str().or(entry.as_str()).unwrap_or_default();
            let address = address
                .parse()
                .with_context(|| format!("{pod} has the address {address:?}"))?;
            urls.push(format!(
                "http://{}/",
                std::net::SocketAddr::new(address, port)
            ));
        }
    }
    ensure!(urls.len() == 5, "{pod} lacks an address: {urls:?}");
    Ok(urls)
}

/// Curls from a pod; the answer must be the application's.
///
/// # Errors
/// If it is refused, or something else answers.
pub fn curl(cluster: &Cluster, namespace: &str, from: &str, url: &str) -> anyhow::Result<String> {
    let body = cluster.exec(
        namespace,
        from,
        &["curl", "-sS", "--fail", "--max-time", "10", url],
    )?;
    ensure!(
        body.contains(podveil_sim::app::MARKER),
        "{url}: something else answers: {body}"
    );
    Ok(body)
}

/// Waits until one pod reaches the other, each by its namespace and name, by all its [`urls`]: kube-proxy hears in its own
/// time of an endpoint that is ready.
///
/// # Errors
/// If it never does.
pub fn wait_for_ways(
    cluster: &Cluster,
    (from_namespace, from): (&str, &str),
    (namespace, to): (&str, &str),
) -> anyhow::Result<()> {
    for url in urls(cluster, namespace, to)? {
        eventually(SERVICES, "kube-proxy knows the Service", || {
            curl(cluster, from_namespace, from, &url)
        })?;
    }
    Ok(())
}

/// The folder of the programs that cargo built with this test, and the checkout that it belongs to.
///
/// # Errors
/// If this is no test.
pub fn checkout_of_test() -> anyhow::Result<Checkout> {
    let test = std::env::current_exe()?;
    let folder = test
        .ancestors()
        .nth(2)
        .context("a test lies in target/<profile>/deps")?;
    Ok(Checkout {
        root: Path::new(env!("CARGO_MANIFEST_DIR"))
            .ancestors()
            .nth(2)
            .context("the crate lies in a workspace")?
            .to_owned(),
        podveilctl: folder.join("podveilctl"),
    })
}
