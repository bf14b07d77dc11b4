// SPDX-License-Identifier: Apache-2.0
use crate::PodNet;
use crate::command::run;
use anyhow::Context;
use podveil_netns::NetNs;
use std::net::{IpAddr, SocketAddr};

/// Runs `work` with this thread inside the namespace; sockets made in it belong there.
///
/// # Errors
/// The namespace's, or what `work` returns.
pub fn in_netns<T>(netns: &NetNs, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    netns.run(work).context("entering the namespace")?
}

/// The real `curl` in the pod's namespace; returns the body.
///
/// # Errors
/// If curl fails, with what it said.
pub fn http_get(from: &PodNet, to: IpAddr, port: u16, path: &str) -> anyhow::Result<String> {
    let url = format!("http://{}{path}", SocketAddr::new(to, port));
    let netns = format!("--net=/run/netns/{}", from.namespace);
    run(
        "nsenter",
        [
            &netns,
            "curl",
            "--silent",
            "--show-error",
            "--fail",
            "--noproxy",
            "*",
            "--max-time",
            "10",
            &url,
        ],
    )
}
