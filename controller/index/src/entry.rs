// SPDX-License-Identifier: Apache-2.0
//! One pod that is not finished, as it stands.

use crate::SavedWorkload;
use crate::enrolment::{Enrolment, Held};
use crate::resolve::{self, Derived};
use crate::settings::{self, NamespaceSettings, Settings};
use podveil_model::{Stage, Uid, Workload};
use podveil_source::{Cluster, Namespace, Node, NotEnrolled, Phase, Pod};
use std::sync::Arc;

#[derive(Debug)]
pub(crate) struct Entry {
    /// As it is published.
    pub workload: Arc<Workload>,
    pub enrolment: Enrolment,
    /// Why it is not to be enrolled; `None`: it is.
    pub not_wanted: Option<NotWanted>,
    /// How new the objects are that decide.
    pub known: u64,
    /// The version at which it first appeared.
    pub seen: u64,
    settings: Settings,
    /// What could not be read as it was written.
    bad_settings: Vec<String>,
    derived: Derived,
    made_of: MadeOf,
}

/// Why a pod is not to be enrolled.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum NotWanted {
    Rule(NotEnrolled),
    NotBegun(NotBegun),
}

/// Why nothing is begun with a pod; one that is under way already stays.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum NotBegun {
    /// Cilium captures the same pods for a ztunnel of its own.
    CiliumEncrypts,
    Terminating,
}

impl std::fmt::Display for NotBegun {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::CiliumEncrypts => {
                "Cilium's encryption.type=ztunnel is on, and two that capture the same pods would break each other: \
                 switch it off, or set enrolment.takeOver"
            }
            Self::Terminating => "the pod is ending",
        })
    }
}

impl std::fmt::Display for NotWanted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Rule(rule) => rule.fmt(f),
            Self::NotBegun(why) => why.fmt(f),
        }
    }
}

/// The objects that an entry was made of: where they are the same ones, so is the entry.
#[derive(Clone, Debug)]
struct MadeOf {
    pod: Arc<Pod>,
    namespace: Arc<Namespace>,
    namespace_settings: NamespaceSettings,
    locality: podveil_model::Locality,
    released: Option<u64>,
    cilium_encrypts: bool,
}

/// What a pod's entry is made of.
pub(crate) struct Parts<'a> {
    pub cluster: &'a Cluster,
    pub pod: &'a Arc<Pod>,
    /// The one that it runs on, where that is known.
    pub node: Option<&'a Node>,
    pub namespace: &'a Arc<Namespace>,
    pub namespace_settings: NamespaceSettings,
    pub derived: Derived,
    /// How far versions have been set back, by a clock or by a restored backup: epochs only grow.
    pub lift: u64,
}

impl Entry {
    pub(crate) fn uid(&self) -> &Uid {
        &self.workload.uid
    }

    pub(crate) fn pod(&self) -> &Arc<Pod> {
        &self.made_of.pod
    }

    pub(crate) fn derived(&self) -> &Derived {
        &self.derived
    }

    pub(crate) fn wanted(&self) -> bool {
        wanted(self.not_wanted, self.enrolment.stage())
    }

    /// What must outlive a restart; `None`: nothing.
    pub(crate) fn saved(&self) -> Option<SavedWorkload> {
        (self.enrolment.stage() != Stage::None).then(|| SavedWorkload {
            stage: self.enrolment.stage(),
            mode: self.settings.mode,
            resource_version: self.enrolment.epoch().resource_version,
        })
    }

    /// What could not be taken as it was written.
    pub(crate) fn conditions(&self) -> impl Iterator<Item = &String> {
        self.bad_settings.iter().chain(&self.derived.refused)
    }

    /// Would the entry after this one be the same?
    pub(crate) fn is_made_of(&self, parts: &Parts<'_>) -> bool {
        self.made_of.is_same(parts) && self.derived == parts.derived
    }

