// SPDX-License-Identifier: Apache-2.0
use podveil_model::{MeshConfig, Service, Workload};
use podveil_policy::Policy;
use std::sync::Arc;

/// The whole state at one moment. Order does not matter; of two resources of one name the last counts.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    pub workloads: Vec<Arc<Workload>>,
    pub services: Vec<Arc<Service>>,
    pub policies: Vec<Arc<Policy>>,
    pub mesh: Option<Arc<MeshConfig>>,
}
