// SPDX-License-Identifier: Apache-2.0
use crate::{Size, objects};
use anyhow::Context;
use futures::{StreamExt, TryStreamExt, stream};
use kube::api::{ApiResource, DynamicObject, PostParams, Request};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use serde::Deserialize;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Requests under way at once: enough to keep the server busy.
const AT_ONCE: usize = 32;
/// Of Podveil's own programs.
pub(crate) const OWN_NAMESPACE: &str = "podveil-system";
pub(crate) const CONTROLLER: &str = "podveil-controller";
/// Says that everything is there.
const LOADED: &str = "scale-loaded";

/// An API server, as its administrator.
#[derive(Clone)]
pub struct Api {
    pub(crate) client: Client,
    kubeconfig: PathBuf,
}

impl std::fmt::Debug for Api {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Api").field(&self.kubeconfig).finish()
    }
}

/// What is needed of a pod.
#[derive(Clone, Debug)]
pub(crate) struct PodRef {
    pub uid: String,
    pub version: u64,
}

#[derive(Deserialize)]
struct Made {
    metadata: Meta,
}

#[derive(Deserialize)]
struct Meta {
    uid: String,
}

impl Api {
    /// # Errors
    /// If the kubeconfig cannot be read.
    pub async fn new(kubeconfig: &Path) -> anyhow::Result<Self> {
        let file = Kubeconfig::read_from(kubeconfig)?;
        let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?;
        Ok(Self {
            client: Client::try_from(config)?,
            kubeconfig: kubeconfig.to_owned(),
        })
    }

    /// A kubeconfig for the controller's own ServiceAccount, which may do anything: its requests are counted, its rights
    /// are another test's.
    pub(crate) async fn controller_kubeconfig(&self, folder: &Path) -> anyhow::Result<PathBuf> {
        let path = format!("/api/v1/namespaces/{OWN_NAMESPACE}/serviceaccounts/{CONTROLLER}/token");
        let request = json!({ "spec": { "expirationSeconds": 7200 } });
        let answer: Value =
            serde_json::from_str(&self.post(&path, &request).await?.context("no token")?)?;
        let mut config: Value = serde_json::from_slice(&std::fs::read(&self.kubeconfig)?)?;
        config["users"][0]["user"]["token"] = answer["status"]["token"].clone();
        let path = folder.join("controller.kubeconfig");
        std::fs::write(&path, serde_json::to_vec(&config)?)?;
        Ok(path)
    }

    /// Requests of ServiceAccounts that the server has taken so far, watches included: the controller is the only one.
    pub(crate) async fn requests(&self) -> anyhow::Result<u64> {
        let request = http_get("/metrics")?;
        let text = self.client.request_text(request).await?;
        let counted = text
            .lines()
            .filter(|line| {
                line.starts_with("apiserver_flowcontrol_dispatched_requests_total{")
                    && line.contains("flow_schema=\"service-accounts\"")
            })
            .filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok());
        Ok(counted.sum::<f64>() as u64)
    }

    /// Every pod of the cluster, by its number.
    pub(crate) async fn pods(&self, size: &Size) -> anyhow::Result<Vec<PodRef>> {
        let mut found = vec![None; size.pods()];
        let resource = ApiResource::from_gvk(&kube::api::GroupVersionKind::gvk("", "v1", "Pod"));
        let pods = kube::Api::<DynamicObject>::all_with(self.client.clone(), &resource);
        let mut page = kube::api::ListParams::default().limit(5000);
        loop {
            let list = pods.list_metadata(&page).await?;
            for pod in list.items {
                let meta = pod.metadata;
                let number = meta
                    .name
                    .as_deref()
                    .and_then(|name| name.rsplit_once('-'))
                    .and_then(|(_, number)| number.parse::<usize>().ok());
                if let Some(place) = number.and_then(|number| found.get_mut(number)) {
                    *place = Some(PodRef {
                        uid: meta.uid.context("a pod without a uid")?,
                        version: meta.resource_version.context("no version")?.parse()?,
                    });
                }
            }
            match list.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => page = page.continue_token(&token),
                None => break,
            }
        }
        found
            .into_iter()
            .enumerate()
            .map(|(number, pod)| pod.with_context(|| format!("pod {number} is not there")))
            .collect()
    }

    /// Writes a pod's status as its kubelet would.
    pub(crate) async fn write_status(
        &self,
        size: &Size,
        pod: usize,
        ready: bool,
    ) -> anyhow::Result<()> {
        let path = format!(
            "/api/v1/namespaces/{}/pods/{}/status",
            size.namespace(size.service_of(pod)),
            objects::pod_name(size, pod)
        );
        let body = serde_json::to_vec(&objects::pod_status(size, pod, ready))?;
        let request = http::Request::patch(path)
            .header("content-type", "application/merge-patch+json")
            .body(body)?;
        self.client.request_text(request).await?;
        Ok(())
    }

    /// `None` where it exists already.
    async fn post(&self, path: &str, object: &Value) -> anyhow::Result<Option<String>> {
        let request =
            Request::new(path).create(&PostParams::default(), serde_json::to_vec(object)?)?;
        match self.client.request_text(request).await {
            Ok(answer) => Ok(Some(answer)),
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(None),
            Err(error) => Err(error).with_context(|| format!("creating at {path}")),
        }
    }

    async fn post_all(&self, objects: impl Iterator<Item = (String, Value)>) -> anyhow::Result<()> {
        stream::iter(objects)
            .map(|(path, object)| async move { self.post(&path, &object).await.map(drop) })
            .buffer_unordered(AT_ONCE)
            .try_collect()
            .await
    }

    async fn make_pod(&self, size: &Size, pod: usize) -> anyhow::Result<(usize, String)> {
        let namespace = size.namespace(size.service_of(pod));
        let path = format!("/api/v1/namespaces/{namespace}/pods");
        let made = self
            .post(&path, &objects::pod(size, pod))
            .await?
            .context("the pod is there already")?;
        self.write_status(size, pod, true).await?;
        let made: Made = serde_json::from_str(&made)?;
        Ok((pod, made.metadata.uid))
    }
}

