// SPDX-License-Identifier: Apache-2.0
//! A node that takes its configuration from another replica: reports by the programs' own code, and holds whatever it is
//! asked for.

use crate::fixture::Fixture;
use podveil_identity::ProgramIdentity;
use podveil_model::{Epoch, Uid};
use podveil_proto::podveil::node::v1 as wire;
use podveil_reports::{Controllers, Replicas, Source};
use std::sync::Arc;
use tokio_util::sync::{CancellationToken, DropGuard};

pub struct Elsewhere {
    _stop: DropGuard,
}

impl Elsewhere {
    /// `ready`: workloads here that both modules hold ready from the start.
    pub fn start(fixture: &Fixture, name: &str, ready: Vec<String>) -> Self {
        let channel = fixture.channel(&ProgramIdentity::Node(name.parse().unwrap()));
        let stop = CancellationToken::new();
        let ready = Arc::new(ready);
        for module in [wire::Module::Proxy, wire::Module::Redirect] {
            let program = Program {
                node: name.to_owned(),
                module,
                ready: ready.clone(),
            };
            let replicas = Replicas::fixed(vec![channel.clone()]);
            let controllers = Controllers::default();
            tokio::spawn(podveil_reports::run(
                replicas,
                program,
                controllers,
                stop.clone(),
            ));
        }
        Self {
            _stop: stop.drop_guard(),
        }
    }
}

#[derive(Clone)]
struct Program {
    node: String,
    module: wire::Module,
    ready: Arc<Vec<String>>,
}

impl Source for Program {
    fn report(&self) -> wire::NodeReport {
        let workload = |uid: &String| wire::WorkloadReport {
            uid: uid.clone(),
            condition: wire::WorkloadCondition::Ready.into(),
            ..wire::WorkloadReport::default()
        };
        // No version: what another replica has published says nothing here.
        wire::NodeReport {
            node: self.node.clone(),
            module: self.module.into(),
            workloads: self.ready.iter().map(workload).collect(),
            ..wire::NodeReport::default()
        }
    }

    fn holds(&self, _: &Uid, _: Epoch) -> bool {
        true
    }

    fn is_awaited(&self) -> bool {
        true
    }

    async fn changed(&mut self) {
        std::future::pending().await
    }
}
