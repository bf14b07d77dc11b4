// SPDX-License-Identifier: Apache-2.0
//! The loop that owns every pod: takes what the cluster, the proxy and finished work say, lets each pod name its next
//! piece of work, and publishes offers, status and acknowledgements.

use crate::cluster::Cluster;
use crate::cni::{Admissions, Ask, Namespaces};
use crate::config::RedirectConfig;
use crate::entry::{Entry, Place, facts};
use crate::fence_steps::FenceSteps;
use crate::finder::{By, Finder};
use crate::holder::{self, Held};
use crate::pod::{Acceptance, Action, Event, Next, Pod};
use crate::reports::{Change, InUse};
use crate::settling::Settling;
use crate::work::{self, Done, Sought};
use crate::zds::{Offer, Offers, Proxy};
use crate::{PluginState, PodStatus, Status};
use podveil_apply::{Backend, Chosen};
use podveil_cni::wire::{About, Answer};
use podveil_model::Uid;
use podveil_netns::seqpacket::Peer;
use podveil_plan::{Capture, Fence};
use podveil_xds_client::{Acknowledge, Batch, Client, ResourceType};
use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Pieces of work at once: each runs a few short programs. Nobody holds a place while it only looks for a namespace.
const WORKERS: usize = 8;
/// Changes of fences at once, beside those: each new pod changes the fence of every other one, and no new pod waits for
/// that. What changes while one waits for its place goes with it.
const FENCES: usize = 4;
const FAR: Duration = Duration::from_secs(3600);

/// What the loop is joined to.
pub struct Links {
    pub xds: Client,
    pub offers: watch::Sender<Offers>,
    pub proxy: watch::Receiver<Proxy>,
    pub orphaned: watch::Receiver<bool>,
    pub held: Held,
    pub status: watch::Sender<Status>,
    pub in_use: InUse,
    /// What new captures are made with.
    pub chosen: Option<Arc<Chosen>>,
    /// Of the CNI plugin.
    pub asks: mpsc::Receiver<Ask>,
    pub plugin: watch::Receiver<PluginState>,
    /// For the plugin, while nobody answers it.
    pub namespaces: watch::Sender<Arc<Namespaces>>,
}

pub struct Reconciler<B> {
    config: RedirectConfig,
    backend: Arc<B>,
    finder: Arc<Finder>,
    links: Links,
    stop: CancellationToken,
    cluster: Cluster,
    pods: BTreeMap<Uid, Entry>,
    /// The fence wanted, and which one it is. Work takes the newest when it begins.
    fence: watch::Sender<(u64, Arc<Fence>)>,
    fence_steps: Arc<FenceSteps>,
    waiting: VecDeque<Waiting>,
    settling: Settling,
    admissions: Admissions,
    applied_version: Arc<str>,
    generation: u64,
    synced: bool,
    offered: bool,
    last_proxy: Option<Arc<Peer>>,
    started: (SystemTime, Instant),
    workers: Arc<Semaphore>,
    fences: Arc<Semaphore>,
    work: JoinSet<(Uid, u64, Done)>,
    /// Each ends with the process that tied a pod to its namespace.
    ends: JoinSet<(Uid, u64)>,
}

/// A batch that counts as in use when every fence has its generation.
struct Waiting {
    fence: u64,
    version: Arc<str>,
    changes: Vec<Change>,
    acknowledge: Acknowledge,
}

impl<B: Backend> Reconciler<B> {
    pub fn new(
        config: RedirectConfig,
        backend: Arc<B>,
        links: Links,
        stop: CancellationToken,
    ) -> Self {
        let namespaces = links.namespaces.borrow().clone();
        Self {
            cluster: Cluster::new(config.node.clone(), namespaces),
            finder: Arc::new(Finder::new(&config.find)),
            config,
            backend,
            links,
            stop,
            pods: BTreeMap::new(),
            fence: watch::Sender::default(),
            fence_steps: Arc::default(),
            waiting: VecDeque::new(),
            settling: Settling::default(),
            admissions: Admissions::default(),
            applied_version: "".into(),
            generation: 0,
            synced: false,
            offered: false,
            last_proxy: None,
            started: (SystemTime::now(), now()),
            workers: Arc::new(Semaphore::new(WORKERS)),
            fences: Arc::new(Semaphore::new(FENCES)),
            work: JoinSet::new(),
            ends: JoinSet::new(),
        }
    }

