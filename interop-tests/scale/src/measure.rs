// SPDX-License-Identifier: Apache-2.0
use crate::api::PodRef;
use crate::arrivals::Arrivals;
use crate::process::{Memory, processor_seconds};
use crate::programs::{Programs, http_get};
use crate::{Api, Figures, Latencies, Restart, Size, objects, subscriber};
use anyhow::{Context, ensure};
use futures::{StreamExt, TryStreamExt, stream};
use kube::api::{
    ApiResource, DynamicObject, GroupVersionKind, ListParams, WatchEvent, WatchParams,
};
use podveil_ca_client::ProgramCredentials;
use podveil_cluster::Program;
use podveil_model::{Epoch, Health, Uid};
use podveil_sim::Sandbox;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// For anything that takes seconds.
const PATIENCE: Duration = Duration::from_secs(60);
/// For all nodes to have everything; two cores parse it a thousand times.
const LONG_PATIENCE: Duration = Duration::from_secs(900);
/// Between two changes: the nodes' reports of one are over before the next.
const PAUSE: Duration = Duration::from_millis(200);
/// First contacts with the CA at once.
const CONTACTS: usize = 32;

/// Where it is measured.
#[derive(Debug)]
pub struct Bed<'a> {
    /// It holds a cluster of this size, see [`load`](crate::load).
    pub api: &'a Api,
    pub size: Size,
    /// The folder of the programs.
    pub binaries: &'a Path,
}

/// Starts the programs and measures everything. Needs root: a node program joins a cgroup.
///
/// # Errors
/// If a program fails, or something takes far longer than it may.
pub async fn measure(bed: Bed<'_>) -> anyhow::Result<Figures> {
    let Bed {
        api,
        size,
        binaries,
    } = bed;
    let folder = tempfile::Builder::new()
        .prefix("podveil-scale-")
        .tempdir()?;
    let programs = Programs::new(binaries, folder.path())?;
    let pods = api.pods(&size).await?;
    let enrolled = pods.iter().map(|pod| (pod.uid.as_str(), epoch(pod)));
    programs.save_enrolment(enrolled)?;
    let kubeconfig = api.controller_kubeconfig(folder.path()).await?;
    let _ca = programs.start_ca(size.subscribers).await?;
    say("the nodes get their certificates");
    let credentials: Vec<ProgramCredentials> = stream::iter(0..size.subscribers)
        .map(|node| subscriber::credentials(&programs, node))
        .buffered(CONTACTS)
        .try_collect()
        .await?;
    let stop = CancellationToken::new();
    let _stop = stop.clone().drop_guard();
    let arrivals = Arc::new(Arrivals::default());
    let subscribe = |node: usize| {
        let credentials = &credentials[node];
        subscriber::start(
            &programs.controller,
            &size,
            node,
            credentials,
            arrivals.clone(),
            &stop,
        );
    };

    say("the controller starts");
    subscribe(0);
    let began = Instant::now();
    let mut controller = programs.start_controller(&kubeconfig)?;
    let (first, resources) = one(&arrivals.full_at(1, PATIENCE).await?)?;
    ensure!(
        resources >= size.addresses(),
        "the first answer has {resources} resources, not {}",
        size.addresses()
    );
    ensure!(
        programs.controller_is_ready().await,
        "the controller is not ready"
    );
    let first_answer = first - began;
    let rest_alone = at_rest(api, &controller, size.rest).await?;
    let alone = Memory::of(controller.pid())?;

    say(format_args!(
        "first answer after {first_answer:.1?}, {alone:.0?}"
    ));
    say("all other nodes come");
    let began = Instant::now();
    (1..size.subscribers).for_each(subscribe);
    let full = arrivals.full_at(size.subscribers, LONG_PATIENCE).await?;
    let all_answered = last(full.iter().map(|(at, _)| *at))? - began;
    say(format_args!(
        "all answered after {all_answered:.1?}, {:.0?}",
        Memory::of(controller.pid())?
    ));
    tokio::time::sleep(size.settle).await;
    let rest = at_rest(api, &controller, size.rest).await?;

    say("pods change");
    let changes = changes(api, &size, &pods, &arrivals, &controller).await?;
    let requests_at_rest = rest.requests / rest.took.as_secs_f64();
    let of_changes = changes.requests - requests_at_rest * changes.took.as_secs_f64();
    let processor = changes.processor - rest.processor * changes.took.as_secs_f64();
    let count = size.changes as f64;
    let connected = Memory::of(controller.pid())?;

    say(format_args!(
        "changes took {:.0?}, {connected:.0?}",
        changes.took
    ));
    say("a node program starts");
    let node = node(&programs, &size).await?;

    let restart = match size.restart {
        true => {
            say("the controller is killed and started again");
            arrivals.forget();
            controller.kill();
            let began = Instant::now();
            controller = programs.start_controller(&kubeconfig)?;
            let answers = arrivals.full_at(size.subscribers, LONG_PATIENCE).await?;
            let all_answered = last(answers.iter().map(|(at, _)| *at))? - began;
            tokio::time::sleep(size.settle).await;
            Some(Restart {
                all_answered,
                sent_again: answers.iter().map(|(_, resources)| resources).sum(),
                controller: Memory::of(controller.pid())?,
            })
        }
        false => None,
    };
    controller.check_running()?;
    Ok(Figures {
        first_answer,
        alone,
        all_answered,
        connected,
        requests_at_rest_alone: rest_alone.requests / rest_alone.took.as_secs_f64() * 60.0,
        requests_at_rest: requests_at_rest * 60.0,
        processor_at_rest: rest.processor * 1000.0,
        requests_per_change: (of_changes / count).max(0.0),
        updates_per_change: changes.updates as f64 / count / size.subscribers as f64,
        processor_per_change: Duration::from_secs_f64((processor / count).max(0.0)),
        last_node: Latencies::new(changes.last),
        middle_node: Latencies::new(changes.middle),
        node,
        restart,
    })
}

