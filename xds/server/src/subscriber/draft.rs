// SPDX-License-Identifier: Apache-2.0
use crate::published::Entry;
use crate::response::Named;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// A response being put together: each resource once, with every name it was asked by.
#[derive(Default)]
pub(super) struct Draft {
    /// Those that changed, each once.
    pushed: Vec<Arc<Entry>>,
    /// Those that were asked for, whether they changed or not.
    answered: BTreeMap<Arc<str>, (Arc<Entry>, BTreeSet<String>)>,
    removed: BTreeSet<String>,
}

impl Draft {
    pub(super) fn push(&mut self, entry: &Arc<Entry>) {
        self.pushed.push(entry.clone());
    }

    /// The negative answer is the name itself among the removed.
    pub(super) fn answer(&mut self, name: &str, found: Vec<Arc<Entry>>) {
        if found.is_empty() {
            self.remove(name.to_owned());
        }
        for entry in found {
            self.tell(entry, [name.to_owned()]);
        }
    }

    /// A resource with names that it was asked by; its own may be among them.
    pub(super) fn tell(&mut self, entry: Arc<Entry>, names: impl IntoIterator<Item = String>) {
        let own = entry.name.clone();
        let (_, aliases) =
            (self.answered.entry(own.clone())).or_insert_with(|| (entry, BTreeSet::new()));
        aliases.extend(names.into_iter().filter(|name| **name != *own));
    }

    pub(super) fn remove(&mut self, name: String) {
        self.removed.insert(name);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pushed.is_empty() && self.answered.is_empty() && self.removed.is_empty()
    }

    /// What came, and what went.
    pub(super) fn finish(mut self) -> (Vec<Named>, Vec<String>) {
        let named = |(entry, aliases): (Arc<Entry>, BTreeSet<String>)| Named {
            entry,
            aliases: aliases.into_iter().collect(),
        };
        // Pushed and asked for are of the same snapshot.
        let pushed = self.pushed.into_iter().map(|entry| {
            let answered = self.answered.remove(&entry.name);
            named(answered.unwrap_or_else(|| (entry, BTreeSet::new())))
        });
        let mut resources: Vec<Named> = pushed.collect();
        resources.extend(self.answered.into_values().map(named));
        (resources, self.removed.into_iter().collect())
    }
}
