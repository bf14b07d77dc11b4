// SPDX-License-Identifier: Apache-2.0
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

/// What is in use of one type: the name and version of each resource, to be told to the next server.
#[derive(Debug, Default)]
pub(super) struct Held {
    versions: HashMap<Arc<str>, Arc<str>>,
    /// Some response of this type has been acknowledged.
    pub(super) acknowledged: bool,
}

/// What a response changes about [`Held`], once it is in use.
#[derive(Debug, Default)]
pub(super) struct Changes {
    pub(super) removed: HashSet<Arc<str>>,
    /// Name to version.
    pub(super) accepted: HashMap<Arc<str>, Arc<str>>,
}

/// What is in use, and what will be once the consumer has answered.
pub(super) struct Known<'a> {
    pub(super) held: Option<&'a Held>,
    /// Changes not yet answered, newest first.
    pub(super) coming: Vec<&'a Changes>,
}

impl Known<'_> {
    pub(super) fn contains(&self, name: &str) -> bool {
        for changes in &self.coming {
            if changes.accepted.contains_key(name) {
                return true;
            }
            if changes.removed.contains(name) {
                return false;
            }
        }
        self.held
            .is_some_and(|held| held.versions.contains_key(name))
    }

    /// Never less than the true number.
    pub(super) fn count(&self) -> usize {
        let coming = self.coming.iter().map(|changes| changes.accepted.len());
        self.held.map_or(0, |held| held.versions.len()) + coming.sum::<usize>()
    }
}

impl Held {
    pub(super) fn apply(&mut self, changes: Changes) {
        for name in changes.removed {
            self.versions.remove(&name);
        }
        self.versions.extend(changes.accepted);
    }

    pub(super) fn versions(&self) -> BTreeMap<String, String> {
        self.versions
            .iter()
            .map(|(name, version)| (name.to_string(), version.to_string()))
            .collect()
    }
}
