// SPDX-License-Identifier: Apache-2.0
use podveil_model::{Lookup, MeshConfig, Service, Workload};
use podveil_policy::Policy;
use podveil_proto::type_url;
use std::sync::Arc;
use tokio::sync::mpsc::OwnedPermit;

/// The resources a node subscribes to.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum ResourceType {
    /// Workloads and services.
    Address,
    /// Policies.
    Authorization,
    /// What every node must know about the whole; only Podveil's controller has it.
    MeshConfig,
}

impl ResourceType {
    /// In the order of subscribing: a policy should be there before the workload that names it.
    pub const ALL: [Self; 3] = [Self::MeshConfig, Self::Authorization, Self::Address];

    pub fn type_url(self) -> &'static str {
        match self {
            Self::Address => type_url::ADDRESS,
            Self::Authorization => type_url::AUTHORIZATION,
            Self::MeshConfig => type_url::MESH_CONFIG,
        }
    }

    pub fn from_type_url(url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|one| one.type_url() == url)
    }
}

/// One change, in the order of the batch: removals first.
#[derive(Clone, Debug, PartialEq)]
pub enum Update {
    Workload(Arc<Workload>),
    Service(Arc<Service>),
    /// A workload's uid or a service's `<namespace>/<hostname>`, whichever is held by this name.
    AddressRemoved(Arc<str>),
    Policy {
        /// The resource's name, by which workloads name the policy.
        name: Arc<str>,
        policy: Arc<Policy>,
    },
    PolicyRemoved(Arc<str>),
    Mesh(Arc<MeshConfig>),
    /// The answer to a question: the control plane knows nobody by this.
    NotFound(Lookup),
    /// On demand: a question is answered, by what this batch and those before it have brought, and kept up to date from here
    /// on.
    Found(Lookup),
    /// On demand: a question was given up, and is not kept up to date from here on.
    Forgotten(Lookup),
    /// On demand: nothing that is asked means this workload or service any more. It is not kept up to date.
    Unasked(Arc<str>),
}

/// A resource that could not be understood. Nothing was emitted for it; what was held before stays.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Rejected {
    pub name: Arc<str>,
    pub reason: Arc<str>,
}

/// One response of the control plane, parsed. It must be [acknowledged](Acknowledge) once it is in use.
#[derive(Debug)]
pub struct Batch {
    pub resource_type: ResourceType,
    /// `system_version_info` as it came.
    pub version: Arc<str>,
    pub updates: Vec<Update>,
    /// For the consumer's log and metric; the control plane is told in any case.
    pub rejected: Vec<Rejected>,
    pub acknowledge: Acknowledge,
}

/// Answers one [`Batch`]. Dropped unused it rejects, so that nothing counts as in use by accident.
#[derive(Debug)]
pub struct Acknowledge {
    id: u64,
    answer: Option<OwnedPermit<(u64, Result<(), String>)>>,
}

impl Acknowledge {
    pub(crate) fn new(id: u64, answer: OwnedPermit<(u64, Result<(), String>)>) -> Self {
        Self {
            id,
            answer: Some(answer),
        }
    }

    /// For consumers' own tests: an acknowledgement that nobody hears.
    pub fn unheard() -> Self {
        Self {
            id: 0,
            answer: None,
        }
    }

    /// Everything in the batch is in use.
    pub fn in_use(mut self) {
        self.send(Ok(()));
    }

    /// The batch could not be taken into use; the control plane is told why and its versions are not recorded.
    pub fn reject(mut self, reason: impl Into<String>) {
        self.send(Err(reason.into()));
    }

    fn send(&mut self, answer: Result<(), String>) {
        if let Some(permit) = self.answer.take() {
            permit.send((self.id, answer));
        }
    }
}

impl Drop for Acknowledge {
    fn drop(&mut self) {
        self.send(Err("dropped before it was in use".to_owned()));
    }
}

/// How the client stands.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Status {
    /// A stream is open and has answered.
    pub connected: bool,
    /// Every type has been acknowledged once, since the start of the program. Stays true over reconnects.
    pub synced: bool,
    /// Why the last stream ended or the last response was rejected; cleared by the next good one.
    pub last_error: Option<Arc<str>>,
}
