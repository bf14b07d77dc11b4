// SPDX-License-Identifier: Apache-2.0
use crate::interest::Interest;
use crate::uses::Uses;
use crate::view::Insert;
use crate::{Need, StateWriter, View, Word};
use podveil_identity::KubernetesName;
use podveil_model::{Lookup, Uid};
use podveil_xds_client::{Batch, Demand, ResourceType, Status, Update, Wish};
use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

/// `system_version_info` of the newest push of addresses that is in use here; `None` before the first.
pub type Version = Option<Arc<str>>;

/// Between two looks for what has not been used for long.
const SWEEP: Duration = Duration::from_secs(10);
/// The same at least, however short that is to be.
const SWEEP_LEAST: Duration = Duration::from_millis(100);
/// Lookups that are held; more than a node's pods talk to, and half of what the client takes.
const MAX_LOOKUPS: usize = 16_384;

/// The only writer of the state.
#[derive(Debug)]
pub struct StateTask {
    pub writer: StateWriter,
    pub batches: mpsc::Receiver<Batch>,
    pub demand: Demand,
    /// What connections ask for, and what the node says of its own.
    pub words: mpsc::Receiver<Word>,
    pub in_use: watch::Sender<Version>,
    /// `None`: everything is held.
    pub on_demand: Option<OnDemand>,
}

/// How a part of the cluster is chosen.
#[derive(Clone, Debug)]
pub struct OnDemand {
    /// Its workloads are always held.
    pub node: KubernetesName,
    /// How long something else is held that is not used.
    pub keep: Duration,
    /// Of the client. While nobody could be asked anew, nothing is given up.
    pub status: watch::Receiver<Status>,
}

impl OnDemand {
    /// What the client must be able to ask for at once.
    pub const MAX_ASKED: usize = 2 * MAX_LOOKUPS;

    /// A use is told once between two looks, so what is used must be held for longer than from one to the next.
    fn sweep(&self) -> Duration {
        (self.keep / 2).clamp(SWEEP_LEAST, SWEEP)
    }
}

impl StateTask {
    /// Runs until `stop`, or until the xDS client is gone. The state stays readable afterwards.
    pub async fn run(self, stop: CancellationToken) {
        let Self {
            writer,
            mut batches,
            demand,
            mut words,
            in_use,
            on_demand,
        } = self;
        let sweep = on_demand.as_ref().map_or(SWEEP, OnDemand::sweep);
        let mut state = State {
            writer,
            in_use,
            chosen: on_demand.map(Chosen::new),
        };
        let mut sweep = tokio::time::interval(sweep);
        sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                batch = batches.recv() => match batch {
                    Some(batch) => state.take(batch),
                    None => return,
                },
                // In order, and none is lost: a question that overtakes the end of the one before it would not be sent.
                Ok(room) = demand.room(), if state.has_wishes() => {
                    if let Some(wish) = state.next_wish() {
                        room.send(wish);
                    }
                }
                Some(word) = words.recv() => state.hear(word, &demand),
                now = sweep.tick() => state.sweep(now),
            }
        }
    }
}

/// What is held on demand, as its one task has it.
struct Chosen {
    interest: Interest,
    status: watch::Receiver<Status>,
    /// For the client.
    wishes: VecDeque<Wish>,
    /// Held only because a connection needs them, until they are told by their own names.
    kept_for_pins: HashSet<Uid>,
}

impl Chosen {
    fn new(on_demand: OnDemand) -> Self {
        let own = Lookup::Node(on_demand.node);
        Self {
            wishes: [Wish::Ask(own.clone())].into(),
            interest: Interest::new(own, on_demand.keep, MAX_LOOKUPS),
            status: on_demand.status,
            kept_for_pins: HashSet::new(),
        }
    }

