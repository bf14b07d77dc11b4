// SPDX-License-Identifier: Apache-2.0
//! The command lines of the control plane, the same for an API server alone and for a whole cluster.

use crate::keys::Keys;
use crate::tools::{self, Tool};
use anyhow::Context;
use podveil_sim::run;
use std::net::Ipv4Addr;
use std::path::Path;

pub(crate) const ADMIN_TOKEN: &str = "admin";
pub(crate) const CONTROLLERS_TOKEN: &str = "controllers";
pub(crate) const SERVICE_RANGES: &str = "10.96.0.0/16,fd00:10:96::/112";

/// Where the servers listen.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ports {
    pub(crate) etcd: u16,
    pub(crate) peer: u16,
    pub(crate) server: u16,
}

pub(crate) fn etcd(folder: &Path, ports: Ports) -> anyhow::Result<Vec<String>> {
    let client = format!("http://127.0.0.1:{}", ports.etcd);
    let peer = format!("http://127.0.0.1:{}", ports.peer);
    Ok(vec![
        text(&tools::path(Tool::Etcd)?),
        format!("--data-dir={}", folder.join("etcd").display()),
        format!("--listen-client-urls={client}"),
        format!("--advertise-client-urls={client}"),
        format!("--listen-peer-urls={peer}"),
        format!("--initial-advertise-peer-urls={peer}"),
        format!("--initial-cluster=default={peer}"),
        // What a test stores need not survive the machine.
        "--unsafe-no-fsync".to_owned(),
        "--log-level=warn".to_owned(),
    ])
}

pub(crate) fn kube_apiserver(
    keys: &Keys,
    ports: Ports,
    address: Ipv4Addr,
) -> anyhow::Result<Vec<String>> {
    let file = |name: &str| text(&keys.file(name));
    Ok(vec![
        text(&tools::path(Tool::KubeApiserver)?),
        format!("--etcd-servers=http://127.0.0.1:{}", ports.etcd),
        format!("--bind-address={address}"),
        format!("--advertise-address={address}"),
        format!("--secure-port={}", ports.server),
        format!("--tls-cert-file={}", file("server.crt")),
        format!("--tls-private-key-file={}", file("server.key")),
        format!("--client-ca-file={}", file("ca.crt")),
        "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
        format!("--service-account-key-file={}", file("sa.pub")),
        format!("--service-account-signing-key-file={}", file("sa.key")),
        format!("--token-auth-file={}", file("tokens.csv")),
        "--authorization-mode=Node,RBAC".to_owned(),
        "--allow-privileged=true".to_owned(),
        format!("--service-cluster-ip-range={SERVICE_RANGES}"),
        "--profiling=false".to_owned(),
    ])
}

pub(crate) fn kube_controller_manager(
    keys: &Keys,
    kubeconfig: &Path,
) -> anyhow::Result<Vec<String>> {
    Ok(vec![
        text(&tools::path(Tool::KubeControllerManager)?),
        format!("--kubeconfig={}", kubeconfig.display()),
        "--leader-elect=false".to_owned(),
        "--secure-port=0".to_owned(),
        "--use-service-account-credentials=true".to_owned(),
        format!("--root-ca-file={}", text(&keys.file("ca.crt"))),
        format!("--service-cluster-ip-range={SERVICE_RANGES}"),
    ])
}

/// The body of an answer to the admin.
pub(crate) fn get(authority: &Path, url: &str) -> anyhow::Result<String> {
    run(
        "curl",
        [
            "--silent",
            "--show-error",
            "--noproxy",
            "*",
            "--max-time",
            "5",
            "--cacert",
            &text(authority),
            "--header",
            &format!("authorization: Bearer {ADMIN_TOKEN}"),
            url,
        ],
    )
    .with_context(|| format!("asking {url}"))
}

pub(crate) fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
