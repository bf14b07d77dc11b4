// SPDX-License-Identifier: Apache-2.0
use crate::view::Insert;
use crate::{StateWriter, View, Word};
use podveil_model::NetworkAddress;
use podveil_xds_client::{Batch, Demand, Key, ResourceType, Update};
use std::net::IpAddr;
use std::sync::Arc;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

/// `system_version_info` of the newest push of addresses that is in use here; `None` before the first.
pub type Version = Option<Arc<str>>;

/// The only writer of the state.
#[derive(Debug)]
pub struct StateTask {
    pub writer: StateWriter,
    pub batches: mpsc::Receiver<Batch>,
    /// `None` where the control plane answers no questions: connections then wait for a push.
    pub demand: Option<Demand>,
    /// Addresses that connections ask for, and what the node says of its own.
    pub questions: mpsc::Receiver<Word>,
    pub in_use: watch::Sender<Version>,
}

impl StateTask {
    /// Runs until `stop`, or until the xDS client is gone. The state stays readable afterwards.
    pub async fn run(mut self, stop: CancellationToken) {
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                batch = self.batches.recv() => match batch {
                    Some(batch) => self.take(batch),
                    None => return,
                },
                Some(word) = self.questions.recv() => match word {
                    Word::WhoHas(ip) => self.ask(ip),
                    Word::Local { uid, addresses } => self.writer.update(|view| {
                        view.set_local_addresses(uid, addresses);
                    }),
                },
            }
        }
    }

    fn take(&self, batch: Batch) {
        let resource_type = batch.resource_type;
        for rejected in &batch.rejected {
            warn!(name = %rejected.name, reason = %rejected.reason, "a resource was rejected; what was held stays in use");
        }
        let changes = batch.updates.len();
        self.writer.update(|view| {
            for update in batch.updates {
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
    }

    fn ask(&self, ip: IpAddr) {
        let key = Key::Address(NetworkAddress {
            network: "".into(),
            ip,
        });
        if let Some(demand) = &self.demand
            && let Err(error) = demand.ask(key)
        {
            debug!(%ip, %error, "an address could not be asked for");
        }
    }
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
        Update::NotFound(Key::Address(address)) => view.insert_negative(address.ip),
        Update::NotFound(Key::Service(_) | Key::Workload(_)) => {}
    }
}

#[cfg(test)]
#[path = "task_tests.rs"]
mod tests;