    /// Runs until the token is cancelled; work under way is then finished, so that no pod is left half-written.
    pub async fn run(mut self) {
        let stop = self.stop.clone();
        loop {
            let wake = self.advance();
            tokio::select! {
                () = stop.cancelled() => break,
                batch = self.links.xds.batches.recv() => match batch {
                    Some(batch) => self.batch(batch),
                    None => break,
                },
                Some(done) = self.work.join_next() => match done {
                    Ok((uid, id, done)) => self.done(&uid, id, done),
                    Err(error) => tracing::error!(%error, "a piece of work was lost"),
                },
                Some(ended) = self.ends.join_next() => {
                    // Else nobody asks any more.
                    if let Ok((uid, id)) = ended {
                        self.process_ended(&uid, id);
                    }
                }
                Ok(()) = self.links.proxy.changed() => self.proxy_changed(),
                Ok(()) = self.links.xds.status.changed() => {}
                Some(ask) = self.links.asks.recv() => self.asked(ask),
                Ok(()) = self.links.plugin.changed() => {}
                () = tokio::time::sleep_until(wake.into()) => {}
            }
        }
        while self.work.join_next().await.is_some() {}
    }

    fn batch(&mut self, batch: Batch) {
        let (changes, fences_follow) = self.take(&batch);
        for rejected in &batch.rejected {
            tracing::warn!(name = %rejected.name, reason = %rejected.reason, "a resource was rejected");
        }
        if batch.resource_type == ResourceType::MeshConfig {
            let namespaces = self.cluster.namespaces().clone();
            self.links.namespaces.send_replace(namespaces);
        }
        if batch.resource_type != ResourceType::Address {
            return batch.acknowledge.in_use();
        }
        if fences_follow {
            let wanted = self.cluster.fence();
            self.fence.send_if_modified(|(number, fence)| {
                let changed = wanted != **fence;
                if changed {
                    (*number, *fence) = (*number + 1, Arc::new(wanted));
                }
                changed
            });
        }
        self.waiting.push_back(Waiting {
            fence: self.fence.borrow().0,
            version: batch.version,
            changes,
            acknowledge: batch.acknowledge,
        });
        self.set_goals();
        self.settling.answered(now());
    }

    /// Returns the changes that are in use once every fence has them, and whether fences may follow at all. The others are in use at once: that a pod is wanted
    /// is known here, and reported, however long fences take that others have changed.
    fn take(&mut self, batch: &Batch) -> (Vec<Change>, bool) {
        let before = self.waiting.iter().flat_map(|waiting| &waiting.changes);
        let waiting: HashSet<&Uid> = before.map(|(uid, _)| uid).collect();
        let updates: Vec<_> = (batch.updates.iter())
            .filter_map(|update| self.cluster.update(update))
            .collect();
        let fences_follow = updates.iter().any(|(_, fence)| *fence);
        let (behind_fence, at_once): (Vec<_>, Vec<_>) = updates
            .into_iter()
            .partition(|(change, fence)| *fence || waiting.contains(&change.0));
        let changes = |some: Vec<(Change, bool)>| some.into_iter().map(|(change, _)| change);
        self.links.in_use.change(changes(at_once).collect());
        (changes(behind_fence).collect(), fences_follow)
    }

    fn set_goals(&mut self) {
        let now = now();
        for workload in self.cluster.local() {
            let entry = self.pods.entry(workload.uid.clone()).or_insert_with(|| {
                self.generation += 1;
                Entry {
                    pod: Pod::new(now),
                    id: self.generation,
                    workload: workload.clone(),
                    place: None,
                    listeners: None,
                    awaited: workload.stage.wants_capture(),
                    started_uncaptured: false,
                    offer: 0,
                    older: BTreeSet::new(),
                    fence: Arc::default(),
                }
            });
            if entry.workload.addresses != workload.addresses {
                // It has a sandbox now, or another one.
                entry.pod.look_now(now);
            }
            entry.workload = workload.clone();
            let goal = Capture::wanted(workload, entry.pod.stands())
                .filter(|capture| capture.phase == podveil_plan::Phase::Capturing);
            entry.pod.set_goal(goal, true);
        }
        for (uid, entry) in &mut self.pods {
            if self.cluster.local_by_uid(uid).is_none() {
                entry.pod.set_goal(None, false);
            }
        }
    }

