// SPDX-License-Identifier: Apache-2.0
//! How long a new pod is reached in plain: from the API server's word of its address, or from when its application listens
//! where that is later, to the first answer that came through a tunnel.

mod stages;

pub use stages::Stages;

use crate::podveil::{APP_PORT, Podveil, pod};
use crate::{APP_IMAGE, Cluster};
use anyhow::{Context, ensure};
use podveil_netns::NetNs;
use podveil_netns::pod_cgroup::pod_uid;
use podveil_sim::Capture;
use podveil_sim::app::{MARKER, parse_listens_since};
use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant, SystemTime};

const SETTLE: Duration = Duration::from_secs(60);
/// An attempt that has no answer by then counts as none.
const ANSWER: Duration = Duration::from_secs(10);
/// Between two attempts, so that those who ask leave the processors to those who answer. The figure is this much too large
/// at most.
const PAUSE: Duration = Duration::from_millis(5);
const NAMESPACE: &str = "fresh";

/// One pod's way into its first tunnel.
#[derive(Clone, Debug)]
pub struct Reached {
    pub pod: NewPod,
    /// From when it could be reached to the end of the first answer through a tunnel.
    pub after: Duration,
    /// The same from the API server's word of its address.
    pub after_word: Duration,
    /// What the client was told before: answers in plain, and refusals.
    pub plain: u32,
    pub refused: u32,
    /// The longest that one attempt took, the last one included.
    pub longest: Duration,
}

/// A pod whose address the API server has told.
#[derive(Clone, Debug)]
pub struct NewPod {
    pub uid: String,
    pub name: String,
    pub address: IpAddr,
    /// When it was told.
    pub told: SystemTime,
}

/// An enrolled pod on node 1 asks each of `pods` new pods on node 2 from the moment on that the API server tells its
/// address; `batch` pods are made at once and removed again before the next. Returns the times, the shortest first.
///
/// # Errors
/// If a pod is not reached through a tunnel in time.
pub fn first_tunnels(
    podveil: &Podveil<'_>,
    pods: usize,
    batch: usize,
) -> anyhow::Result<Vec<Reached>> {
    first_tunnels_of(podveil, pods, batch, |name, _| object(name, ""))
}

/// The same with pods that look as `object` says, by their name and the client's addresses.
///
/// # Errors
/// If a pod is not reached through a tunnel in time.
pub fn first_tunnels_of(
    podveil: &Podveil<'_>,
    pods: usize,
    batch: usize,
    object: impl Fn(&str, &[IpAddr]) -> String,
) -> anyhow::Result<Vec<Reached>> {
    let cluster = podveil.cluster;
    cluster.apply(&format!(
        "apiVersion: v1\nkind: Namespace\nmetadata: {{ name: {NAMESPACE} }}\n---\n{}",
        pod(NAMESPACE, "client", "node-1")
    ))?;
    cluster.wait_for_pods(NAMESPACE)?;
    podveil.label(NAMESPACE, true)?;
    podveil.wait_for_stage(NAMESPACE, "mandatory", SETTLE)?;
    let client = Arc::new(netns_of(cluster, "client")?);
    let own = addresses_of(cluster, "client")?;
    let link = NetNs::open(cluster.nodes[0].machine.netns())?;
    let capture = Arc::new(Capture::start(&link, b"", |_, _| true)?);
    let new = Addresses::watch(cluster)?;
    let (sender, times) = sync_channel(batch);
    let mut all: Vec<Reached> = Vec::new();
    while all.len() < pods {
        let some: Vec<String> = (all.len()..pods.min(all.len() + batch))
            .map(|number| format!("new-{number}"))
            .collect();
        cluster.apply(
            &some
                .iter()
                .map(|name| object(name, &own))
                .collect::<String>(),
        )?;
        for _ in &some {
            let pod = new.next()?;
            let (client, capture, sender) = (client.clone(), capture.clone(), sender.clone());
            std::thread::spawn(move || {
                let outcome = client
                    .run(|| ask(&capture, pod))
                    .map_err(anyhow::Error::from)
                    .and_then(|outcome| outcome);
                send(&sender, outcome);
            });
        }
        for _ in &some {
            let mut reached = times.recv_timeout(SETTLE).context("no answer")??;
            reached.count_from(listens_since(cluster, &reached.pod.name)?);
            all.push(reached);
        }
        let mut delete = vec!["--namespace=fresh", "delete", "pods", "--timeout=60s"];
        delete.extend(some.iter().map(String::as_str));
        cluster.kubectl(&delete)?;
    }
    all.sort_unstable_by_key(|reached| reached.after);
    Ok(all)
}

impl Reached {
    /// Before this nobody could have reached it, in whatever way.
    fn count_from(&mut self, listens: SystemTime) {
        let later = listens.duration_since(self.pod.told).unwrap_or_default();
        self.after = self.after_word.saturating_sub(later);
    }
}

/// When the application began to listen, by its own clock, which is ours.
fn listens_since(cluster: &Cluster, name: &str) -> anyhow::Result<SystemTime> {
    let log = cluster.kubectl(&["--namespace=fresh", "logs", name])?;
    let since = log.lines().find_map(parse_listens_since);
    since.with_context(|| format!("{name} does not say when it listens: {log}"))
}