/// On the way to the figures, which come last.
fn say(what: impl std::fmt::Display) {
    eprintln!("{what}");
}

fn epoch(pod: &PodRef) -> Epoch {
    Epoch {
        resource_version: pod.version,
        stage: 0,
    }
}

fn one<T: Copy>(all: &[T]) -> anyhow::Result<T> {
    all.first().copied().context("there is one")
}

fn last(times: impl Iterator<Item = Instant>) -> anyhow::Result<Instant> {
    times.max().context("there is one")
}

struct Rest {
    requests: f64,
    /// Cores.
    processor: f64,
    took: Duration,
}

/// What the controller asks of the API server and uses of the processor while nothing happens.
async fn at_rest(api: &Api, controller: &Program, rest: Duration) -> anyhow::Result<Rest> {
    let (began, before) = (Instant::now(), api.requests().await?);
    let used = processor_seconds(controller.pid())?;
    tokio::time::sleep(rest).await;
    let requests = (api.requests().await? - before) as f64;
    let took = began.elapsed();
    Ok(Rest {
        requests,
        processor: (processor_seconds(controller.pid())? - used) / took.as_secs_f64(),
        took,
    })
}

struct Changes {
    last: Vec<Duration>,
    middle: Vec<Duration>,
    requests: f64,
    /// Resources that all nodes together were sent.
    updates: u64,
    processor: f64,
    took: Duration,
}

/// Pods become unready and ready again, one after the other, half of them behind the large service.
async fn changes(
    api: &Api,
    size: &Size,
    pods: &[PodRef],
    arrivals: &Arrivals,
    controller: &Program,
) -> anyhow::Result<Changes> {
    let (mut latest, mut middle) = (Vec::new(), Vec::new());
    let (began, before) = (Instant::now(), api.requests().await?);
    let used = processor_seconds(controller.pid())?;
    let updates = arrivals.updates();
    for change in 0..size.changes {
        let turn = change / 2;
        let behind = size.behind(if turn % 2 == 0 {
            size.services
        } else {
            turn % size.services
        });
        let pod = behind.start + turn % behind.len();
        let ready = change % 2 == 1;
        let health = if ready {
            Health::Healthy
        } else {
            Health::Unhealthy
        };
        arrivals.look_for(Uid::from(&*pods[pod].uid), health);
        let event = change_pod(api, size, pod, ready).await?;
        let interested = (0..size.subscribers).filter(|node| size.is_interested(*node, pod));
        let mut seen = arrivals.seen_by(interested.count(), PATIENCE).await?;
        seen.sort_unstable();
        middle.push(seen[seen.len() / 2].saturating_duration_since(event));
        latest.push(last(seen.into_iter())?.saturating_duration_since(event));
        tokio::time::sleep(PAUSE).await;
    }
    Ok(Changes {
        last: latest,
        middle,
        requests: (api.requests().await? - before) as f64,
        updates: arrivals.updates() - updates,
        processor: processor_seconds(controller.pid())? - used,
        took: began.elapsed(),
    })
}

/// Returns when the API server's own watch told of it.
async fn change_pod(api: &Api, size: &Size, pod: usize, ready: bool) -> anyhow::Result<Instant> {
    let name = objects::pod_name(size, pod);
    let namespace = size.namespace(size.service_of(pod));
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("", "v1", "Pod"));
    let pods =
        kube::Api::<DynamicObject>::namespaced_with(api.client.clone(), &namespace, &resource);
    let fields = format!("metadata.name={name}");
    // The server's own version: that of a pod that has long rested is too old to watch from.
    let version = pods
        .list_metadata(&ListParams::default().fields(&fields))
        .await?
        .metadata
        .resource_version
        .context("a list has a version")?;
    let only = WatchParams::default().fields(&fields).disable_bookmarks();
    let mut events = Box::pin(pods.watch_metadata(&only, &version).await?);
    api.write_status(size, pod, ready).await?;
    loop {
        let event = tokio::time::timeout(PATIENCE, events.try_next()).await??;
        match event.context("the watch has ended")? {
            WatchEvent::Modified(_) => return Ok(Instant::now()),
            WatchEvent::Error(error) => anyhow::bail!("the watch failed: {error}"),
            WatchEvent::Added(_) | WatchEvent::Deleted(_) | WatchEvent::Bookmark(_) => {}
        }
    }
}

/// The memory of a node program that has been sent everything.
async fn node(programs: &Programs, size: &Size) -> anyhow::Result<Memory> {
    // It removes the cgroup that the program makes.
    let sandbox = Sandbox::new(None)?;
    let mut node = programs.start_node(&sandbox.cgroup("node")?)?;
    let deadline = Instant::now() + PATIENCE;
    // No resource is told of in less.
    let bytes = size.addresses() as f64 * 100.0;
    while received_bytes(programs).await.unwrap_or_default() < bytes {
        node.check_running()?;
        ensure!(
            Instant::now() < deadline,
            "the node program was not sent everything"
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    tokio::time::sleep(size.settle).await;
    let memory = Memory::of(node.pid())?;
    node.terminate(PATIENCE);
    Ok(memory)
}

async fn received_bytes(programs: &Programs) -> Option<f64> {
    let metrics = http_get(&programs.node_metrics, "/metrics").await.ok()?;
    let line = metrics.lines().find(|line| {
        line.starts_with("istio_xds_message_bytes_total") && line.contains("istio.workload.Address")
    })?;
    line.rsplit_once(' ')?.1.parse().ok()
}