    fn proxy_changed(&mut self) {
        let proxy = self.links.proxy.borrow_and_update().clone();
        let newly = match (&proxy.peer, &self.last_proxy) {
            (Some(new), Some(old)) => !Arc::ptr_eq(new, old),
            (Some(_), None) => true,
            (None, _) => false,
        };
        if newly {
            self.last_proxy = proxy.peer.clone();
        }
        for (uid, entry) in &mut self.pods {
            let acceptance = match proxy.acknowledged.get(uid) {
                Some((offer, Ok(()))) if *offer == entry.offer => Acceptance::Taken,
                Some((offer, Err(reason))) if *offer == entry.offer => {
                    Acceptance::Refused(reason.clone())
                }
                _ => Acceptance::None,
            };
            entry.pod.set_acceptance(acceptance);
            if newly {
                entry.pod.proxy_came();
            }
        }
    }

    /// Starts what can be started, publishes what has changed; says when to look again.
    fn advance(&mut self) -> Instant {
        let now = now();
        let mut wake = now + FAR;
        self.synced |= self.links.xds.status.borrow().synced;
        let fence = self.fence.borrow().0;
        let uids: Vec<Uid> = self.pods.keys().cloned().collect();
        for uid in uids {
            while let Some(entry) = self.pods.get_mut(&uid) {
                let next = entry.pod.next(now, fence, self.config.release_bound);
                match next {
                    Next::Do(Action::Forget) => self.forget(&uid, now),
                    Next::Do(action) => {
                        self.start(&uid, action);
                        break;
                    }
                    Next::At(at) => {
                        wake = wake.min(at);
                        break;
                    }
                    Next::Idle => break,
                }
            }
        }
        self.pods.retain(|uid, entry| {
            !entry.pod.is_forgotten() || self.cluster.local_by_uid(uid).is_some()
        });
        let settled_by = self
            .settling
            .look(now, self.pods.values().map(|entry| &entry.pod));
        match settled_by {
            Some(bound) => wake = wake.min(bound),
            None => self.acknowledge(),
        }
        self.offer();
        let asked_again = self.answer(now);
        self.publish();
        wake.min(asked_again.unwrap_or(wake))
    }

    /// The CNI plugin asks: a sandbox that starts is the pod's from now on, one that ends is no more.
    fn asked(&mut self, ask: Ask) {
        let now = now();
        let request = &ask.request;
        let uid = Uid::from(request.uid.as_str());
        match (request.about, &ask.netns) {
            (About::Start, Some(netns)) => {
                tracing::debug!(%uid, sandbox = request.sandbox, netns = %netns.id(), "a sandbox starts");
                self.finder.given.starts(request, netns.clone());
            }
            (About::End, _) => self.finder.given.ends(&uid, &request.sandbox),
            _ => {}
        }
        if let Some(workload) = self.cluster.asked_about(request)
            && let Some(entry) = self.pods.get_mut(&workload.uid)
        {
            entry.pod.look_now(now);
        }
        self.admissions.wait(ask, now);
    }

    /// Answers the plugin where it is known what becomes of a pod.
    fn answer(&mut self, now: Instant) -> Option<Instant> {
        let (cluster, pods, given) = (&self.cluster, &self.pods, &self.finder.given);
        let mut refused = Vec::new();
        let again = self.admissions.answer(
            now,
            |ask| {
                let workload = cluster.asked_about(&ask.request);
                let entry = workload.and_then(|workload| pods.get(&workload.uid));
                facts(cluster.namespaces(), workload, entry, ask)
            },
            |uid, ask, answer| {
                let sandbox = &ask.request.sandbox;
                match answer {
                    Answer::Captured => given.has_started(uid, sandbox),
                    Answer::NotEnrolled => given.ends(uid, sandbox),
                    Answer::Refused { reason } => {
                        tracing::warn!(%uid, pod = ask.request.pod, namespace = ask.request.namespace, reason, "a pod is not captured in time to start");
                        given.ends(uid, sandbox);
                        let workload = cluster.asked_about(&ask.request);
                        refused.extend(workload.map(|workload| workload.uid.clone()));
                    }
                }
            },
        );
        for uid in refused.iter().filter(|_| !self.config.cni.fail_closed) {
            if let Some(entry) = self.pods.get_mut(uid) {
                entry.started_uncaptured = entry.pod.is_wanted();
            }
        }
        again
    }

