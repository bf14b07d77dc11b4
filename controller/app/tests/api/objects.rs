// SPDX-License-Identifier: Apache-2.0
//! Objects of the API, as JSON.

use anyhow::Context;
use http::{Method, Request};
use podveil_kube::kube::{self, Client};
use serde_json::{Value, json};

/// Whoever writes objects.
pub struct Objects(pub Client);

/// A pod as a kubelet would report it: running and ready.
#[derive(Clone)]
pub struct Pod<'a> {
    pub namespace: &'a str,
    pub name: &'a str,
    pub node: &'a str,
    pub addresses: &'a [&'a str],
    pub annotations: Value,
    pub labels: Value,
    pub ports: Value,
}

impl<'a> Pod<'a> {
    pub fn new(namespace: &'a str, name: &'a str, node: &'a str, addresses: &'a [&'a str]) -> Self {
        Self {
            namespace,
            name,
            node,
            addresses,
            annotations: json!({}),
            labels: json!({"app": name}),
            ports: json!([{"name": "http", "containerPort": 8080}]),
        }
    }

    pub fn labels(self, labels: Value) -> Self {
        Self { labels, ..self }
    }

    pub fn ports(self, ports: Value) -> Self {
        Self { ports, ..self }
    }

    pub fn annotations(self, annotations: Value) -> Self {
        Self {
            annotations,
            ..self
        }
    }
}

impl Objects {
    async fn send(
        &self,
        method: Method,
        path: &str,
        kind: &str,
        body: Option<&Value>,
    ) -> kube::Result<Value> {
        let body = body.map_or_else(Vec::new, |body| body.to_string().into_bytes());
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("content-type", kind)
            .body(body)
            .expect("constants and names");
        self.0.request(request).await
    }

    pub async fn get(&self, path: &str) -> anyhow::Result<Value> {
        Ok(self
            .send(Method::GET, path, "application/json", None)
            .await?)
    }

    pub async fn post(&self, path: &str, object: Value) -> anyhow::Result<Value> {
        let sent = self.send(Method::POST, path, "application/json", Some(&object));
        sent.await
            .with_context(|| format!("POST {path} {object:.300}"))
    }

    pub async fn patch(&self, path: &str, patch: Value) -> anyhow::Result<Value> {
        let sent = self.send(
            Method::PATCH,
            path,
            "application/merge-patch+json",
            Some(&patch),
        );
        sent.await
            .with_context(|| format!("PATCH {path} {patch:.300}"))
    }

    /// At once, or after the grace that is given.
    pub async fn delete(&self, path: &str, grace: u32) -> anyhow::Result<()> {
        let options = json!({"gracePeriodSeconds": grace, "propagationPolicy": "Background"});
        let sent = self.send(Method::DELETE, path, "application/json", Some(&options));
        sent.await
            .with_context(|| format!("DELETE {path}"))
            .map(drop)
    }

    /// With the account that pods there run as.
    pub async fn namespace(&self, name: &str, labels: Value) -> anyhow::Result<()> {
        let metadata = json!({"name": name, "labels": labels});
        self.post("/api/v1/namespaces", json!({"metadata": metadata}))
            .await?;
        let account = json!({"metadata": {"name": "web"}});
        self.post(
            &format!("/api/v1/namespaces/{name}/serviceaccounts"),
            account,
        )
        .await
        .map(drop)
    }

    pub async fn label(&self, namespace: &str, labels: Value) -> anyhow::Result<()> {
        let patch = json!({"metadata": {"labels": labels}});
        self.patch(&format!("/api/v1/namespaces/{namespace}"), patch)
            .await
            .map(drop)
    }

    /// Its UID.
    pub async fn pod(&self, pod: &Pod<'_>) -> anyhow::Result<String> {
        let Pod {
            namespace,
            name,
            node,
            annotations,
            labels,
            ports,
            ..
        } = pod;
        let made = self
            .post(
                &format!("/api/v1/namespaces/{namespace}/pods"),
                json!({
                    "metadata": {"name": name, "labels": labels, "annotations": annotations},
                    "spec": {
                        "nodeName": node,
                        "serviceAccountName": "web",
                        "automountServiceAccountToken": false,
                        "containers": [{"name": "c", "image": "none", "ports": ports}],
                    },
                }),
            )
            .await?;
        self.pod_status(pod, "Running", true).await?;
        let uid = made.pointer("/metadata/uid").and_then(Value::as_str);
        Ok(uid.context("a pod has a UID")?.to_owned())
    }

    pub async fn pod_status(&self, pod: &Pod<'_>, phase: &str, ready: bool) -> anyhow::Result<()> {
        let addresses: Vec<_> = pod.addresses.iter().map(|ip| json!({"ip": ip})).collect();
        let ready = if ready { "True" } else { "False" };
        let status = json!({
            "phase": phase,
            "podIP": pod.addresses.first(),
            "podIPs": addresses,
            "conditions": [{"type": "Ready", "status": ready}],
        });
        let path = format!(
            "/api/v1/namespaces/{}/pods/{}/status",
            pod.namespace, pod.name
        );
        self.patch(&path, json!({"status": status})).await.map(drop)
    }

    pub async fn delete_pod(&self, namespace: &str, name: &str, grace: u32) -> anyhow::Result<()> {
        self.delete(
            &format!("/api/v1/namespaces/{namespace}/pods/{name}"),
            grace,
        )
        .await
    }

    /// What the API server made of it.
    pub async fn service(&self, namespace: &str, name: &str, spec: Value) -> anyhow::Result<Value> {
        let service = json!({"metadata": {"name": name}, "spec": spec});
        self.post(&format!("/api/v1/namespaces/{namespace}/services"), service)
            .await
    }

    pub async fn slice(
        &self,
        namespace: &str,
        name: &str,
        service: &str,
        port: u16,
        endpoints: Value,
    ) -> anyhow::Result<()> {
        let slice = json!({
            "metadata": {"name": name, "labels": {"kubernetes.io/service-name": service}},
            "addressType": "IPv4",
            "ports": [{"name": "", "port": port}],
            "endpoints": endpoints,
        });
        let path = format!("/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices");
        self.post(&path, slice).await.map(drop)
    }
}
