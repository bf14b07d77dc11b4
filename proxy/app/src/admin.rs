// SPDX-License-Identifier: Apache-2.0
//! The read-only endpoints: `/config_dump`, `/status`, `/resources`, readiness, metrics.

mod dump;
mod resources;

use crate::config::NodeConfig;
use crate::pods::Pods;
use crate::zds;
use podveil_ca_client::{ProgramCredentials, WorkloadCertificates};
use podveil_program::http::{Answer, Routes};
use podveil_state::StateHandle;
use podveil_xds_client as xds;
use std::sync::Arc;
use tokio::sync::watch;

/// Everything that the admin page and readiness tell of.
#[derive(Clone, Debug)]
pub struct Facts {
    pub config: Arc<NodeConfig>,
    pub pods: Pods,
    pub state: StateHandle,
    pub credentials: ProgramCredentials,
    pub certificates: WorkloadCertificates,
    pub zds: watch::Receiver<zds::Status>,
    pub xds: watch::Receiver<xds::Status>,
}

impl Facts {
    /// `/config_dump` in the shape that `istioctl ztunnel-config` reads, with what is ours beside it; `/status`, its part
    /// about this node alone; `/resources`, all that is known of the cluster, in the control plane's own form.
    pub fn routes(&self) -> Routes {
        let answer = |of: fn(&Self) -> Answer| {
            let facts = self.clone();
            move || of(&facts)
        };
        Routes::default()
            .get(
                "/config_dump",
                answer(|facts| Answer::json(dump::dump(facts).to_string())),
            )
            .get(
                "/status",
                answer(|facts| Answer::json(dump::status(facts).to_string())),
            )
            .get(
                "/resources",
                answer(|facts| resources::answer(&facts.state.view())),
            )
    }

    /// What is waited for before this proxy counts as ready, one sentence each.
    pub fn pending(&self) -> Vec<String> {
        let mut pending = Vec::new();
        if self.credentials.current().is_none() {
            pending.push("this program has no certificate yet".to_owned());
        }
        {
            let xds = self.xds.borrow();
            if !xds.synced {
                let reason = xds.last_error.as_deref().unwrap_or("still waiting");
                pending.push(format!(
                    "the control plane has not told everything yet: {reason}"
                ));
            }
        }
        match *self.zds.borrow() {
            zds::Status::Disconnected => pending.push("no connection to the ZDS agent".to_owned()),
            // Perhaps it is to follow a proxy that is connected, and is told nothing before that lets go.
            zds::Status::Snapshot if self.config.take_over => {}
            zds::Status::Snapshot => {
                pending.push("the ZDS agent has not told all its pods yet".to_owned());
            }
            zds::Status::Live => {}
        }
        match self.pods.pending() {
            0 => {}
            pods => pending.push(format!("{pods} pods have no listeners yet")),
        }
        pending
    }
}