    fn forget(&mut self, uid: &Uid, now: Instant) {
        self.links.held.remove(uid);
        if let Some(entry) = self.pods.get_mut(uid) {
            entry.close_listeners();
            entry.place = None;
            let on_node = entry.workload.node_uid.as_ref();
            self.finder.given.forget(on_node.unwrap_or(uid));
            entry.older.clear();
            entry.pod.on(now, Event::Forgotten);
        }
    }

    fn start(&mut self, uid: &Uid, action: Action) {
        let Some(entry) = self.pods.get(uid) else {
            return;
        };
        let (backend, fence) = (self.backend.clone(), self.fence.subscribe());
        let sought = Sought::of(&entry.workload, entry.pod.is_wanted());
        let finder = self.finder.clone();
        let found = entry.place.as_ref().map(|place| place.found.clone());
        let (older, stands) = (entry.older.clone(), entry.fence.clone());
        let steps = self.fence_steps.clone();
        let (backlog, cgroup) = (self.config.backlog, self.config.cgroup.clone());
        let proxy = self.links.proxy.borrow().peer.clone();
        let places = match action {
            Action::ChangeFence => &self.fences,
            _ => &self.workers,
        };
        let (id, places) = (entry.id, places.clone());
        let uid = uid.clone();
        tracing::debug!(%uid, ?action, "pod");
        self.work.spawn(async move {
            let _place = match action {
                Action::Find => None,
                _ => places.acquire().await.ok(),
            };
            let fence = fence.borrow().clone();
            let done = match (action, found) {
                (Action::Find, _) => work::look_for(backend, finder, sought, &places).await,
                (Action::Listen, Some(found)) => {
                    work::listen(found.netns, backlog, proxy, cgroup).await
                }
                (Action::Apply(capture), Some(found)) => {
                    work::apply(backend, found.netns, capture, fence).await
                }
                (Action::ChangeFence, Some(found)) => {
                    work::change_fence(backend, found.netns, stands, fence, &steps).await
                }
                (Action::Check { verify }, Some(found)) => {
                    work::check(backend, finder, sought.uid, found, older, verify).await
                }
                (Action::Remove, Some(found)) => work::remove(backend, found.netns).await,
                (Action::Forget, _) => Event::Forgotten.into(),
                (_, None) => Event::Replaced.into(),
            };
            (uid, id, done)
        });
    }

    fn done(&mut self, uid: &Uid, id: u64, done: Done) {
        let Some(entry) = self.pods.get_mut(uid).filter(|entry| entry.id == id) else {
            return;
        };
        let before = entry.pod.condition();
        match &done.event {
            Event::Failed { reason } | Event::Taken { reason } => {
                tracing::warn!(%uid, reason, "a pod's redirection failed");
            }
            Event::Drifted { reason } => {
                tracing::warn!(%uid, reason, "a pod's capture is not as it was written, and is written again");
            }
            Event::Applied { capture, .. } => tracing::info!(
                %uid, phase = ?capture.phase, mandatory = capture.refuses_plain,
                older = done.older.as_ref().map_or(0, BTreeSet::len),
                "a pod's rules are written"
            ),
            Event::Removed => tracing::info!(%uid, "a pod's rules are removed"),
            Event::Replaced => {
                tracing::info!(%uid, "a pod has another network namespace");
                self.links.held.remove(uid);
                entry.close_listeners();
                entry.place = None;
                entry.awaited = true;
            }
            _ => {}
        }
        if let Some(found) = done.found {
            if let Event::Found { stands } = done.event {
                let late = entry.awaited && !stands && found.by != By::Cni;
                entry.started_uncaptured = late && entry.pod.is_wanted() && self.config.cni.enabled;
            }
            tracing::info!(%uid, netns = %found.netns.id(), by = ?found.by, "a pod's namespace is found");
            let watch = found.anchor.clone().map(|anchor| {
                let uid = uid.clone();
                self.ends.spawn(async move {
                    if let Err(error) = anchor.ended().await {
                        // The periodic check looks as well.
                        tracing::warn!(%uid, %error, "a pod's process cannot be watched");
                        std::future::pending().await
                    }
                    (uid, id)
                })
            });
            entry.place = Some(Place { found, watch });
        }
        if let Some(listeners) = done.listeners {
            let stop = self.stop.child_token();
            holder::stand_in(&listeners, &self.links.orphaned, &stop);
            self.links.held.insert(uid.clone(), listeners.clone());
            entry.close_listeners();
            entry.listeners = Some((listeners, stop));
            self.generation += 1;
            entry.offer = self.generation;
        }
        if let Some(older) = done.older {
            entry.older = older;
        }
        if let Some(fence) = done.fence {
            entry.fence = fence;
        }
        let stood = entry.pod.stands();
        entry.pod.on(now(), done.event);
        let after = entry.pod.condition();
        if before != after {
            tracing::info!(%uid, condition = %after.0, reason = %after.1, "pod");
        }
        // A draining pod is kept under capture only if it was.
        if stood != entry.pod.stands() {
            self.set_goals();
        }
    }

