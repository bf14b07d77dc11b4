// SPDX-License-Identifier: Apache-2.0
//! A node without a kernel: puts everything it is sent in use at once, forgets it, and reports with both modules as the
//! real ones do, each on a connection of its own.

use crate::arrivals::Arrivals;
use crate::objects;
use crate::programs::Programs;
use anyhow::Context;
use podveil_ca_client::transport::channel;
use podveil_ca_client::{Module, ProgramConfig, ProgramCredentials};
use podveil_identity::{ProgramIdentity, TrustDomain};
use podveil_model::{Epoch, Stage, Uid};
use podveil_proto::podveil::node::v1 as wire;
use podveil_reports::{Controllers, Replicas, Source, wire_epoch, wire_stage};
use podveil_xds_client::{Client, Config, NodeInfo, ResourceType, Update};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// For its certificate.
const PATIENCE: Duration = Duration::from_secs(60);
/// As the node program has it: a controller that comes back is found soon.
const LAST_RETRY: Duration = Duration::from_secs(5);

/// A node's certificate, held and no longer renewed.
pub(crate) async fn credentials(
    programs: &Programs,
    node: usize,
) -> anyhow::Result<ProgramCredentials> {
    let name = objects::node_name(node);
    let stop = CancellationToken::new();
    let _stop = stop.clone().drop_guard();
    let config = ProgramConfig {
        trust_domain: TrustDomain::new("cluster.local")?,
        identity: ProgramIdentity::Node(name.parse()?),
        ca_address: programs.ca.clone(),
        token_path: programs.token(&format!("node.{name}")),
        bootstrap_bundle: programs.bundle(),
        state_dir: programs.folder.join("nodes").join(&name),
        module: Module::Proxy,
    };
    let starting = ProgramCredentials::start(config, stop);
    let ready = tokio::time::timeout(PATIENCE, starting.ready())
        .await
        .with_context(|| format!("{name} got no certificate"))?;
    Ok(ProgramCredentials::fixed((*ready).clone()))
}

/// Follows the controller until `stop`.
pub(crate) fn start(
    controller: &str,
    node: usize,
    credentials: &ProgramCredentials,
    arrivals: Arc<Arrivals>,
    stop: &CancellationToken,
) {
    let name = objects::node_name(node);
    let link = channel(controller, credentials, ProgramIdentity::Controller);
    let info = NodeInfo {
        node: name.clone(),
        ..NodeInfo::default()
    };
    let config = Config {
        backoff_max: LAST_RETRY,
        ..Config::new(info)
    };
    let client = Client::start(link, config, stop.clone());
    let (state_in, state) = watch::channel(Arc::default());
    for module in [wire::Module::Proxy, wire::Module::Redirect] {
        let reporter = Reporter {
            node: name.clone(),
            module,
            state: state.clone(),
        };
        let replicas = Replicas::Named {
            address: controller.to_owned(),
            credentials: credentials.clone(),
        };
        tokio::spawn(podveil_reports::run(
            replicas,
            reporter,
            Controllers::default(),
            stop.clone(),
        ));
    }
    let stop = stop.clone();
    let following = follow(name, client, arrivals, state_in);
    tokio::spawn(async move { stop.run_until_cancelled(following).await });
}

async fn follow(
    node: String,
    mut client: Client,
    arrivals: Arc<Arrivals>,
    state: watch::Sender<Arc<State>>,
) {
    let mut own = BTreeMap::new();
    let mut waiting = BTreeSet::new();
    // Of this stream; the client says that it has lost one before it opens the next.
    let mut is_first = true;
    loop {
        let batch = tokio::select! {
            biased;
            Ok(()) = client.status.changed() => {
                is_first |= !client.status.borrow_and_update().connected;
                continue;
            }
            batch = client.batches.recv() => match batch {
                Some(batch) => batch,
                None => return,
            },
        };
        let (resource_type, version) = (batch.resource_type, batch.version);
        let resources = batch.updates.len();
        arrivals.count(resources);
        for update in batch.updates {
            match update {
                Update::Workload(workload) => {
                    arrivals.workload(&workload);
                    match workload.stage.waits_for_nodes() {
                        true => waiting.insert(workload.uid.clone()),
                        false => waiting.remove(&workload.uid),
                    };
                    if workload.node.as_str() == node {
                        own.insert(workload.uid.clone(), (workload.stage, workload.epoch));
                    }
                }
                Update::AddressRemoved(name) => {
                    let uid = Uid(name);
                    own.remove(&uid);
                    waiting.remove(&uid);
                }
                _ => {}
            }
        }
        batch.acknowledge.in_use();
        if resource_type == ResourceType::Address {
            if std::mem::take(&mut is_first) {
                arrivals.full(resources);
            }
            state.send_replace(Arc::new(State {
                version,
                own: own.clone(),
                waits_for_nodes: !waiting.is_empty(),
            }));
        }
    }
}

/// What is in use.
#[derive(Debug, Default)]
struct State {
    version: Arc<str>,
    own: BTreeMap<Uid, (Stage, Epoch)>,
    /// A workload is at a stage that does.
    waits_for_nodes: bool,
}

#[derive(Clone)]
struct Reporter {
    node: String,
    module: wire::Module,
    state: watch::Receiver<Arc<State>>,
}

impl Source for Reporter {
    fn report(&self) -> wire::NodeReport {
        let state = self.state.borrow().clone();
        let workload = |(uid, (stage, epoch)): (&Uid, &(Stage, Epoch))| wire::WorkloadReport {
            uid: uid.to_string(),
            condition: wire::WorkloadCondition::Ready.into(),
            stage: wire_stage(*stage).into(),
            epoch: Some(wire_epoch(*epoch)),
            ..wire::WorkloadReport::default()
        };
        wire::NodeReport {
            node: self.node.clone(),
            module: self.module.into(),
            applied_version: state.version.to_string(),
            workloads: state.own.iter().map(workload).collect(),
            ..wire::NodeReport::default()
        }
    }

    /// There is one replica only, and it asks for nothing.
    fn holds(&self, _: &Uid, _: Epoch) -> bool {
        false
    }

    fn is_awaited(&self) -> bool {
        self.state.borrow().waits_for_nodes
    }

    async fn changed(&mut self) {
        if self.state.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
