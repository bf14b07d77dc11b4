// SPDX-License-Identifier: Apache-2.0
//! One pod that is not finished, as it stands.

use crate::SavedWorkload;
use crate::enrolment::{Enrolment, Held};
use crate::resolve::{self, Derived};
use crate::settings::{self, NamespaceSettings, Settings};
use podveil_model::{Stage, Uid, Workload};
use podveil_source::{Cluster, Namespace, NotEnrolled, Phase, Pod};
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
    /// It was told to end before it was begun with.
    Terminating,
}

impl std::fmt::Display for NotWanted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Rule(rule) => rule.fmt(f),
            Self::Terminating => f.write_str("the pod is ending"),
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
}

/// What a pod's entry is made of.
pub(crate) struct Parts<'a> {
    pub cluster: &'a Cluster,
    pub pod: &'a Arc<Pod>,
    pub namespace: Arc<Namespace>,
    pub namespace_settings: NamespaceSettings,
    pub derived: Derived,
    /// How far versions have been set back, by a clock or by a restored backup: epochs only grow.
    pub lift: u64,
}

impl Entry {
    pub(crate) fn uid(&self) -> &Uid {
        &self.workload.uid
    }

    pub(crate) fn wanted(&self) -> bool {
        self.not_wanted.is_none()
    }

    pub(crate) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// What could not be taken as it was written.
    pub(crate) fn conditions(&self) -> impl Iterator<Item = &String> {
        self.bad_settings.iter().chain(&self.derived.refused)
    }

    /// The entry after `last`; whether anything that is published is not as it was.
    pub(crate) fn next(
        parts: Parts<'_>,
        last: Option<Self>,
        restored: Option<SavedWorkload>,
        version: u64,
    ) -> (Self, bool) {
        let made_of = parts.made_of();
        match last {
            Some(last) if last.made_of.is_same(&made_of) && last.derived == parts.derived => {
                (last, false)
            }
            last => Self::make(parts, made_of, last, restored, version),
        }
    }

    fn make(
        parts: Parts<'_>,
        made_of: MadeOf,
        last: Option<Self>,
        restored: Option<SavedWorkload>,
        version: u64,
    ) -> (Self, bool) {
        let Parts {
            cluster,
            pod,
            namespace,
            namespace_settings,
            derived,
            lift,
        } = parts;
        let known = pod
            .version
            .max(namespace.version)
            .max(cluster.released.unwrap_or_default())
            .saturating_add(lift);
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
            (None, None) => Enrolment::new(known),
        };
        // A pod that is told to end is not begun with; one that is under way stays.
        let begins = pod.phase == Phase::Running || enrolment.stage() != Stage::None;
        let not_wanted = match cluster.enrolment(pod, &namespace, namespace_settings.mode) {
            Err(rule) => Some(NotWanted::Rule(rule)),
            Ok(()) if !begins => Some(NotWanted::Terminating),
            Ok(()) => None,
        };
        let wanted = not_wanted.is_none();
        let decided = match (&last, restored) {
            (Some(last), _) => last.wanted() != wanted || last.settings != settings,
            (None, Some(saved)) => {
                saved.stage.wants_capture() != wanted || saved.mode != settings.mode
            }
            (None, None) => false,
        };
        if decided {
            enrolment.decided(known);
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
        let wanted = self.wanted();
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

impl Parts<'_> {
    fn made_of(&self) -> MadeOf {
        let node = self.cluster.nodes.get(&self.pod.node);
        MadeOf {
            pod: self.pod.clone(),
            namespace: self.namespace.clone(),
            namespace_settings: self.namespace_settings,
            locality: node.map_or_else(Default::default, |node| node.locality.clone()),
            released: self.cluster.released,
        }
    }
}

impl MadeOf {
    fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.pod, &other.pod)
            && Arc::ptr_eq(&self.namespace, &other.namespace)
            && self.namespace_settings == other.namespace_settings
            && self.locality == other.locality
            && self.released == other.released
    }
}