/// What lies at this share of what is sorted; `None` where there is nothing.
pub fn percentile<T>(sorted: &[T], share: f64) -> Option<&T> {
    let last = sorted.len().saturating_sub(1);
    sorted.get((last as f64 * share).ceil() as usize)
}

/// The other end is gone only if this bench has failed already.
fn send<T>(sender: &SyncSender<T>, value: T) {
    if sender.send(value).is_err() {
        tracing::debug!("nobody waits for this any more");
    }
}

/// Asks until an answer has come through a tunnel.
fn ask(capture: &Capture, pod: NewPod) -> anyhow::Result<Reached> {
    let (address, since) = (pod.address, Instant::now());
    let waited = pod.told.elapsed().unwrap_or_default();
    let (mut plain, mut refused, mut longest) = (0, 0, Duration::ZERO);
    while since.elapsed() < SETTLE {
        let began = Instant::now();
        let answered = attempt(address).is_ok();
        let now = Instant::now();
        longest = longest.max(now - began);
        if answered && capture.tunnelled(address).is_some_and(|seen| seen < now) {
            let after_word = waited + (now - since);
            return Ok(Reached {
                pod,
                after: after_word,
                after_word,
                plain,
                refused,
                longest,
            });
        }
        match answered {
            true => plain += 1,
            false => refused += 1,
        }
        std::thread::sleep(PAUSE);
    }
    anyhow::bail!("{address} is not reached through a tunnel")
}

fn attempt(address: IpAddr) -> anyhow::Result<()> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::new(address, APP_PORT), ANSWER)?;
    stream.set_read_timeout(Some(ANSWER))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.contains(MARKER), "something else answers");
    Ok(())
}

/// Addresses of new pods as the API server tells them.
struct Addresses {
    watch: Child,
    told: Receiver<anyhow::Result<NewPod>>,
}

impl Addresses {
    fn watch(cluster: &Cluster) -> anyhow::Result<Self> {
        let kubectl = cluster.kubectl_command()?;
        let mut watch = Command::new(&kubectl[0])
            .args(&kubectl[1..])
            .args([
                "--namespace=fresh",
                "get",
                "pods",
                "--selector=app=new",
                "--watch",
                "--output=jsonpath={.metadata.uid} {.metadata.name} {.status.podIP}{\"\\n\"}",
            ])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting kubectl")?;
        let lines = BufReader::new(watch.stdout.take().context("it is piped")?).lines();
        let (sender, told) = sync_channel(1024);
        std::thread::spawn(move || {
            let mut seen = BTreeSet::new();
            for line in lines {
                let told = SystemTime::now();
                let Ok(line) = line else { return };
                let words: Vec<&str> = line.split_whitespace().collect();
                if let [uid, name, address] = words[..]
                    && seen.insert(uid.to_owned())
                {
                    let address = address.parse().with_context(|| format!("kubectl: {line}"));
                    let pod = address.map(|address| NewPod {
                        uid: uid.to_owned(),
                        name: name.to_owned(),
                        address,
                        told,
                    });
                    send(&sender, pod);
                }
            }
        });
        Ok(Self { watch, told })
    }

    fn next(&self) -> anyhow::Result<NewPod> {
        self.told
            .recv_timeout(SETTLE)
            .context("no pod has got an address")?
    }
}

impl Drop for Addresses {
    fn drop(&mut self) {
        if let Err(error) = self.watch.kill().and_then(|()| self.watch.wait()) {
            tracing::warn!(%error, "kubectl is left");
        }
    }
}

fn addresses_of(cluster: &Cluster, name: &str) -> anyhow::Result<Vec<IpAddr>> {
    let object = cluster.get(&["--namespace=fresh", "pod", name])?;
    let addresses = object["status"]["podIPs"].as_array();
    let parse = |entry: &serde_json::Value| entry["ip"].as_str()?.parse().ok();
    Ok(addresses.into_iter().flatten().filter_map(parse).collect())
}

/// Of the pod's first process, as this host sees it.
fn netns_of(cluster: &Cluster, name: &str) -> anyhow::Result<NetNs> {
    let object = cluster.get(&["--namespace=fresh", "pod", name])?;
    let uid = object["metadata"]["uid"].as_str().context("a pod's uid")?;
    let process = fs::read_dir("/proc")?.flatten().find(|entry| {
        fs::read_to_string(entry.path().join("cgroup"))
            .is_ok_and(|cgroup| pod_uid(&cgroup).as_deref() == Some(uid))
    });
    let process = process.with_context(|| format!("no process of {name}"))?;
    Ok(NetNs::open(process.path().join("ns/net"))?)
}

/// A new pod; `more` goes into its spec.
pub fn object(name: &str, more: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Pod
metadata: {{ name: {name}, namespace: {NAMESPACE}, labels: {{ app: new }} }}
spec:
  nodeSelector: {{ kubernetes.io/hostname: node-2 }}
  terminationGracePeriodSeconds: 0
{more}  containers:
    - name: app
      image: {APP_IMAGE}
      imagePullPolicy: Never
      args: [serve, '{APP_PORT}']
---
"
    )
}
