// SPDX-License-Identifier: Apache-2.0
//! Everything that Podveil's programs say about themselves, asked once. What cannot be had is kept with its reason, so
//! that a command shows the rest.

use super::pages::{ControllerPage, ProxyPage, RedirectPage};
use super::{ADMIN_PORT, Cluster, Program, ProgramPod, Programs, REDIRECT_ADMIN_PORT};
use crate::ca::CaStatus;
use crate::output::Progress;
use bytes::Bytes;
use futures::StreamExt;
use std::collections::BTreeMap;

/// Nodes asked at once: the API server carries every answer.
const AT_ONCE: usize = 16;

/// What was asked, or why there is no answer, for a person.
pub type Answered<T> = Result<T, String>;

#[derive(Debug)]
pub struct Installation {
    pub programs: Programs,
    pub controller: Answered<ControllerPage>,
    pub ca: Answered<CaStatus>,
    /// By node.
    pub proxies: BTreeMap<String, Answered<ProxyPage>>,
    pub redirects: BTreeMap<String, Answered<RedirectPage>>,
}

/// Asks every program.
///
/// # Errors
/// If even the list of pods cannot be had.
pub async fn look(cluster: &Cluster, progress: &mut Progress) -> anyhow::Result<Installation> {
    progress.say("finding the programs");
    let programs = cluster.programs().await?;
    progress.say("asking the controller");
    let controller = controller(cluster, &programs).await;
    progress.say("asking the CA");
    let ca = match cluster.ca(&programs).await {
        Ok(mut ca) => ca.status().await,
        Err(error) => Err(error),
    };
    let (proxies, redirects) = nodes(cluster, &programs, progress).await;
    Ok(Installation {
        controller,
        ca: ca.map_err(|error| format!("{error:#}")),
        proxies,
        redirects,
        programs,
    })
}

/// The first replica that answers: all have the same state.
pub async fn controller(cluster: &Cluster, programs: &Programs) -> Answered<ControllerPage> {
    let body = controllers_page(cluster, programs, "/status").await?;
    serde_json::from_slice(&body).map_err(|error| format!("the controller's status: {error}"))
}

/// A page of the first replica that answers.
pub async fn controllers_page(
    cluster: &Cluster,
    programs: &Programs,
    path: &str,
) -> Answered<Bytes> {
    let mut last = format!(
        "no pod of podveil-controller runs in namespace {}",
        cluster.namespace
    );
    for pod in programs.controllers() {
        match cluster.get(&pod.name, ADMIN_PORT, path).await {
            Ok(page) => return Ok(page),
            Err(error) => last = format!("{error:#}"),
        }
    }
    Err(last)
}

/// What both modules of every node say.
async fn nodes(
    cluster: &Cluster,
    programs: &Programs,
    progress: &mut Progress,
) -> (
    BTreeMap<String, Answered<ProxyPage>>,
    BTreeMap<String, Answered<RedirectPage>>,
) {
    let pods: Vec<(&str, &ProgramPod)> = programs
        .of(Program::Node)
        .filter_map(|pod| Some((pod.node.as_deref()?, pod)))
        .filter(|(node, pod)| {
            programs
                .on_node(node)
                .is_some_and(|one| one.name == pod.name)
        })
        .collect();
    let total = pods.len();
    let mut answers = futures::stream::iter(pods)
        .map(|(node, pod)| async move {
            let proxy = cluster.get_json(&pod.name, ADMIN_PORT, "/status").await;
            let redirect = cluster.get_json(&pod.name, REDIRECT_ADMIN_PORT, "/status");
            let redirect = redirect.await.map_err(|error| format!("{error:#}"));
            let proxy = proxy.map_err(|error| format!("{error:#}"));
            (node.to_owned(), proxy, redirect)
        })
        .buffer_unordered(AT_ONCE);
    let (mut proxies, mut redirects) = (BTreeMap::new(), BTreeMap::new());
    while let Some((node, proxy, redirect)) = answers.next().await {
        proxies.insert(node.clone(), proxy);
        redirects.insert(node, redirect);
        progress.say(&format!("asking the nodes: {} of {total}", proxies.len()));
    }
    (proxies, redirects)
}