    /// Asks for it, unless it is held already. False: there is no room, and nobody who could be asked.
    fn hold(&mut self, lookup: Lookup, need: Need, now: Instant) -> bool {
        let is_new = !self.interest.holds(&lookup);
        let is_stuck = self.interest.is_full() && !self.status.borrow().connected;
        if is_new && (is_stuck || self.wishes.len() >= MAX_LOOKUPS) {
            return false;
        }
        match need {
            Need::Once => self.interest.looked_at(now, &lookup),
            Need::Used => self.interest.used(now, &lookup),
        }
        if is_new {
            self.wishes.push_back(Wish::Ask(lookup));
        }
        true
    }
}

struct State {
    writer: StateWriter,
    in_use: watch::Sender<Version>,
    chosen: Option<Chosen>,
}

impl State {
    fn has_wishes(&self) -> bool {
        let some = |chosen: &Chosen| !chosen.wishes.is_empty();
        self.chosen.as_ref().is_some_and(some)
    }

    fn next_wish(&mut self) -> Option<Wish> {
        self.chosen.as_mut()?.wishes.pop_front()
    }

    fn take(&mut self, batch: Batch) {
        let resource_type = batch.resource_type;
        for rejected in &batch.rejected {
            warn!(name = %rejected.name, reason = %rejected.reason, "a resource was rejected; what was held stays in use");
        }
        let changes = batch.updates.len();
        let uses = self.writer.uses.clone();
        let chosen = &mut self.chosen;
        let now = Instant::now();
        self.writer.update(|view| {
            for update in batch.updates {
                match chosen {
                    Some(chosen) => chosen.apply(view, update, &uses, now),
                    None => apply(view, update),
                }
            }
            if resource_type == ResourceType::Address {
                view.set_synced();
            }
        });
        // Every connection from here on reads the new view, so it is in use.
        if resource_type == ResourceType::Address {
            self.in_use.send_replace(Some(batch.version.clone()));
        }
        batch.acknowledge.in_use();
        debug!(?resource_type, version = %batch.version, changes, "state in use");
    }

    fn hear(&mut self, word: Word, demand: &Demand) {
        let (lookup, need) = match word {
            Word::Local { uid, addresses } => {
                return self
                    .writer
                    .update(|view| view.set_local_addresses(uid, addresses));
            }
            Word::Wanted { lookup, need } => (lookup, need),
        };
        let Some(chosen) = &mut self.chosen else {
            if let Err(error) = demand.ask(lookup.clone()) {
                debug!(%lookup, %error, "it could not be asked for");
            }
            return;
        };
        if !chosen.hold(lookup.clone(), need, Instant::now()) {
            debug!(%lookup, "it is not asked for: there is no room");
            // The next connection that needs it tries again.
            self.writer.uses.forget([&lookup]);
        } else if chosen.interest.is_full() && chosen.status.borrow().connected {
            let needed = needed(&self.writer);
            let surplus = chosen.interest.take_surplus(&needed);
            self.give_up(surplus);
        }
    }

    fn sweep(&mut self, now: Instant) {
        let Some(chosen) = &mut self.chosen else {
            return;
        };
        // From here on each is told again when it is used.
        self.writer.uses.forget_all();
        if !chosen.status.borrow().connected {
            return;
        }
        for lookup in needed(&self.writer) {
            chosen.interest.still_used(now, &lookup);
        }
        let uses = &self.writer.uses;
        let (needed, gone): (HashSet<_>, HashSet<_>) =
            (chosen.kept_for_pins.drain()).partition(|uid| uses.is_pinned(uid));
        for uid in &needed {
            chosen.hold(Lookup::Workload(uid.clone()), Need::Used, now);
        }
        chosen.kept_for_pins = needed;
        if !gone.is_empty() {
            self.writer
                .update(|view| gone.iter().for_each(|uid| view.let_go(&uid.0)));
        }
        let idle = chosen.interest.take_idle(now);
        self.give_up(idle);
    }