fn http_get(path: &str) -> anyhow::Result<http::Request<Vec<u8>>> {
    Ok(http::Request::get(path).body(Vec::new())?)
}

/// Makes the whole cluster, unless it is there already.
///
/// # Errors
/// If the API server refuses anything.
pub async fn load(api: &Api, size: &Size) -> anyhow::Result<()> {
    let done = http_get(&format!("/api/v1/namespaces/default/configmaps/{LOADED}"))?;
    if api.client.request_text(done).await.is_ok() {
        return Ok(());
    }
    let namespaces = size.namespaces().chain([OWN_NAMESPACE.to_owned()]);
    api.post_all(namespaces.map(|name| {
        let object = if name == OWN_NAMESPACE {
            json!({ "metadata": { "name": name } })
        } else {
            objects::namespace(&name)
        };
        ("/api/v1/namespaces".to_owned(), object)
    }))
    .await?;
    let account = json!({ "metadata": { "name": CONTROLLER } });
    let accounts = format!("/api/v1/namespaces/{OWN_NAMESPACE}/serviceaccounts");
    api.post(&accounts, &account).await?;
    let binding = json!({
        "metadata": { "name": CONTROLLER },
        "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin" },
        "subjects": [{ "kind": "ServiceAccount", "name": CONTROLLER, "namespace": OWN_NAMESPACE }],
    });
    api.post(
        "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
        &binding,
    )
    .await?;
    let of = |service: usize, kind: &str| {
        format!("/api/v1/namespaces/{}/{kind}", size.namespace(service))
    };
    api.post_all((0..size.nodes).map(|node| ("/api/v1/nodes".to_owned(), objects::node(node))))
        .await?;
    api.post_all(size.all_services().flat_map(|service| {
        [
            (
                of(service, "serviceaccounts"),
                objects::service_account(service),
            ),
            (of(service, "services"), objects::service(service)),
        ]
    }))
    .await?;
    let made: Vec<(usize, String)> = stream::iter(0..size.pods())
        .map(|pod| api.make_pod(size, pod))
        .buffer_unordered(AT_ONCE)
        .try_collect()
        .await?;
    let mut uids = vec![String::new(); size.pods()];
    for (pod, uid) in made {
        uids[pod] = uid;
    }
    let uids = &uids;
    api.post_all(size.all_services().flat_map(|service| {
        let path = format!(
            "/apis/discovery.k8s.io/v1/namespaces/{}/endpointslices",
            size.namespace(service)
        );
        objects::slices(size, service, uids)
            .into_iter()
            .map(move |slice| (path.clone(), slice))
    }))
    .await?;
    let loaded = json!({ "metadata": { "name": LOADED } });
    api.post("/api/v1/namespaces/default/configmaps", &loaded)
        .await?;
    Ok(())
}
