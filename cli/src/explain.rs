// SPDX-License-Identifier: Apache-2.0
//! `podveilctl explain`: what would become of a connection, and which object decides. The source's and the destination's
//! nodes are asked what they know, and their own rules are asked about it here: nothing is decided a second way.

mod decide;
mod destination;
mod human;
mod known;

use crate::cluster::pages::{ControllerWorkload, ProxyPage};
use crate::cluster::{ADMIN_PORT, Access, Cluster, Programs, installation};
use crate::config::node_program;
use crate::failure::{Failure, Outcome};
use crate::output::{Output, Progress};
use decide::{Ends, Verdict};
use destination::Destination;
use podveil_model::{OriginalDst, Uid};
use podveil_state::View;
use std::collections::{BTreeMap, BTreeSet};

#[derive(clap::Args)]
pub struct Arguments {
    /// The pod that would connect.
    #[arg(value_name = "NAMESPACE/POD", value_parser = pod)]
    source: (String, String),
    /// Where to: an address, a service's name (`web`, `web.shop`, `web.shop.svc.cluster.local`) or a pod
    /// (`shop/web-0`), with a port unless a service has only one.
    #[arg(value_name = "DESTINATION[:PORT]", value_parser = destination)]
    destination: Destination,
    #[command(flatten)]
    access: Access,
    #[command(flatten)]
    output: Output,
}

fn pod(text: &str) -> Result<(String, String), String> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => {
            Ok((namespace.to_owned(), name.to_owned()))
        }
        _ => Err("write NAMESPACE/POD, e.g. shop/web-0".to_owned()),
    }
}

fn destination(text: &str) -> Result<Destination, String> {
    text.parse()
        .map_err(|failure: Failure| format!("{failure}; {}", failure.cure))
}

/// [`Outcome::Bad`] if the connection would be refused.
pub async fn run(arguments: &Arguments) -> anyhow::Result<Outcome> {
    let cluster = arguments.access.cluster().await?;
    let mut progress = Progress::new();
    progress.say("asking the controller");
    let programs = cluster.programs().await?;
    let source = source(&cluster, &programs, &arguments.source).await?;
    progress.say(&format!("asking node {}", source.node));
    let pod = node_program(&cluster, &programs, &source.node)?;
    let (page, view) = known(&cluster, &programs, &pod.name).await?;
    let destination = OriginalDst(arguments.destination.resolve(&view, &source.namespace)?);

    let uid = Uid::from(source.uid.as_str());
    let ends = Ends {
        view: &view,
        page: &page,
        source: &source,
        destination,
    };
    let nodes: BTreeSet<String> = ends
        .candidates()
        .map(|workload| workload.node.to_string())
        .filter(|node| *node != source.node)
        .collect();
    let mut others = BTreeMap::new();
    for node in nodes {
        progress.say(&format!("asking node {node}"));
        // A node that cannot be asked is told of in the answer.
        if let Some(pod) = programs.on_node(&node)
            && let Ok((_, view)) = known(&cluster, &programs, &pod.name).await
        {
            others.insert(node, view);
        }
    }
    drop(progress);
    let explanation = decide::explain(&ends, &uid, &others);
    arguments.output.print(&explanation, human::explanation)?;
    Ok(Outcome::good_if(explanation.verdict != Verdict::Refused))
}

async fn source(
    cluster: &Cluster,
    programs: &Programs,
    (namespace, name): &(String, String),
) -> anyhow::Result<ControllerWorkload> {
    let controller = installation::controller(cluster, programs)
        .await
        .map_err(|why| Failure::new(why, "`podveilctl check`"))?;
    let found = (controller.workloads.into_iter())
        .find(|workload| workload.namespace == *namespace && workload.name == *name);
    Ok(found.ok_or_else(|| {
        Failure::new(
            format!("the controller knows no pod {namespace}/{name}"),
            format!("`kubectl get pods -n {namespace}`; a finished pod is not known any more"),
        )
    })?)
}

/// What a node says of itself, and all that it knows; where it holds a part of the cluster, what it would be told.
async fn known(
    cluster: &Cluster,
    programs: &Programs,
    pod: &str,
) -> anyhow::Result<(ProxyPage, View)> {
    let page: ProxyPage = cluster.get_json(pod, ADMIN_PORT, "/status").await?;
    let resources = match page.podveil.on_demand {
        None => cluster.get(pod, ADMIN_PORT, "/resources").await?,
        Some(_) => installation::controllers_page(cluster, programs, "/resources")
            .await
            .map_err(|why| Failure::new(why, "`podveilctl check`"))?,
    };
    Ok((page, known::view(&resources)?))
}
