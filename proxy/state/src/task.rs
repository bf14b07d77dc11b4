// SPDX-License-Identifier: Apache-2.0
use crate::interest::Interest;
use crate::view::Insert;
use crate::{Need, StateWriter, View, Word};
use podveil_identity::KubernetesName;
use podveil_model::{Lookup, Uid};
use podveil_xds_client::{Batch, Demand, ResourceType, Status, Update};
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
        let mut chosen = on_demand.map(|on_demand| {
            let own = Lookup::Node(on_demand.node.clone());
            if let Err(error) = demand.ask(own.clone()) {
                warn!(%error, "the node's own workloads could not be asked for");
            }
            Chosen {
                interest: Interest::new(own, on_demand.keep, MAX_LOOKUPS),
                status: on_demand.status,
            }
        });
        let mut state = State {
            writer,
            demand,
            in_use,
        };
        let mut sweep = tokio::time::interval(SWEEP);
        sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                batch = batches.recv() => match batch {
                    Some(batch) => state.take(batch, chosen.as_mut()),
                    None => return,
                },
                Some(word) = words.recv() => state.hear(word, chosen.as_mut()),
                now = sweep.tick() => if let Some(chosen) = &mut chosen {
                    state.sweep(now, chosen);
                },
            }
        }
    }
}

/// What is held on demand, as its one task has it.
struct Chosen {
    interest: Interest,
    status: watch::Receiver<Status>,
}

struct State {
    writer: StateWriter,
    demand: Demand,
    in_use: watch::Sender<Version>,
}

impl State {
    fn take(&mut self, batch: Batch, chosen: Option<&mut Chosen>) {
        let resource_type = batch.resource_type;
        for rejected in &batch.rejected {
            warn!(name = %rejected.name, reason = %rejected.reason, "a resource was rejected; what was held stays in use");
        }
        let changes = batch.updates.len();
        let (mut nobody, mut pinned) = (Vec::new(), Vec::new());
        let uses = self.writer.uses.clone();
        self.writer.update(|view| {
            for update in batch.updates {
                match &update {
                    Update::NotFound(lookup) => nobody.push(lookup.clone()),
                    // As long as a connection needs it, it is asked for by its own name.
                    Update::Unasked(name) if uses.is_pinned(&Uid(name.clone())) => {
                        pinned.push(Lookup::Workload(Uid(name.clone())));
                        continue;
                    }
                    _ => {}
                }
                apply(view, update);
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
        if let Some(chosen) = chosen {
            let now = Instant::now();
            for lookup in &nobody {
                chosen.interest.is_nobody(now, lookup);
            }
            for lookup in pinned {
                self.hold(lookup, Need::Used, now, chosen);
            }
        }
    }

    fn hear(&mut self, word: Word, chosen: Option<&mut Chosen>) {
        let (lookup, need) = match word {
            Word::Local { uid, addresses } => {
                return self
                    .writer
                    .update(|view| view.set_local_addresses(uid, addresses));
            }
            Word::Wanted { lookup, need } => (lookup, need),
        };
        match chosen {
            Some(chosen) => self.hold(lookup, need, Instant::now(), chosen),
            None => {
                if let Err(error) = self.demand.ask(lookup.clone()) {
                    debug!(%lookup, %error, "it could not be asked for");
                }
            }
        }
    }

    /// Asks for it, unless it is held already.
    fn hold(&mut self, lookup: Lookup, need: Need, now: Instant, chosen: &mut Chosen) {
        let is_new = match need {
            Need::Once => chosen.interest.looked_at(now, &lookup),
            Need::Used => chosen.interest.used(now, &lookup),
        };
        if !is_new {
            return;
        }
        if let Err(error) = self.demand.ask(lookup.clone()) {
            debug!(%lookup, %error, "it could not be asked for");
            chosen.interest.forget(std::slice::from_ref(&lookup));
            self.writer.uses.forget([&lookup]);
            return;
        }
        let surplus = chosen.interest.take_surplus();
        self.give_up(surplus);
    }

    fn sweep(&mut self, now: Instant, chosen: &mut Chosen) {
        // From here on each is told again when it is used.
        self.writer.uses.forget_all();
        if !chosen.status.borrow().connected {
            return;
        }
        let view = self.writer.view();
        for uid in self.writer.uses.pinned() {
            for lookup in lookups_of(&view, &uid) {
                chosen.interest.still_used(now, &lookup);
            }
        }
        let idle = chosen.interest.take_idle(now);
        self.give_up(idle);
    }

    /// Not held any more: neither kept up to date nor believed.
    fn give_up(&mut self, lookups: Vec<Lookup>) {
        if lookups.is_empty() {
            return;
        }
        self.writer.update(|view| view.forget(&lookups));
        self.writer.uses.forget(&lookups);
        if let Err(error) = self.demand.forget(lookups) {
            debug!(%error, "what is not needed any more could not be told");
        }
    }
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
        Update::Found(lookup) => view.set_told(lookup),
        Update::NotFound(Lookup::Address(ip)) => view.insert_negative(ip),
        Update::NotFound(lookup) => view.set_told(lookup),
        Update::Unasked(name) => view.let_go(&name),
    }
}

#[cfg(test)]
#[path = "task_tests.rs"]
mod tests;