    /// The entry after `last`; whether anything that is published is not as it was.
    pub(crate) fn next(
        parts: Parts<'_>,
        last: Option<Self>,
        restored: Option<SavedWorkload>,
        version: u64,
    ) -> (Self, bool) {
        let made_of = parts.made_of();
        let Parts {
            cluster,
            pod,
            namespace,
            namespace_settings,
            derived,
            lift,
            ..
        } = parts;
        let newest = |pod: u64, namespace: u64| {
            pod.max(namespace)
                .max(cluster.released.unwrap_or_default())
                .saturating_add(lift)
        };
        let known = newest(pod.version, namespace.version);
        // Not by what is newer and decides nothing: another replica may have seen it later.
        let deciding = newest(pod.decided, namespace.decided);
        let mut bad_settings = Vec::new();
        let settings = settings::settings(
            pod,
            namespace_settings,
            last.as_ref().map(|last| &last.settings),
            &mut bad_settings,
        );
        let mut enrolment = match (&last, restored) {
            (Some(last), _) => last.enrolment.clone(),
            (None, Some(saved)) => Enrolment::restored(saved.stage, saved.resource_version),
            // Not by the pod's own version: replicas that see it for the first time at different moments, as after a power
            // cut, must begin alike, or the one that nobody follows waits for ever for its newer epoch to be in use.
            (None, None) => Enrolment::new(newest(0, namespace.decided)),
        };
        let not_wanted = match cluster.enrolment(pod, namespace, namespace_settings.rules) {
            Err(rule) => Some(NotWanted::Rule(rule)),
            Ok(()) if pod.phase != Phase::Running => {
                Some(NotWanted::NotBegun(NotBegun::Terminating))
            }
            Ok(()) if cluster.cilium_encrypts => {
                Some(NotWanted::NotBegun(NotBegun::CiliumEncrypts))
            }
            Ok(()) => None,
        };
        let wanted = wanted(not_wanted, enrolment.stage());
        let decided = match (&last, restored) {
            (Some(last), _) => last.wanted() != wanted || last.settings != settings,
            (None, Some(saved)) => {
                saved.stage.wants_capture() != wanted || saved.mode != settings.mode
            }
            (None, None) => false,
        };
        if decided {
            enrolment.decided(deciding);
        }
        let workload = Workload {
            mode: settings.mode,
            external: settings.external,
            exclude_outbound_ports: settings.exclude_outbound_ports.clone(),
            exclude_inbound_ports: settings.exclude_inbound_ports.clone(),
            plain_inbound_ports: settings.plain_inbound_ports.clone(),
            stage: enrolment.stage(),
            epoch: enrolment.epoch(),
            ..resolve::workload(cluster, pod, derived.clone())
        };
        let seen = last.as_ref().map_or(version, |last| last.seen);
        let (workload, changed) = match last {
            Some(last) if *last.workload == workload => (last.workload, false),
            _ => (Arc::new(workload), true),
        };
        let entry = Self {
            workload,
            enrolment,
            not_wanted,
            known,
            seen,
            settings,
            bad_settings,
            derived,
            made_of,
        };
        (entry, changed)
    }

    /// Takes over where its node knows more; whether that changed anything.
    pub(crate) fn adopt(&mut self, held: Held, fresh: bool) -> bool {
        // What is under way at its node goes on, also where it would not be begun with now.
        let wanted =
            self.wanted() || (held.stage.wants_capture() && wanted(self.not_wanted, held.stage));
        let adopted = self.enrolment.adopt(held, wanted, self.known, fresh);
        if adopted {
            self.show_stage();
        }
        adopted
    }

    /// Makes the published form say the stage.
    pub(crate) fn show_stage(&mut self) {
        let (stage, epoch) = (self.enrolment.stage(), self.enrolment.epoch());
        if (self.workload.stage, self.workload.epoch) != (stage, epoch) {
            let workload = Arc::make_mut(&mut self.workload);
            workload.stage = stage;
            workload.epoch = epoch;
        }
    }
}

fn wanted(not_wanted: Option<NotWanted>, stage: Stage) -> bool {
    match not_wanted {
        None => true,
        Some(NotWanted::Rule(_)) => false,
        Some(NotWanted::NotBegun(_)) => stage != Stage::None,
    }
}

impl Parts<'_> {
    fn made_of(&self) -> MadeOf {
        MadeOf {
            pod: self.pod.clone(),
            namespace: self.namespace.clone(),
            namespace_settings: self.namespace_settings,
            locality: self.locality().cloned().unwrap_or_default(),
            released: self.cluster.released,
            cilium_encrypts: self.cluster.cilium_encrypts,
        }
    }

    fn locality(&self) -> Option<&podveil_model::Locality> {
        Some(&self.node?.locality)
    }
}

impl MadeOf {
    fn is_same(&self, parts: &Parts<'_>) -> bool {
        Arc::ptr_eq(&self.pod, parts.pod)
            && self.namespace == *parts.namespace
            && self.namespace_settings == parts.namespace_settings
            && self.released == parts.cluster.released
            && self.cilium_encrypts == parts.cluster.cilium_encrypts
            && match parts.locality() {
                Some(locality) => self.locality == *locality,
                None => self.locality == podveil_model::Locality::default(),
            }
    }
}
