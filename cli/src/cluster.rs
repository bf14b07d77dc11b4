// SPDX-License-Identifier: Apache-2.0
//! Access to Podveil's programs on a Kubernetes cluster, by what every cluster has: the kubeconfig, and the API's
//! port-forward and exec. No port of ours is open, and nothing is asked of a person but the API's own permissions.

mod access;
mod exec;
mod forward;
pub mod installation;
pub mod pages;
mod programs;

pub use access::Access;
pub use exec::CaAdmin;
pub use installation::{Answered, Installation};
pub use programs::{Program, ProgramPod, Programs};

use crate::failure::{Failure, OrCure};
use anyhow::Context;
use bytes::Bytes;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::{Api, Client};
use podveil_kube::each;
use serde::de::DeserializeOwned;

/// The controller's admin page, and that of the `proxy` module.
pub const ADMIN_PORT: u16 = 15000;
/// The admin page of the `redirect` module, which shares its node's addresses with the proxy.
pub const REDIRECT_ADMIN_PORT: u16 = 15002;
/// The Lease whose holder is the CA's acting replica.
const CA_LEASE: &str = "podveil-ca";
/// Pods of one page of a list.
const PAGE: u32 = 500;

/// A cluster and the namespace that Podveil is installed in.
#[derive(Clone)]
pub struct Cluster {
    pub client: Client,
    pub namespace: String,
}

impl Cluster {
    /// The API server's version, `(1, 33)`.
    ///
    /// # Errors
    /// If there is no way to it. That it says no, or a version nobody can read, is the answer within.
    pub async fn version(&self) -> anyhow::Result<Answered<(u32, u32)>> {
        let version = match self.client.apiserver_version().await {
            Ok(version) => version,
            Err(kube::Error::Api(refused)) => return Ok(Err(refused.to_string())),
            Err(error) => {
                return Err(error).or_cure(
                    "asking the API server for its version",
                    "`kubectl version` takes the same way; `--kubeconfig` and `--context` choose another cluster",
                );
            }
        };
        // Some providers write `33+`.
        let minor = version.minor.trim_end_matches('+').parse().ok();
        let parsed = version.major.parse().ok().zip(minor);
        Ok(parsed.ok_or_else(|| format!("{}.{} is no version", version.major, version.minor)))
    }

    /// The programs' pods.
    ///
    /// # Errors
    /// If the API cannot be asked, or says no.
    pub async fn programs(&self) -> anyhow::Result<Programs> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        let mut found = Vec::new();
        let page = ListParams::default().limit(PAGE);
        let listed = each(&pods, page, |pod| found.extend(ProgramPod::from_pod(&pod)));
        listed.await.or_cure(
            format!("listing the pods in namespace {}", self.namespace),
            "`kubectl auth can-i list pods -n <namespace>` says whether you may; `--kubeconfig` and `--context` \
             choose another cluster",
        )?;
        Ok(Programs::new(found))
    }

    /// One answer of a program's loopback page.
    ///
    /// # Errors
    /// If the pod cannot be reached, or answers with anything but 200.
    pub async fn get(&self, pod: &str, port: u16, path: &str) -> anyhow::Result<Bytes> {
        forward::get(&self.client, &self.namespace, pod, port, path)
            .await
            .or_cure(
                format!("asking {}/{pod} for {path} on its port {port}", self.namespace),
                format!(
                    "`kubectl port-forward -n {} {pod} {port}` takes the same way; it needs `get` and `create` on `pods/portforward`",
                    self.namespace
                ),
            )
    }

    /// As [`get`](Self::get), for JSON.
    ///
    /// # Errors
    /// As `get`, or if the answer is not what this version of the tool reads.
    pub async fn get_json<T: DeserializeOwned>(
        &self,
        pod: &str,
        port: u16,
        path: &str,
    ) -> anyhow::Result<T> {
        let body = self.get(pod, port, path).await?;
        serde_json::from_slice(&body).with_context(|| {
            format!(
                "the answer of {pod} to {path} is not understood; is podveilctl of its version?"
            )
        })
    }

    /// The CA's admin service, in its acting replica.
    ///
    /// # Errors
    /// If no replica is there or the API does not let us in.
    pub async fn ca(&self, programs: &Programs) -> anyhow::Result<CaAdmin> {
        let leases: Api<Lease> = Api::namespaced(self.client.clone(), &self.namespace);
        let lease = leases
            .get_opt(CA_LEASE)
            .await
            .with_context(|| format!("reading Lease {}/{CA_LEASE}", self.namespace))?;
        let holder = lease
            .and_then(|lease| lease.spec)
            .and_then(|spec| spec.holder_identity);
        let pod = programs.ca_replica(holder.as_deref()).ok_or_else(|| {
            Failure::new(
                format!("no pod of podveil-ca runs in namespace {}", self.namespace),
                format!(
                    "`kubectl get pods -n {}`; another namespace is named by `-n`",
                    self.namespace
                ),
            )
        })?;
        exec::ca_admin(&self.client, &self.namespace, pod).await
    }
}