    /// They need not be held any more. The client says from when they are not.
    fn give_up(&mut self, lookups: Vec<Lookup>) {
        if let Some(chosen) = &mut self.chosen
            && !lookups.is_empty()
        {
            self.writer.uses.forget(&lookups);
            chosen.wishes.push_back(Wish::Forget(lookups));
        }
    }
}

impl Chosen {
    /// Applies an update, unless it lets go what a connection needs; and takes what it says of what is held.
    fn apply(&mut self, view: &mut View, update: Update, uses: &Uses, now: Instant) {
        match &update {
            Update::Found(lookup) => self.interest.is_somebody(now, lookup),
            Update::NotFound(lookup) => {
                self.interest.is_nobody(now, lookup);
                // It was told by other names only, which are not asked any more: no other word of its end comes.
                if let Lookup::Workload(uid) = lookup
                    && self.kept_for_pins.remove(uid)
                {
                    view.remove_address(&uid.0);
                }
            }
            Update::Forgotten(lookup) => self.interest.is_open(now, lookup),
            Update::Workload(workload) => {
                self.kept_for_pins.remove(&workload.uid);
            }
            Update::AddressRemoved(name) => {
                self.kept_for_pins.remove(&Uid(name.clone()));
            }
            Update::Unasked(name) if uses.is_pinned(&Uid(name.clone())) => {
                let uid = Uid(name.clone());
                self.hold(Lookup::Workload(uid.clone()), Need::Used, now);
                self.kept_for_pins.insert(uid);
                return;
            }
            _ => {}
        }
        apply(view, update);
    }
}

/// By what all that connections need may have been asked for.
fn needed(writer: &StateWriter) -> HashSet<Lookup> {
    let view = writer.view();
    let pinned = writer.uses.pinned();
    pinned
        .iter()
        .flat_map(|uid| lookups_of(&view, uid))
        .collect()
}

/// By what a workload that a connection needs may have been asked for.
fn lookups_of(view: &View, uid: &Uid) -> Vec<Lookup> {
    let mut lookups = vec![Lookup::Workload(uid.clone())];
    let Some(workload) = view.by_uid(uid) else {
        return lookups;
    };
    let addresses = workload.addresses.iter().copied();
    lookups.extend(addresses.map(Lookup::Address));
    for port in workload.host_ports.keys() {
        lookups.push(Lookup::HostPort(workload.node.clone(), *port));
    }
    for service in workload.services.keys().filter_map(|key| view.service(key)) {
        lookups.extend(service.addresses.iter().copied().map(Lookup::Address));
        lookups.extend(service.node_ports.keys().copied().map(Lookup::NodePort));
    }
    lookups
}

fn apply(view: &mut View, update: Update) {
    match update {
        Update::Workload(workload) => {
            let (uid, epoch) = (workload.uid.clone(), workload.epoch);
            if let Insert::Older { held } = view.insert_workload(workload) {
                // A replica that lags must not un-enrol anyone.
                debug!(%uid, %epoch, %held, "an older decision about a workload was passed over");
            }
        }
        Update::Service(service) => view.insert_service(service),
        Update::AddressRemoved(name) => {
            if !view.remove_address(&name) {
                debug!(%name, "an unknown address was removed");
            }
        }
        Update::Policy { name, policy } => view.insert_policy(name, policy),
        Update::PolicyRemoved(name) => {
            view.remove_policy(&name);
        }
        Update::Mesh(mesh) => {
            let epoch = mesh.epoch;
            if let Insert::Older { held } = view.insert_mesh(mesh) {
                info!(%epoch, %held, "an older mesh configuration was ignored");
            }
        }
        Update::Forgotten(lookup) => view.forget(&lookup),
        Update::Found(lookup) => view.set_told(lookup),
        Update::NotFound(Lookup::Address(ip)) => view.insert_negative(ip),
        Update::NotFound(lookup) => view.set_told(lookup),
        Update::Unasked(name) => view.let_go(&name),
    }
}

#[cfg(test)]
#[path = "task_tests.rs"]
mod tests;
