// SPDX-License-Identifier: Apache-2.0
//! A node without a kernel: puts everything it is sent in use at once, forgets it, and follows and reports with both modules
//! as the real ones do, each on a connection of its own.

use crate::arrivals::Arrivals;
use crate::programs::Programs;
use crate::{Size, objects};
use anyhow::Context;
use podveil_ca_client::transport::channel;
use podveil_ca_client::{Module, ProgramConfig, ProgramCredentials};
use podveil_identity::{ProgramIdentity, TrustDomain};
use podveil_model::{Epoch, Lookup, ServiceKey, Stage, Uid};
use podveil_proto::podveil::node::v1 as wire;
use podveil_proto::{TAKES, TAKES_CAPTURED};
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

/// Follows the controller with both modules until `stop`.
pub(crate) fn start(
    controller: &str,
    size: &Size,
    node: usize,
    credentials: &ProgramCredentials,
    arrivals: Arc<Arrivals>,
    stop: &CancellationToken,
) {
    let name = objects::node_name(node);
    let info = NodeInfo {
        node: name.clone(),
        ..NodeInfo::default()
    };
    let on_demand = size.on_demand && node != 0;
    let proxy = Config {
        backoff_max: LAST_RETRY,
        on_demand,
        ..Config::new(info.clone())
    };
    let redirect = Config {
        backoff_max: LAST_RETRY,
        ..Config::new(NodeInfo {
            metadata: [(TAKES.to_owned(), TAKES_CAPTURED.to_owned())].into(),
            ..info
        })
    };
    let lookups: Vec<Lookup> = match on_demand {
        true => lookups(size, node),
        false => Vec::new(),
    };
    for (module, config, lookups) in [
        (wire::Module::Proxy, proxy, lookups),
        (wire::Module::Redirect, redirect, Vec::new()),
    ] {
        let link = channel(controller, credentials, ProgramIdentity::Controller);
        let on_demand = config.on_demand;
        let replicas = Replicas::named(
            controller.to_owned(),
            credentials.clone(),
            link,
            stop.clone(),
        );
        let client = Client::start(replicas.clone(), config, stop.clone());
        let (state_in, state) = watch::channel(Arc::default());
        let reporter = Reporter {
            node: name.clone(),
            module,
            on_demand,
            state,
        };
        tokio::spawn(podveil_reports::run(
            replicas,
            reporter,
            Controllers::default(),
            stop.clone(),
        ));
        let following = Following {
            node: name.clone(),
            module,
            lookups,
            arrivals: arrivals.clone(),
            state: state_in,
        };
        let stop = stop.clone();
        tokio::spawn(async move { stop.run_until_cancelled(following.run(client)).await });
    }
}

/// What a proxy asks for: its own workloads, and what they talk to.
fn lookups(size: &Size, node: usize) -> Vec<Lookup> {
    let name = objects::node_name(node).parse().expect("a node's name");
    let services = size.talks_to(node).map(|service| {
        let namespace = size.namespace(service);
        let hostname = format!("{}.{namespace}.svc.cluster.local", objects::app(service));
        Lookup::Service(ServiceKey {
            namespace: namespace.parse().expect("a namespace's name"),
            hostname: hostname.into(),
        })
    });
    [Lookup::Node(name)].into_iter().chain(services).collect()
}

/// One module, as its task has it.
struct Following {
    node: String,
    module: wire::Module,
    lookups: Vec<Lookup>,
    arrivals: Arc<Arrivals>,
    state: watch::Sender<Arc<State>>,
}

impl Following {
    async fn run(self, mut client: Client) {
        for lookup in &self.lookups {
            if let Err(error) = client.demand.ask(lookup.clone()) {
                eprintln!("{} cannot ask for {lookup}: {error}", self.node);
            }
        }
        let is_proxy = self.module == wire::Module::Proxy;
        let mut unanswered: BTreeSet<Lookup> = self.lookups.iter().cloned().collect();
        let mut own = BTreeMap::new();
        let mut waiting = BTreeSet::new();
        // Of this stream; the client says that it has lost one before it opens the next.
        let (mut is_first, mut first) = (true, 0);
        loop {
            let batch = tokio::select! {
                biased;
                Ok(()) = client.status.changed() => {
                    if !client.status.borrow_and_update().connected {
                        (is_first, first) = (true, 0);
                    }
                    continue;
                }
                batch = client.batches.recv() => match batch {
                    Some(batch) => batch,
                    None => return,
                },
            };
            let (resource_type, version) = (batch.resource_type, batch.version);
            let mut sent = 0;
            for update in batch.updates {
                match update {
                    Update::Workload(workload) => {
                        sent += 1;
                        if is_proxy {
                            self.arrivals.workload(&workload);
                        }
                        match workload.stage.waits_for_nodes() {
                            true => waiting.insert(workload.uid.clone()),
                            false => waiting.remove(&workload.uid),
                        };
                        if workload.node.as_str() == self.node {
                            own.insert(workload.uid.clone(), (workload.stage, workload.epoch));
                        }
                    }
                    Update::AddressRemoved(name) => {
                        sent += 1;
                        let uid = Uid(name);
                        own.remove(&uid);
                        waiting.remove(&uid);
                    }
                    Update::Service(_) => sent += 1,
                    Update::Found(lookup) => {
                        unanswered.remove(&lookup);
                    }
                    _ => {}
                }
            }
            batch.acknowledge.in_use();
            self.arrivals.count(sent);
            if resource_type != ResourceType::Address {
                continue;
            }
            first += sent;
            if is_first && unanswered.is_empty() {
                is_first = false;
                if is_proxy {
                    self.arrivals.full(first);
                }
            }
            self.state.send_replace(Arc::new(State {
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
    /// It cannot name a version in use, and is asked.
    on_demand: bool,
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
            applied_version: match self.on_demand {
                true => String::new(),
                false => state.version.to_string(),
            },
            workloads: state.own.iter().map(workload).collect(),
            ..wire::NodeReport::default()
        }
    }

    /// There is one replica only, and everything is at rest: it asks for nothing.
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
