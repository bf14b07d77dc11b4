// SPDX-License-Identifier: Apache-2.0
use anyhow::Context;
use serde_json::json;
use std::path::Path;

/// Writes a kubeconfig (JSON is YAML) that reaches `server`, proved by `ca.crt`, with a bearer token.
pub(crate) fn write(
    path: &Path,
    server: &str,
    authority: &Path,
    token: &str,
) -> anyhow::Result<()> {
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "podveil",
        "clusters": [{"name": "podveil", "cluster": {"server": server, "certificate-authority": authority}}],
        "users": [{"name": "podveil", "user": {"token": token}}],
        "contexts": [{"name": "podveil", "context": {"cluster": "podveil", "user": "podveil"}}],
    });
    std::fs::write(path, serde_json::to_vec_pretty(&config)?)
        .with_context(|| format!("writing {}", path.display()))
}
