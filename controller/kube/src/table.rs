// SPDX-License-Identifier: Apache-2.0
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::time::Instant;

/// All objects of one kind, in the few fields that are kept.
#[derive(Debug)]
pub(crate) struct Table<V> {
    objects: BTreeMap<Arc<str>, Arc<V>>,
    /// What a list that is being read has brought so far.
    listed: Option<BTreeMap<Arc<str>, Arc<V>>>,
    /// Its first list has been read to the end.
    pub complete: bool,
    /// Why the newest state may not be in it; `None`: it is.
    pub fault: Option<Fault>,
}

#[derive(Clone, Debug)]
pub(crate) struct Fault {
    pub at: Instant,
    pub sentence: Arc<str>,
}

/// What is kept of an object.
pub(crate) trait Kept: PartialEq {
    /// Equal but for the version? Such a change wakes nobody.
    fn same(&self, other: &Self) -> bool;

    /// Takes over from the object as it was before what must not change while the rest does.
    fn follow(&mut self, _before: &Self) {}
}

impl<V> Default for Table<V> {
    fn default() -> Self {
        Self {
            objects: BTreeMap::new(),
            listed: None,
            complete: false,
            fault: None,
        }
    }
}

impl<V: Kept> Table<V> {
    pub(crate) fn values(&self) -> impl Iterator<Item = &Arc<V>> {
        self.objects.values()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&Arc<str>, &Arc<V>)> {
        self.objects.iter()
    }

    /// A list begins: what it does not name is gone when it ends.
    pub(crate) fn begin(&mut self) {
        self.listed = Some(BTreeMap::new());
    }

    /// One object of that list.
    pub(crate) fn list(&mut self, key: Arc<str>, mut object: V) {
        if let Some(held) = self.objects.get(&key) {
            object.follow(held);
        }
        let object = match self.objects.get(&key) {
            Some(held) if **held == object => held.clone(),
            _ => Arc::new(object),
        };
        self.listed.get_or_insert_default().insert(key, object);
    }

    /// The list has ended; whether anything that anybody reads is not as it was.
    pub(crate) fn end(&mut self) -> bool {
        let listed = self.listed.take().unwrap_or_default();
        let same = self.complete
            && listed.len() == self.objects.len()
            && listed
                .iter()
                .zip(&self.objects)
                .all(|((key, new), (held_key, held))| key == held_key && held.same(new));
        self.objects = listed;
        self.complete = true;
        !same
    }

    /// A new or changed object; `None`: nothing of it is kept any more. Whether anything is not as it was.
    pub(crate) fn apply(&mut self, key: Arc<str>, object: Option<V>) -> bool {
        let Some(mut object) = object else {
            return self.objects.remove(&key).is_some();
        };
        match self.objects.get_mut(&key) {
            Some(held) => {
                let same = held.same(&object);
                object.follow(held);
                *held = Arc::new(object);
                !same
            }
            None => {
                self.objects.insert(key, Arc::new(object));
                true
            }
        }
    }
}
