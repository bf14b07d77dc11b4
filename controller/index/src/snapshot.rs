// SPDX-License-Identifier: Apache-2.0
use podveil_model::{MeshConfig, Service, Workload};
use podveil_policy::Policy;
use std::sync::Arc;

/// All that nodes are to know, at one moment. What has not changed is the same `Arc` as in the snapshot before.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Snapshot {
    pub workloads: Vec<Arc<Workload>>,
    pub services: Vec<Arc<Service>>,
    pub policies: Vec<Arc<Policy>>,
    pub mesh: Arc<MeshConfig>,
}