    fn process_ended(&mut self, uid: &Uid, id: u64) {
        if let Some(entry) = self.pods.get_mut(uid).filter(|entry| entry.id == id) {
            entry.pod.look_now(now());
        }
    }

    /// Tells the control plane what is in use: a batch is, once every fence that stands has its addresses.
    fn acknowledge(&mut self) {
        let lowest = self
            .pods
            .values()
            .filter_map(|entry| entry.pod.fence())
            .min();
        while let Some(waiting) = self
            .waiting
            .pop_front_if(|waiting| lowest.is_none_or(|lowest| waiting.fence <= lowest))
        {
            self.links.in_use.change(waiting.changes);
            self.applied_version = waiting.version;
            waiting.acknowledge.in_use();
        }
    }

    fn offer(&mut self) {
        // The first snapshot drops what it does not name from a proxy that is older than us, so it waits until every pod
        // has been looked at. Without a proxy a pod whose listeners that proxy holds stays undecided.
        let undecided = |entry: &Entry| entry.pod.is_undecided();
        self.offered |= self.settling.has_begun()
            && self.links.proxy.borrow().peer.is_some()
            && !self.pods.values().any(undecided);
        if !self.offered {
            return;
        }
        let offers: BTreeMap<Uid, Offer> = (self.pods.iter())
            .filter_map(|(uid, entry)| Some((uid.clone(), entry.offer()?)))
            .collect();
        self.links.offers.send_if_modified(|held| {
            let same = held.as_ref().is_some_and(|held| {
                held.len() == offers.len()
                    && held
                        .iter()
                        .zip(&offers)
                        .all(|((a, one), (b, two))| a == b && one.generation() == two.generation())
            });
            if !same {
                *held = Some(Arc::new(offers));
            }
            !same
        });
    }

    fn publish(&self) {
        let proxy_connected = self.links.proxy.borrow().peer.is_some();
        let pods = (self.pods.iter())
            .map(|(uid, entry)| {
                let (condition, reason) = entry.pod.condition();
                let observed = entry.pod.observed();
                PodStatus {
                    uid: uid.clone(),
                    condition,
                    reason,
                    obstacle: entry.pod.obstacle(),
                    started_uncaptured: entry.started_uncaptured,
                    older: observed.older,
                    captured: observed.captured,
                    fence: observed.fence,
                    no_listener_syns: observed.no_listener_syns,
                    back_end: observed.back_end,
                    captured_since: entry.pod.captured_since().map(|at| self.time(at)),
                    verified: entry.pod.verified_last().map(|at| self.time(at)),
                    repairs: entry.pod.repairs(),
                }
            })
            .collect();
        let status = Status {
            stands_by: false,
            synced: self.synced,
            proxy_connected,
            pods,
            applied_version: self.applied_version.clone(),
            chosen: self.links.chosen.clone(),
            plugin: self.links.plugin.borrow().clone(),
            answered: self.admissions.answered,
        };
        self.links.status.send_if_modified(|held| {
            let changed = !held.says_the_same(&status);
            *held = status;
            changed
        });
    }

    /// The same moment by the clock on the wall.
    fn time(&self, at: Instant) -> SystemTime {
        let (wall, started) = self.started;
        wall + at.saturating_duration_since(started)
    }
}

/// The one clock, which tests may pause.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
